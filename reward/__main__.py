"""``python -m reward``, or the same under deepspeed, torchrun or srun."""

import sys
from typing import TYPE_CHECKING, Any

from reward.config import RewardConfig
from rlhf.train.command import stage_main

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Train a reward model on preference pairs, with adaptive optimal-transport margins."


def main(argv: list[str] | None = None) -> int:
    def run(config: RewardConfig, ranks: "Ranks") -> Any:
        from reward.stage import run

        return run(config, ranks)

    return stage_main(RewardConfig, run, argv, program="reward", description=DESCRIPTION)


if __name__ == "__main__":
    sys.exit(main())
