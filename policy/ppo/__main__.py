"""``python -m policy.ppo``, or the same under deepspeed, torchrun or srun."""

import sys
from typing import TYPE_CHECKING, Any

from policy.ppo.config import PpoConfig
from rlhf.train.command import stage_main

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Train a policy by PPO (or RLOO, GRPO, REINFORCE++) against a margin reward model or a Python function."


def main(argv: list[str] | None = None) -> int:
    def run(config: PpoConfig, ranks: "Ranks") -> Any:
        from policy.ppo.stage import run

        return run(config, ranks)

    return stage_main(PpoConfig, run, argv, program="policy.ppo", description=DESCRIPTION)


if __name__ == "__main__":
    sys.exit(main())
