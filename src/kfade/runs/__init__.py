"""A configuration becomes a folder."""
