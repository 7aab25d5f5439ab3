"""``python -m reward``, or the same under deepspeed, torchrun or srun."""

import logging
import os
import sys
import warnings

from reward.config import RewardConfig
from rlhf.config import parse_command_line, to_yaml
from rlhf.core.errors import UserError

DESCRIPTION = "Train a reward model on preference pairs, with adaptive optimal-transport margins."


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of its retries; the error itself is raised
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's calls
    try:
        invocation = parse_command_line(
            RewardConfig, sys.argv[1:] if argv is None else argv, program="reward", description=DESCRIPTION
        )
        if invocation.dry_run:
            print(to_yaml(invocation.config), end="")
            return 0
        return _run(invocation.config)
    except UserError as error:
        # Ranks agree before one raises, so the first one knows of every fault: it speaks for all.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(error, file=sys.stderr, flush=True)
        return 2


def _run(config: RewardConfig) -> int:
    from rlhf.engine.ranks import start_ranks, stop_ranks

    try:
        ranks = start_ranks(timeout_seconds=config.engine.timeout_minutes * 60)
        from reward.stage import run

        run(config, ranks)
        return 0
    finally:
        stop_ranks()


if __name__ == "__main__":
    sys.exit(main())
