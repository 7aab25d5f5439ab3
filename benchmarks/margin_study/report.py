"""Step 3 of the margin study: tables and a plot from study.json. study.py calls it; it also runs alone.

python benchmarks/margin_study/report.py --study study/study.json --output study/
"""

import argparse
import json
import pathlib

import matplotlib
import numpy as np
from scipy import stats

from rlhf.core.files import write_text
from rlhf.core.pictures import write_figure

matplotlib.use("Agg")
from matplotlib import pyplot

BASELINE = "Bradley-Terry"
SPLITS = ("id_test", "ood_test")
RESAMPLES = 10_000
COLORS = {
    "Bradley-Terry": "black",
    "constant margin": "#E69F00",
    "column margin": "#56B4E9",
    "label smoothing": "#009E73",
    "OT abs, raw": "#D55E00",
    "OT abs, centered": "#CC79A7",
    "OT signed, centered": "#0072B2",
}

Runs = dict[tuple[float, str], list[dict]]


def grouped(result: dict) -> Runs:
    """Runs by share of flipped labels and method, in order of their seeds."""
    groups: Runs = {}
    for record in sorted(result["runs"], key=lambda record: record["run"]["seed"]):
        groups.setdefault((record["run"]["flipped"], record["run"]["method"]), []).append(record)
    return {(row["flipped"], row["method"]): groups[row["flipped"], row["method"]] for row in result["settings"]}


def final_accuracy(record: dict, split: str) -> float:
    return record["curve"][split][-1]


def accuracy_at_validation_peak(record: dict, split: str) -> float:
    """Test accuracy where validation accuracy was first at its best: that of the best checkpoint."""
    return record["curve"][split][int(np.argmax(record["curve"]["validation"]))]


def steps_to_95_percent(record: dict, split: str) -> float:
    """First evaluated step with at least 95 % of this run's own final accuracy."""
    curve = np.array(record["curve"][split])
    return float(record["curve"]["step"][int(np.argmax(curve >= 0.95 * curve[-1]))])


def mean_curve(records: list[dict], split: str) -> tuple[list[int], np.ndarray]:
    """Mean over seeds at the steps that all runs evaluated; tenths differ in size, so runs do in length."""
    curves = [dict(zip(record["curve"]["step"], record["curve"][split], strict=True)) for record in records]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves]).mean(0)


def over_seeds(records: list[dict], measure, split: str) -> np.ndarray:
    return np.array([measure(record, split) for record in records])


def mean_and_half_width(values: np.ndarray) -> tuple[float, float]:
    """Mean and half of its 95 % t interval over seeds."""
    spread = values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * spread)


def prompt_interval(records: list[dict], baseline: list[dict], split: str, prompts: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference to the baseline when both seeds and test prompts are drawn anew.

    Two-way bootstrap: seeds are resampled, and whole prompts with all their pairs.
    """

    def marks(group: list[dict]) -> np.ndarray:
        return np.array([[int(mark) for mark in record["right"][split]] for record in group]) / 2

    difference = marks(records) - marks(baseline)
    by_prompt = np.stack([difference[:, prompts == prompt].sum(1) for prompt in np.unique(prompts)], axis=1)
    sizes = np.unique(prompts, return_counts=True)[1]
    seeds, count = by_prompt.shape
    draw = np.random.default_rng(0)
    seed_weights = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    prompt_weights = draw.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    totals = ((seed_weights @ by_prompt) * prompt_weights).sum(1)
    low, high = np.quantile(totals / seeds / (prompt_weights @ sizes), [0.025, 0.975])
    return float(low), float(high)


def accuracy_table(groups: Runs, result: dict, flipped: float) -> str:
    lines = [
        "| method | number | final, ID | final, OOD | at validation peak, ID | at validation peak, OOD "
        "| steps to 95 %, ID | steps to 95 %, OOD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["settings"]:
        if row["flipped"] != flipped:
            continue
        records = groups[flipped, row["method"]]
        cells = [row["method"], "" if row["method"] == BASELINE else f"{row['setting']:g}"]
        for measure in (final_accuracy, accuracy_at_validation_peak):
            for split in SPLITS:
                mean, half = mean_and_half_width(100 * over_seeds(records, measure, split))
                cells.append(f"{mean:.1f} ± {half:.1f}")
        for split in SPLITS:
            mean, half = mean_and_half_width(over_seeds(records, steps_to_95_percent, split))
            cells.append(f"{mean:.0f} ± {half:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def difference_table(groups: Runs, result: dict, measure, *, scale: float = 100, prompts: bool = False) -> str:
    """What each method measures more (+) or less (-) than Bradley-Terry under the same seeds, times ``scale``.

    The interval is the t interval over seeds or, with ``prompts``, that of :func:`prompt_interval`, which is
    about final accuracy. A star marks those without 0.
    """
    shares = sorted({flipped for flipped, _ in groups})
    columns = [(flipped, split) for flipped in shares for split in SPLITS]
    titles = [f"{_short(split)}, {flipped:.0%} flipped" for flipped, split in columns]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(name for _, name in groups if name != BASELINE):
        cells = [name]
        for flipped, split in columns:
            ours, theirs = groups[flipped, name], groups[flipped, BASELINE]
            mean, half = mean_and_half_width(over_seeds(ours, measure, split) - over_seeds(theirs, measure, split))
            low, high = mean - half, mean + half
            if prompts:
                low, high = prompt_interval(ours, theirs, split, np.array(result["prompts"][split]))
            cells.append(_interval(scale * mean, scale * low, scale * high))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" + ("" if low <= 0 <= high else " *")


def tuning_table(result: dict) -> str:
    """Mean validation accuracy of every candidate of phase 2."""
    lines = ["| method | labels flipped | candidate: validation accuracy, % |", "|---|---|---|"]
    for row in result["settings"]:
        tried = ", ".join(
            f"**{setting:g}: {100 * accuracy:.1f}**"
            if setting == row["setting"]
            else f"{setting:g}: {100 * accuracy:.1f}"
            for setting, accuracy in row["tried"]
        )
        lines.append(f"| {row['method']} | {row['flipped']:.0%} | {tried} |")
    return "\n".join(lines) + "\n"


def shared_table(result: dict) -> str:
    """Mean validation accuracy of every layer and learning rate of phase 1."""
    lines = ["| layer | learning rate | validation accuracy, % |", "|---|---|---|"]
    for layer, rate, accuracy in result["shared"]["tried"]:
        lines.append(f"| {layer} | {rate:g} | {100 * accuracy:.1f} |")
    return "\n".join(lines) + "\n"


def tables(result: dict) -> str:
    groups = grouped(result)
    seeds = len(next(iter(groups.values())))
    parts = []
    for flipped in sorted({flipped for flipped, _ in groups}):
        parts.append(f"Accuracy in %, mean ± 95 % t interval over {seeds} seeds, {flipped:.0%} of labels flipped:\n")
        parts.append(accuracy_table(groups, result, flipped))
    parts.append("Final accuracy minus that of Bradley-Terry, points, 95 % t interval over seeds (paired):\n")
    parts.append(difference_table(groups, result, final_accuracy))
    parts.append("The same at the validation peak:\n")
    parts.append(difference_table(groups, result, accuracy_at_validation_peak))
    parts.append("Final accuracy again, 95 % bootstrap interval over seeds and test prompts:\n")
    parts.append(difference_table(groups, result, final_accuracy, prompts=True))
    parts.append("Steps to 95 % of the run's own final accuracy, minus those of Bradley-Terry (paired):\n")
    parts.append(difference_table(groups, result, steps_to_95_percent, scale=1))
    parts.append("Phase 2, candidates:\n")
    parts.append(tuning_table(result))
    shared = result["shared"]
    parts.append(f"Phase 1: layer {shared['layer']}, learning rate {shared['learning_rate']:g} of\n")
    parts.append(shared_table(result))
    return "\n".join(parts)


def plot(result: dict, target: pathlib.Path) -> None:
    """Plot accuracy along the run, and below it the final difference to Bradley-Terry with its interval over seeds."""
    groups = grouped(result)
    shares = sorted({flipped for flipped, _ in groups})
    figure, axes = pyplot.subplots(2, len(shares), figsize=(11, 8), sharex="row", sharey="row", constrained_layout=True)
    for flipped, curves, dots in zip(shares, axes[0], axes[1], strict=True):
        _plot_curves(curves, groups, flipped)
        _plot_differences(dots, groups, flipped)
    axes[0][0].set_ylabel("out-of-distribution accuracy, %")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    axes[1][0].legend(fontsize=8, loc="best")
    write_figure(target, figure, dpi=110)
    pyplot.close(figure)


def _plot_curves(axis, groups: Runs, flipped: float) -> None:
    for (share, name), records in groups.items():
        if share != flipped:
            continue
        steps, curve = mean_curve(records, "ood_test")
        width = 2.2 if name == BASELINE else 1.2
        axis.plot(steps, 100 * curve, color=COLORS[name], lw=width, label=name)
    axis.set_title(f"{flipped:.0%} of training labels flipped")
    axis.set_xlabel("step (64 pairs each)")
    axis.grid(alpha=0.3)


def _plot_differences(axis, groups: Runs, flipped: float) -> None:
    names = [name for share, name in groups if share == flipped and name != BASELINE]
    for split, marker, shift in (("id_test", "o", -0.15), ("ood_test", "s", 0.15)):
        for place, name in enumerate(names):
            ours = over_seeds(groups[flipped, name], final_accuracy, split)
            theirs = over_seeds(groups[flipped, BASELINE], final_accuracy, split)
            mean, half = mean_and_half_width(100 * (ours - theirs))
            filled = COLORS[name] if split == "ood_test" else "white"
            axis.errorbar(mean, place + shift, xerr=half, fmt=marker, color=COLORS[name], mfc=filled, capsize=3)
        axis.errorbar(
            [],
            [],
            fmt=marker,
            color="gray",
            mfc="white" if split == "id_test" else "gray",
            label=_long(split),
        )
    axis.axvline(0, color="black", lw=1)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("final accuracy minus Bradley-Terry, points")
    axis.grid(alpha=0.3, axis="x")


def _short(split: str) -> str:
    return {"id_test": "ID", "ood_test": "OOD"}[split]


def _long(split: str) -> str:
    return {"id_test": "in distribution", "ood_test": "out of distribution"}[split]


def write_report(result: dict, output: pathlib.Path) -> None:
    write_text(output / "tables.md", tables(result))
    plot(result, output / "margin_study.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, type=pathlib.Path, help="study.json of study.py")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for tables.md and margin_study.png")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    write_report(json.loads(options.study.read_text(encoding="utf-8")), options.output)


if __name__ == "__main__":
    main()
