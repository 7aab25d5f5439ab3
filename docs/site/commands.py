"""The page of all commands, made from their parsers."""

import argparse
import contextlib
import io
import re

from launch.cli import build_parser
from launch.stages import STAGES, training
from rlhf.config import parse_command_line

PAGE = "reference/commands.md"
_INTRODUCTION = """\
# Commands

This page is made from the parsers: each command prints the same with `--help`. Settings (`key=value`) are on the pages
of [settings](../reference.md).
"""


def page() -> str:
    parts = [_INTRODUCTION, *_stages()]
    for parser in _leaves(build_parser()):
        name = re.sub(rf" {next(iter(training()))}$", " STAGE", parser.prog)
        parts += [f"## {name}\n", _block(_help(parser))]
    return "\n".join(parts)


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers below ``parser`` that have no further commands; the first stage stands for all."""
    chosen = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not chosen:
        return [parser]
    inside = [*chosen[0].choices.values()]
    if chosen[0].dest == "stage":
        inside = inside[:1]
    return [leaf for each in inside for leaf in _leaves(each)]


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog, kind=parser.formatter_class: kind(prog, width=100)  # type: ignore[assignment]
    return parser.format_help()


def _stages() -> list[str]:
    stage = STAGES["reward"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parse_command_line(stage.config_class(), ["--help"], program=f"python -m {stage.module}", description="")
    head = re.split(r"\nsettings \(", text.getvalue())[0]
    modules = ", ".join(f"`{each.module}`" for each in STAGES.values())
    return [f"## Stages\n\nEach stage is a module: {modules}. All take the same options:\n", _block(head)]


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"
