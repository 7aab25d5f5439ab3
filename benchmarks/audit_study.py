"""How well ``rlhf data audit`` finds labels that were swapped on purpose, and how many it says there are.

    python benchmarks/audit_study.py --model MODEL --data PAIRS

Labels of a share of the pairs are swapped at random, and the audit is asked without being told. One line a seed: the
share that it estimates with its interval, the area under the curve of its ranking, and how many of the most suspect
pairs (as many as were swapped) are among the swapped ones. Given labels count as right, which they are not all.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from reward.audit.estimate import Audited, OutOfFold, audited
from reward.audit.run import AuditOptions, read_features
from rlhf.data.options import ColumnConfig


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the backbone")
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3], help="swapped on purpose")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layer", type=int, help="as of the audit")
    parser.add_argument("--head", choices=("linear", "mlp"), default="linear")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--cache", type=Path, help="folder for features (default: that of the audit)")
    return parser


def swapped(pairs: OutOfFold, share: float, seed: int) -> tuple[OutOfFold, NDArray[np.bool_]]:
    """The pairs with a random share of the labels swapped, and which these are."""
    count = len(pairs.prompts)
    wrong = np.zeros(count, bool)
    wrong[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    places = torch.from_numpy(wrong)[:, None]
    chosen = torch.where(places, pairs.rejected, pairs.chosen)
    rejected = torch.where(places, pairs.chosen, pairs.rejected)
    return replace(pairs, chosen=chosen, rejected=rejected, seed=seed), wrong


def line(found: Audited, wrong: NDArray[np.bool_], seconds: float) -> str:
    """What the audit says beside what is so."""
    interval = found.interval
    text = f"{100 * interval.share:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    if not wrong.any():
        return f"{text} | | | {seconds:.0f}"
    ranks = stats.mannwhitneyu(-found.margins[wrong], -found.margins[~wrong]).statistic
    area = ranks / (wrong.sum() * (~wrong).sum())
    first = np.argsort(found.margins)[: wrong.sum()]
    return f"{text} | {area:.3f} | {wrong[first].mean():.0%} | {seconds:.0f}"


def main() -> None:
    options = build_parser().parse_args()
    audit = AuditOptions(
        data=options.data,
        model=options.model,
        output=Path(),
        columns=ColumnConfig(),
        layer=options.layer,
        dtype=options.dtype,
        cache_dir=options.cache,
    )
    pairs = read_features(audit)
    print(f"{len(pairs.prompts)} pairs of {len(np.unique(pairs.prompts))} prompts")
    print("| swapped, % | seed | estimate, % (95 %) | area under the curve | of the most suspect | s |")
    print("|---|---|---|---|---|---|")
    for share in options.shares:
        for seed in range(options.seeds):
            planted, wrong = swapped(pairs, share, seed)
            began = time.perf_counter()
            found = audited(planted, options.head, repeats=options.repeats)
            told = line(found, wrong, time.perf_counter() - began)
            print(f"| {100 * share:.0f} | {seed} | {told} |", flush=True)


if __name__ == "__main__":
    main()
