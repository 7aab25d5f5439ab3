"""Seconds of the host's own work around a step: plans of micro-batches, and the telemetry of repetition.

python benchmarks/planning.py
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from policy.ppo.telemetry import repetition
from rlhf.data import batching

ROWS, TOKENS, BUDGETS = 512, 1024, (16384, 65536, 131072)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def main() -> None:
    build_parser().parse_args()
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(4.0, TOKENS / 8, size=(ROWS // 2, 2)), 8, TOKENS).astype(int)
    for budget in BUDGETS:

        def plan(budget: int = budget) -> object:
            return batching.plan_micro_batches(lengths, token_budget=budget, ranks=1, length_buckets=4)

        print(f"plan of {ROWS} rows, {budget} tokens a micro-batch: {seconds(plan):.4f} s, again {seconds(plan):.5f} s")
    texts = [generator.integers(0, 150_000, 4096) for _ in range(1024)]
    print(f"repetition of 1024 x 4096 tokens: {seconds(lambda: [repetition(text) for text in texts]):.2f} s")


if __name__ == "__main__":
    main()
