"""Evaluations: each gets a model and cannot know how it was made."""
