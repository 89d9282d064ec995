"""Estimates bytes, flops and seconds of a run from the model's configuration, without weights."""
