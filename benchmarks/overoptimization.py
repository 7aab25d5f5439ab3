"""Plot how gold and proxy reward go with the KL from the start, from the metrics of PPO runs.

    python benchmarks/overoptimization.py "OT margin=RUN,RUN" "Bradley-Terry=RUN,RUN" --output overoptimization.png

Every run is one of launch/recipes/ppo_overoptimization.yaml, whose second scorer is the gold reward. A point is a step:
the mean of its rollouts, with the 95 % interval of the gold one.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = (("score", "proxy reward (standardized)"), ("second", "gold reward"))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN,RUN", help="runs of one reward model, one for each seed")
    parser.add_argument("--output", type=Path, required=True, help="the picture")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    groups = {name: [read(Path(run)) for run in runs.split(",")] for name, runs in map(split, options.groups)}
    draw(groups, options.output)
    print("\n".join(table(groups)))


def split(text: str) -> tuple[str, str]:
    name, found, runs = text.partition("=")
    if not found:
        raise SystemExit(f"{text}: expected NAME=RUN,RUN")
    return name, runs


def read(run: Path) -> list[dict]:
    """Rows of the steps, with the standard error of the gold reward."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; expected the run folder of a PPO run")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "second" in row]
    if not rows:
        raise SystemExit(f"{path}: no second scorer; the recipe is launch/recipes/ppo_overoptimization.yaml")
    return [row | {"error": row["second_deviation"] / math.sqrt(row["rollouts"])} for row in rows]


def draw(groups: dict[str, list[list[dict]]], output: Path) -> None:
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 4), layout="constrained")
    for place, (name, runs) in enumerate(groups.items()):
        for seed, rows in enumerate(runs):
            kl = [row["kl"] for row in rows]
            style = {"color": f"C{place}", "linestyle": ("-", "--", ":")[seed % 3], "marker": ".", "alpha": 0.9}
            for axis, (key, _) in zip(axes, PANELS, strict=True):
                axis.plot(kl, [row[key] for row in rows], label=f"{name}, seed {seed}", **style)
            gold = [(row["second"] - 1.96 * row["error"], row["second"] + 1.96 * row["error"]) for row in rows]
            axes[-1].fill_between(kl, *zip(*gold, strict=True), color=f"C{place}", alpha=0.08, linewidth=0)
    for axis, (_, label) in zip(axes, PANELS, strict=True):
        axis.set_xlabel("KL from the start, nats per response")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def table(groups: dict[str, list[list[dict]]]) -> list[str]:
    lines = ["| reward model | seed | step | KL | proxy | gold | entropy |", "|---" * 7 + "|"]
    for name, runs in groups.items():
        for seed, rows in enumerate(runs):
            best = max(rows, key=lambda row: row["second"])
            for row in (rows[0], best, rows[-1]):
                gold = f"{row['second']:.2f} +- {1.96 * row['error']:.2f}"
                numbers = f"{row['kl']:.1f}", f"{row['score']:.2f}", gold, f"{row['entropy']:.2f}"
                lines.append("| " + " | ".join([name, str(seed), str(row["step"]), *numbers]) + " |")
    return lines


if __name__ == "__main__":
    main()
