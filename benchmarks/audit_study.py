"""How well ``rlhf data audit`` finds labels that were swapped on purpose, and how many it says there are.

    python benchmarks/audit_study.py --model MODEL --data PAIRS

Labels of a share of the pairs are swapped at random, and the audit is asked without being told, with other swaps for
every seed. One line a share: the mean of what it estimates and its standard deviation over seeds, how often it is
within 3 points, how often its interval holds what was planted, the area under the curve of its ranking, and how many
of the most suspect pairs (as many as were swapped) are among the swapped ones. Given labels count as right, which
they are not all. With --output the margins of every planting are kept in that folder: started again, only missing ones
are made.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy import stats

from reward.audit.estimate import Audited, OutOfFold, from_margins, judged
from reward.audit.margins import Differences
from reward.audit.run import AuditOptions, read_features
from rlhf.core.files import digest, write_array
from rlhf.data.options import ColumnConfig


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the backbone")
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3], help="swapped on purpose")
    parser.add_argument("--seeds", type=int, default=40, help="swaps and folds, for each share")
    parser.add_argument("--layer", type=int, help="as of the audit")
    parser.add_argument("--unseen", choices=("pairs", "prompts"), default="pairs", help="as of the audit")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--cache", type=Path, help="folder for features (default: that of the audit)")
    parser.add_argument("--output", type=Path, help="folder that keeps the margins of plantings, for this code only")
    parser.add_argument("--part", type=float, default=1.0, help="share of the pairs that is audited, drawn by seed")
    return parser


@dataclass(frozen=True)
class Outcome:
    """One audit beside what is so."""

    share: float
    held: bool
    area: float
    found: float


def planted(pairs: OutOfFold, share: float, part: float, seed: int) -> OutOfFold:
    """A share of the pairs, of whose labels a share is swapped."""
    draw = np.random.default_rng(seed)
    kept = np.sort(draw.permutation(len(pairs.prompts))[: round(part * len(pairs.prompts))])
    labels = np.ones(len(kept))
    labels[draw.permutation(len(kept))[: round(share * len(kept))]] = -1
    answers = pairs.differences.answers
    values = Differences(pairs.differences.values[kept], None if answers is None else answers[kept])
    return replace(
        pairs, differences=values, prompts=pairs.prompts[kept], groups=pairs.groups[kept], labels=labels, seed=seed
    )


def audit_of(pairs: OutOfFold, repeats: int, kept: Path | None) -> Audited:
    """What an audit says of pairs; their margins are read from the file ``kept``, or left there."""
    if kept is not None and kept.is_file():
        margins, spread = np.load(kept)
    else:
        margins, spread, _ = judged(pairs, repeats=repeats)
        if kept is not None:
            write_array(kept, np.stack([margins, spread]))
    return from_margins(margins, spread, pairs.prompts, pairs.seed)


def outcome(found: Audited, labels: NDArray[np.float64], share: float) -> Outcome:
    """What an audit of labels of which ``share`` are swapped was worth."""
    wrong, interval = labels < 0, found.interval
    held = interval.low <= share <= interval.high
    if not wrong.any():
        return Outcome(interval.share, held, np.nan, np.nan)
    area = stats.mannwhitneyu(-found.margins[wrong], -found.margins[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
    first = np.argsort(found.margins)[: wrong.sum()]
    return Outcome(interval.share, held, float(area), float(wrong[first].mean()))


def line(share: float, outcomes: list[Outcome]) -> str:
    """A row of the table."""
    shares = np.array([each.share for each in outcomes])
    within = np.mean(np.abs(shares - share) <= 0.03)
    area, found = (np.mean([getattr(each, name) for each in outcomes]) for name in ("area", "found"))
    ranked = f"{area:.3f} | {found:.0%}" if share else " | "
    held = np.mean([each.held for each in outcomes])
    mean, deviation, highest = 100 * shares.mean(), 100 * shares.std(ddof=1), 100 * shares.max()
    return (
        f"| {100 * share:.0f} | {mean:.1f} | {deviation:.1f} | {highest:.1f} | {within:.0%} | {held:.0%} | {ranked} |"
    )


def main() -> None:
    options = build_parser().parse_args()
    audit = AuditOptions(
        data=options.data,
        model=options.model,
        output=Path(),
        columns=ColumnConfig(),
        layer=options.layer,
        unseen=options.unseen,
        dtype=options.dtype,
        cache_dir=options.cache,
    )
    pairs = read_features(audit)
    answers = pairs.differences.answers
    shared = b"" if answers is None else answers.tobytes()
    fingerprint = digest(pairs.differences.values.tobytes(), pairs.groups.tobytes(), shared)
    began = time.process_time()
    print(f"{len(pairs.prompts)} pairs of {len(np.unique(pairs.prompts))} prompts, {options.seeds} seeds")
    print(
        "| swapped, % | estimate, % | sd | highest | within 3 points | interval holds it | area under the curve "
        "| of the most suspect |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for share in options.shares:
        outcomes = []
        for seed in track(range(options.seeds), f"{share:.0%} swapped", console=Console(stderr=True)):
            asked = planted(pairs, share, options.part, seed)
            assert asked.labels is not None
            name = f"{share:g}_{options.part:g}_{options.repeats}_seed{seed}_{fingerprint}.npy"
            kept = None if options.output is None else options.output / name
            outcomes.append(outcome(audit_of(asked, options.repeats, kept), asked.labels, share))
        print(line(share, outcomes), flush=True)
    print(f"{time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
