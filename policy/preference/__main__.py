"""``python -m policy.preference``, or the same under deepspeed, torchrun or srun."""

from policy.preference.config import PreferenceConfig
from rlhf.core.leaving import leave
from rlhf.train.command import stage_main

DESCRIPTION = "Train a policy on preferences: margin-based and other objectives of the DPO family."


def main(argv: list[str] | None = None) -> int:
    return stage_main(
        PreferenceConfig, "policy.preference.stage", argv, program="policy.preference", description=DESCRIPTION
    )


if __name__ == "__main__":
    leave(main())
