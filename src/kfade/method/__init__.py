"""The method: objectives, gradient, step, update, and what they do to the outputs."""
