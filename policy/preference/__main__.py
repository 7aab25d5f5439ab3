"""``python -m policy.preference``, or the same under deepspeed, torchrun or srun."""

import sys
from typing import TYPE_CHECKING, Any

from policy.preference.config import PreferenceConfig
from rlhf.train.command import stage_main

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Train a policy on preferences: margin-based and other objectives of the DPO family."


def main(argv: list[str] | None = None) -> int:
    def run(config: PreferenceConfig, ranks: "Ranks") -> Any:
        from policy.preference.stage import run

        return run(config, ranks)

    return stage_main(PreferenceConfig, run, argv, program="policy.preference", description=DESCRIPTION)


if __name__ == "__main__":
    sys.exit(main())
