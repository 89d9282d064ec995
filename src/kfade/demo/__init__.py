"""The demo: SmolLM2-135M-Instruct forgets the capitals of the world. Its data are in ``data/``."""
