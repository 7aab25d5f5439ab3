"""``python -m policy.ppo``, or the same under deepspeed, torchrun or srun."""

from policy.ppo.config import PpoConfig
from rlhf.core.leaving import leave
from rlhf.train.command import stage_main

DESCRIPTION = "Train a policy by PPO (or RLOO, GRPO, REINFORCE++) against a margin reward model or a Python function."


def main(argv: list[str] | None = None) -> int:
    return stage_main(PpoConfig, "policy.ppo.stage", argv, program="policy.ppo", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
