"""Texts and questions written for the demo."""

from pathlib import Path


def data_file(name: str) -> Path:
    """Path of one of the demo's JSONL files."""
    return Path(__file__).parent / name
