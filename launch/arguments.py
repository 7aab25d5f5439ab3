"""Types of command-line arguments that several commands take."""

import argparse


def positive_int(text: str) -> int:
    """A whole number above 0; anything else is the parser's error."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value}: expected a number above 0")
    return value
