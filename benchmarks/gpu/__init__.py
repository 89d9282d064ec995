"""Measurements on one GPU, piece by piece: see README.md."""
