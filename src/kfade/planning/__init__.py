"""Bytes, flops and seconds of a run, from a configuration alone."""
