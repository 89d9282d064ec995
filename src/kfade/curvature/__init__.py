"""Curvature of the model's outputs on the retain set: capture, factors, eigenbases, products."""
