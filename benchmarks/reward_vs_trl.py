"""Reward models side by side with TRL's RewardTrainer: pairs per second, peak memory, whether both compute the same.

Plain Bradley-Terry on both sides, as TRL has no margins of optimal transport; what these add is seen in the contender
that has them. Every contender trains the same slice of a real model under the same head on the same pairs in the same
order, each in a process of its own, one after the other. Give them an idle machine.

    python benchmarks/reward_vs_trl.py --model models/SmolLM2-135M-Instruct --data PAIRS.jsonl.gz
"""

import argparse
import sys

from pairs_vs_trl import Comparison, compare, parser_of

OURS = {"side": "ours", "gradient_checkpointing": False, "micro_batch_tokens": 2048}
TRL = {"side": "trl", "gradient_checkpointing": False}
COMPARISON = Comparison(
    stage="reward",
    contenders={
        "TRL, 1 pair at once, no checkpointing": TRL | {"pairs_at_once": 1},
        "ours, 2048 tokens": OURS,
        "TRL": TRL | {"gradient_checkpointing": True},
        "ours, 8192 tokens": OURS | {"micro_batch_tokens": 8192},
        "TRL, 2 pairs at once, no checkpointing": TRL | {"pairs_at_once": 2},
        "ours, 2048 tokens, checkpointing": OURS | {"gradient_checkpointing": True},
        "TRL, no checkpointing": TRL,
        "ours, 2048 tokens, OT margin": OURS | {"margin": "ot"},
    },
    extra={
        "ours, 4096 tokens": OURS | {"micro_batch_tokens": 4096},
        "ours, 1024 tokens": OURS | {"micro_batch_tokens": 1024},
    },
    settings={"learning_rate": 1e-5},
    tolerance={"loss": 1e-4, "gap": 1e-3, "mean": 1e-3},
    goal_speed=2.2,
)


def build_parser() -> argparse.ArgumentParser:
    return parser_of(COMPARISON, __doc__)


if __name__ == "__main__":
    sys.exit(compare(COMPARISON, build_parser()))
