"""``python -m reward``, or the same under deepspeed, torchrun or srun."""

from reward.config import RewardConfig
from rlhf.core.leaving import leave
from rlhf.train.command import stage_main

DESCRIPTION = "Train a reward model on preference pairs, with adaptive optimal-transport margins."


def main(argv: list[str] | None = None) -> int:
    return stage_main(RewardConfig, "reward.stage", argv, program="reward", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
