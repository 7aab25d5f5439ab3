"""The command of a stage that trains nothing."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rlhf.config import parse_command_line, to_yaml
from rlhf.core.clock import process_started
from rlhf.core.errors import UserError
from rlhf.core.files import naming_disk_faults
from rlhf.core.importing import import_all_of
from rlhf.train.done import Completion, config_digest, remove_completion, write_completion
from rlhf.train.output import print_to, this_rank
from rlhf.train.status import recording

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks


class WithOutput(Protocol):
    """What the recipe of any stage has."""

    @property
    def output(self) -> Path: ...


ConfigT = TypeVar("ConfigT", bound=WithOutput)


def single_main(
    config_class: type[ConfigT],
    run: Callable[[ConfigT], Any],
    argv: Sequence[str] | None,
    *,
    program: str,
    description: str,
) -> int:
    """The command of a stage that trains nothing: read the recipe, run, mark it done; the exit code.

    ``run`` is called in every process that a launcher has started. See :func:`rlhf.train.command.stage_main`.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        arguments = sys.argv[1:] if argv is None else argv
        invocation = parse_command_line(config_class, arguments, program=program, description=description)
        config = invocation.config
        if invocation.dry_run:
            print(to_yaml(config), end="")
            return 0
        print_to(invocation.log_folder)
        stage = program.rpartition(".")[2]
        with recording(config.output, stage):
            _run(run, config, stage)
        return 0
    except UserError as error:
        if this_rank() == "0":
            print(error, file=sys.stderr, flush=True)
        return error.exit_code


def on_all_ranks(module: str, config: ConfigT, act: Callable[[ConfigT, "Ranks"], None]) -> None:
    """Call ``act`` in the processes that a launcher has started, once ``module``, which it needs, is imported.

    The output folder knows the environment before that.
    """
    import_all_of(module)
    from rlhf.engine.ranks import start_ranks, stop_ranks
    from rlhf.train.environment import write_environment

    try:
        ranks = start_ranks()
        write_environment(config.output, ranks)
        act(config, ranks)
    finally:
        stop_ranks()


def _run(run: Callable[[ConfigT], Any], config: ConfigT, stage: str) -> None:
    is_main = this_rank() == "0"
    if is_main:
        remove_completion(config.output)
    with naming_disk_faults(config.output):
        run(config)
        done = Completion(
            stage=stage, config=config_digest(config), step=0, seconds=round(time.time() - process_started(), 1)
        )
        if is_main:
            write_completion(config.output, done)
