"""Examples, token sequences and batches."""
