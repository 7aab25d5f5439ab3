"""``python -m policy.sft``, or the same under deepspeed, torchrun or srun."""

from policy.sft.config import SftConfig
from rlhf.core.leaving import leave
from rlhf.train.command import stage_main

DESCRIPTION = "Train a policy on conversations: the likelihood of their assistant turns."


def main(argv: list[str] | None = None) -> int:
    return stage_main(SftConfig, "policy.sft.stage", argv, program="policy.sft", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
