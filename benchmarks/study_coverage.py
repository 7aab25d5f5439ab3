"""How often the intervals of rlhf study hold the true difference, and how often they show one: by simulation.

    python benchmarks/study_coverage.py
"""

import argparse

import numpy as np

from launch.study.statistics import compare

REPETITIONS, DRAWS = 1000, 500
CASES = (
    # seeds, prompts, deviations of seeds, prompts and rest
    (3, 353, 0.01, 0.2, 0.3),
    (5, 1000, 0.01, 0.2, 0.3),
    (5, 100, 0.05, 0.0, 0.3),
    (2, 200, 0.02, 0.2, 0.3),
    (10, 60, 0.0, 0.5, 0.1),
    (1, 300, 0.0, 0.2, 0.3),
)
EFFECT = 0.03


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def main() -> None:
    build_parser().parse_args()
    print("| seeds | prompts | deviation of seeds | of prompts | of the rest | holds | shows 3 points |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for seeds, prompts, by_seed, by_prompt, rest in CASES:
        generator = np.random.default_rng(11)
        holds = shows = 0
        for number in range(REPETITIONS):
            values = generator.normal(0, by_seed, (seeds, 1)) + generator.normal(0, by_prompt, (1, prompts))
            values = values + generator.normal(0, rest, (seeds, prompts))
            found = compare(values, np.ones(prompts), seed=number, draws=DRAWS)
            holds += not found.is_decided
            shows += found.low + EFFECT > 0
        shares = " | ".join(f"{100 * count / REPETITIONS:.1f} %" for count in (holds, shows))
        print(f"| {seeds} | {prompts} | {by_seed} | {by_prompt} | {rest} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
