"""Paths as people write them."""

from pathlib import Path


def home_path(text: str) -> Path:
    """A path, with the home folder for a leading ``~`` that no shell has seen (``--output=~/runs``)."""
    return Path(text).expanduser()
