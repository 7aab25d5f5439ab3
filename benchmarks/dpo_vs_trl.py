"""Sigmoid DPO side by side with TRL's DPOTrainer: pairs per second, peak memory, and whether both compute the same.

Every contender trains the same slice of a real model on the same pairs in the same order, each in a process of its
own, one after the other. Give them an idle machine.

    python benchmarks/dpo_vs_trl.py --model models/SmolLM2-135M-Instruct --data PAIRS.jsonl.gz
    python benchmarks/dpo_vs_trl.py --model models/SmolLM2-135M-Instruct --memory-case
"""

import argparse
import math
import sys

from pairs_vs_trl import Comparison, compare, parser_of

OURS = {"side": "ours", "gradient_checkpointing": False}
TRL = {"side": "trl", "precompute": False, "gradient_checkpointing": True}
COMPARISON = Comparison(
    stage="dpo",
    contenders={
        "TRL": TRL,
        "ours, 8192 tokens": OURS | {"micro_batch_tokens": 8192},
        "TRL, precomputed": TRL | {"precompute": True},
        "ours, 2048 tokens": OURS | {"micro_batch_tokens": 2048},
        "TRL, no checkpointing": TRL | {"gradient_checkpointing": False},
        "ours, 2048 tokens, checkpointing": OURS | {"micro_batch_tokens": 2048, "gradient_checkpointing": True},
        "TRL, precomputed, no checkpointing": TRL | {"precompute": True, "gradient_checkpointing": False},
    },
    extra={
        # Accumulated to a step: TRL's counterpart of our smaller token budgets. One pair at once pads least.
        "TRL, precomputed, 2 pairs at once": TRL | {"precompute": True, "pairs_at_once": 2},
        "TRL, precomputed, 1 pair at once, no checkpointing": TRL
        | {"precompute": True, "pairs_at_once": 1, "gradient_checkpointing": False},
        "ours, 1024 tokens": OURS | {"micro_batch_tokens": 1024},
        "ours, 1024 tokens, checkpointing": OURS | {"micro_batch_tokens": 1024, "gradient_checkpointing": True},
        "ours, 8192 tokens, checkpointing": OURS | {"micro_batch_tokens": 8192, "gradient_checkpointing": True},
    },
    settings={"beta": 0.1, "learning_rate": 1e-6},
    # Log-probabilities are summed over some hundred response tokens, mean over the step.
    tolerance={"loss": 1e-4, "gap": 1e-4, "chosen": 1e-2, "rejected": 1e-2},
    start_loss=math.log(2),
    goal_speed=2.5,
    goal_memory=1 / 3,
)


def build_parser() -> argparse.ArgumentParser:
    return parser_of(COMPARISON, __doc__)


if __name__ == "__main__":
    sys.exit(compare(COMPARISON, build_parser()))
