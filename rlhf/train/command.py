"""The command of a stage that trains. It reads the recipe before it imports torch."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from rlhf.config import parse_command_line, to_yaml
from rlhf.core.clock import process_started
from rlhf.core.errors import OutOfMemory, RunStopped, Unmet, UserError
from rlhf.core.files import naming_disk_faults
from rlhf.core.importing import import_all_of
from rlhf.train.done import Completion, config_digest, read_completion, write_completion
from rlhf.train.output import print_to, this_rank
from rlhf.train.recipe import StageConfig
from rlhf.train.status import recording, report_phase

ConfigT = TypeVar("ConfigT", bound=StageConfig)


def stage_main(
    config_class: type[ConfigT],
    module: str,
    argv: Sequence[str] | None,
    *,
    program: str,
    description: str,
) -> int:
    """The command of a stage: read the recipe, join the other ranks, run; the exit code.

    Args:
        config_class: the stage's recipe.
        module: the stage, whose ``run(config, ranks)`` is called on every rank. It is not imported before: torch and
            its company take seconds, and a faulty recipe is refused, or shown, without them.
        argv: arguments; ``None`` for those of the process.
        program: name in messages.
        description: one line of help.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of its retries; the error itself is raised
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's calls
    stopped = False
    try:
        invocation = parse_command_line(
            config_class, sys.argv[1:] if argv is None else argv, program=program, description=description
        )
        if invocation.dry_run:
            print(to_yaml(invocation.config), end="")
            return 0
        print_to(invocation.log_folder)
        with recording(invocation.config.output, program.rpartition(".")[2]):
            _run_on_all_ranks(invocation.config, module, program)
        return 0
    except UserError as error:
        # Ranks that have met agree before one raises, so the first one knows of every fault: it speaks for all.
        if this_rank() == "0" or isinstance(error, Unmet | OutOfMemory):
            print(error, file=sys.stderr, flush=True)
        stopped = isinstance(error, RunStopped)
        return error.exit_code
    except BrokenPipeError:  # "| head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{program}: stopped, for nobody reads its output any more (a closed pipe)", file=sys.stderr, flush=True)
        return 1
    finally:
        if "rlhf.engine.ranks" in sys.modules:
            from rlhf.engine.ranks import stop_ranks

            stop_ranks(together=stopped)  # the deepspeed launcher kills those that are left when one has ended


def _run_on_all_ranks(config: StageConfig, module: str, program: str) -> None:
    import_all_of("rlhf.engine.build")
    from rlhf.engine.build import check_precision
    from rlhf.engine.ranks import start_ranks
    from rlhf.engine.stop import noting_signals
    from rlhf.train.environment import write_environment
    from rlhf.train.fresh import end_fresh_process
    from rlhf.train.heartbeat import heart_beating
    from rlhf.train.shortage import naming_shortage
    from rlhf.train.trackers import check_trackers

    try:
        report_phase("waiting for all ranks")
        ranks = start_ranks(
            timeout_seconds=config.engine.timeout_minutes * 60,
            rendezvous_seconds=config.engine.rendezvous_minutes * 60,
        )
        report_phase("loading")
        write_environment(config.output, ranks)
        ranks.together(lambda: check_precision(config.engine, ranks.device))
        ranks.together(lambda: check_trackers(config.train))
        shortage = naming_shortage(config, program.rpartition(".")[2], ranks)
        with shortage, noting_signals(), naming_disk_faults(config.output), heart_beating(ranks):
            import_all_of(module).run(config, ranks)
            if config.train.resume != "publish":  # the run itself may have to go on
                ranks.on_main(lambda: _mark_finished(config, program))
    finally:
        end_fresh_process()


def _mark_finished(config: StageConfig, program: str) -> None:
    """A finished run that was only looked at again keeps the marker that it has."""
    from rlhf.engine.checkpoint import checkpoint_folder, saved_steps

    completion = Completion(
        stage=program.rpartition(".")[2],
        config=config_digest(config),
        step=max(saved_steps(checkpoint_folder(config.output)), default=0),
        seconds=round(time.time() - process_started(), 1),
    )
    before = read_completion(config.output)
    if before is None or replace(before, seconds=completion.seconds) != completion:
        write_completion(config.output, completion)
