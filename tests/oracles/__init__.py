"""Slow, obvious versions of what kfade computes, for the tests to compare with.

``loops`` goes over sequences and tokens one by one, ``dense`` writes out the exact Gauss-Newton
matrix.
"""
