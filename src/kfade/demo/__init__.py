"""The demo: make SmolLM2-135M-Instruct forget the capitals of the world, on texts of our own."""
