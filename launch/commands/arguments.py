"""Types of command-line arguments that several commands take."""

import argparse
from collections.abc import Iterable
from typing import Any


def positive_int(text: str) -> int:
    """A whole number above 0; anything else is the parser's error."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value}: expected a number above 0")
    return value


class SettingsParser(argparse.ArgumentParser):
    """Takes settings (``overrides``) before, between and after options, as the stages do."""

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, rest = super().parse_known_args(args, namespace)
        options.overrides = [*options.overrides, *(part for part in rest if not part.startswith("-"))]
        return options, [part for part in rest if part.startswith("-")]
