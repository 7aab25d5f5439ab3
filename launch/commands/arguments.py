"""How the commands of ``rlhf`` are declared: their parsers, and arguments that several of them take."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from launch.stages import training
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path, recipe_path

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
SEVERAL = "a recipe of the stage; may be given again, later ones win"


class SettingsParser(argparse.ArgumentParser):
    """Takes settings (``overrides``), if it has such, before, between and after options, as the stages do."""

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, rest = super().parse_known_args(args, namespace)
        if not hasattr(options, "overrides"):
            return options, rest
        options.overrides = [*options.overrides, *(part for part in rest if not part.startswith("-"))]
        return options, [part for part in rest if part.startswith("-")]


def command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int], *, help: str, description: str = ""
) -> argparse.ArgumentParser:
    """A command that calls ``run``; its description is shown with the line breaks that it has."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def group(subparsers: Subparsers, name: str, *, help: str, of: str = "action") -> Subparsers:
    """A command that is made of commands, which take settings; the chosen one is the option ``of``."""
    parser = subparsers.add_parser(name, help=help)
    return parser.add_subparsers(title=f"{of}s", dest=of, required=True, parser_class=SettingsParser)


def add_recipes(parser: argparse.ArgumentParser, help: str = SEVERAL, *, required: bool = True) -> None:
    own: dict[str, Any] = {"required": True} if required else {"default": []}
    parser.add_argument("--config", metavar="RECIPE", type=recipe_path, action="append", help=help, **own)


def add_settings(
    parser: argparse.ArgumentParser, help: str = "settings; they win over recipes", metavar: str = "key=value"
) -> None:
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=help)


def add_stage(parser: argparse.ArgumentParser) -> None:
    which = "the stage of the recipe (default: the one that takes it)"
    parser.add_argument("--stage", choices=[*training()], help=which)


SAMPLING = ("samples", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
"""The options of :func:`add_sampling`."""


def add_sampling(parser: argparse.ArgumentParser, *, samples: int, max_new_tokens: int) -> None:
    """Add how responses are drawn. Unset options are ``None``; the defaults that are shown are those of the config."""
    parser.add_argument("--samples", type=positive_int, help=f"responses to a prompt (default {samples})")
    parser.add_argument("--max-new-tokens", type=positive_int, help=f"(default {max_new_tokens})")
    parser.add_argument("--temperature", type=float, help="(default 1)")
    parser.add_argument("--top-p", type=float, help="(default 1)")
    likeliest = "draw from so many likeliest tokens; 1 is greedy, 0 for all (default 0)"
    parser.add_argument("--top-k", type=int, help=likeliest)
    penalty = "makes tokens that were there before less likely (default 1: none)"
    parser.add_argument("--repetition-penalty", type=float, help=penalty)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends a response; may be repeated")
    parser.add_argument("--seed", type=int, help="(default 0)")


def add_model_config(parser: argparse.ArgumentParser) -> None:
    shape = "a config.json or a known name, for models that are not on disk"
    parser.add_argument("--model-config", metavar="SHAPE", help=shape)


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=positive_int, help="processes here (default: all GPUs, or 2 on a CPU)")
    parser.add_argument("--hostfile", type=home_path, help="machines to use over ssh, one 'HOST slots=N' a line")


def add_parallel(parser: argparse.ArgumentParser) -> None:
    several = "stages at a time: auto (as many as have devices of their own; without a GPU, one), or N at the most"
    parser.add_argument("--parallel", type=_count_or_auto, default=None, metavar="auto|N", help=several)


def _count_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected auto or a whole number above 0")
    return int(text)


def add_columns(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """``--NAME-column`` for each; :func:`given_columns` reads them."""
    for name in names:
        meaning = f"as data.columns.{name} in a recipe"
        parser.add_argument(f"--{name.replace('_', '-')}-column", metavar="NAME", help=meaning)


def given_columns(options: argparse.Namespace, names: Iterable[str]) -> dict[str, str]:
    columns = {name: getattr(options, f"{name}_column") for name in names}
    return {name: column for name, column in columns.items() if column is not None}


def chosen(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What the options called ``names`` were given."""
    return {name: getattr(options, name) for name in names}


def named(option: str, text: str, what: str) -> tuple[str, str]:
    """The parts of ``NAME=what``.

    Raises:
        UserError: if there is only one.
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise UserError(f"{option} {text}: expected NAME={what}, such as {option} dpo=runs/dpo")
    return name, value


def positive_int(text: str) -> int:
    """A whole number above 0; anything else is the parser's error."""
    return above_zero(int(text))


def positive(text: str) -> float:
    return above_zero(float(text))


def above_zero(value: Any) -> Any:
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value}: expected a number above 0")
    return value


def share(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share, above 0 and up to 1")
    return value
