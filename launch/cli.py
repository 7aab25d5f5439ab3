"""The ``rlhf`` command."""

import argparse
import logging
import sys
from collections.abc import Sequence

from launch.commands import (
    capsule,
    check,
    data,
    doctor,
    ds,
    evaluate,
    generate,
    import_gguf,
    init,
    pipeline,
    plan,
    prune,
    publish,
    report,
    reproduce,
    score,
    serve,
    slurm,
    study,
    sweep,
)
from launch.commands.arguments import SettingsParser
from rlhf.core.errors import UserError
from rlhf.core.files import NOT_PERMITTED, place_of

COMMANDS = (
    init,
    pipeline,
    plan,
    data,
    doctor,
    ds,
    evaluate,
    generate,
    import_gguf,
    prune,
    publish,
    report,
    reproduce,
    capsule,
    score,
    serve,
    check,
    slurm,
    study,
    sweep,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf",
        description="Tools around the training stages. A stage itself is a module: "
        "deepspeed --module reward --config RECIPE.yaml",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=SettingsParser)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        options = build_parser().parse_args(argv)
        return options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NOT_PERMITTED:
            raise
        print(f"{place_of(error)}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
