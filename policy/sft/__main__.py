"""``python -m policy.sft``, or the same under deepspeed, torchrun or srun."""

import sys
from typing import TYPE_CHECKING, Any

from policy.sft.config import SftConfig
from rlhf.train.command import stage_main

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Train a policy on conversations: the likelihood of their assistant turns."


def main(argv: list[str] | None = None) -> int:
    def run(config: SftConfig, ranks: "Ranks") -> Any:
        from policy.sft.stage import run

        return run(config, ranks)

    return stage_main(SftConfig, run, argv, program="policy.sft", description=DESCRIPTION)


if __name__ == "__main__":
    sys.exit(main())
