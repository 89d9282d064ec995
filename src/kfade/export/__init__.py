"""Writes an update in the formats of other libraries."""
