"""The pictures of the concepts, drawn from what the code computes.

python docs/site/pictures.py     # writes docs/images/*.svg
"""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from reward.margins import optimal_transport_margins
from rlhf.data.batching import plan_micro_batches

FOLDER = Path(__file__).resolve().parents[1] / "images"
TEAL, ORANGE, BLUE, GRAY, INK = "#00897b", "#e65100", "#3949ab", "#b0bec5", "#263238"


def margin() -> Figure:
    """Six pairs: rewards, the transport plan over all of them, and the margin that each gets."""
    chosen = torch.tensor([2.4, 1.9, 1.4, 1.1, 0.6, 0.2])
    rejected = torch.tensor([-0.8, 0.3, -0.4, 0.9, 0.5, 0.7])
    embeddings = torch.nn.functional.normalize(torch.randn(12, 16, generator=torch.Generator().manual_seed(3)))
    found = optimal_transport_margins(embeddings[:6], embeddings[6:], chosen, rejected)
    figure, (rewards, plan, bars) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    places = np.arange(6)
    rewards.vlines(places, rejected, chosen, color=GRAY, linewidth=3)
    rewards.plot(places, chosen, "o", color=TEAL, label="chosen", markersize=8)
    rewards.plot(places, rejected, "o", color=ORANGE, label="rejected", markersize=8)
    rewards.set(title="rewards of six pairs", xlabel="pair", xticks=places, xticklabels=places + 1)
    rewards.legend(frameon=False)
    plan.imshow(found.plan, cmap="BuGn")
    plan.set(title="transport plan", xlabel="rejected", ylabel="chosen")
    plan.set(xticks=places, yticks=places, xticklabels=places + 1, yticklabels=places + 1)
    bars.bar(places, found.reward_terms, color=TEAL, label="from rewards")
    bars.bar(places, found.semantic_terms, bottom=found.reward_terms, color=BLUE, label="from meaning")
    bars.set(title="margin of each pair", xlabel="pair", xticks=places, xticklabels=places + 1)
    bars.set_ylim(top=1.35 * float(found.margins.max()))
    bars.legend(frameon=False, ncols=2)
    return figure


def zero() -> Figure:
    """What four ranks hold of a model in bfloat16, in bytes a parameter."""
    parts = {"weights": (2, BLUE), "gradients": (2, ORANGE), "master weights and moments": (12, TEAL)}
    split = {"ZeRO-0": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
    figure, axes = plt.subplots(1, 4, figsize=(10, 3.6), layout="constrained", sharey=True)
    for axis, (name, stage) in zip(axes, split.items(), strict=True):
        below = 0.0
        for depth, (part, (size, color)) in zip((3, 2, 1), parts.items(), strict=True):
            share = size / 4 if stage >= depth else size
            for rank in range(4):
                axis.bar(rank, share, bottom=below, color=color, width=0.8, label=part if rank == 0 else None)
            below += share
        axis.set(title=f"{name}: {below:g} bytes", xticks=range(4), xlabel="rank", ylim=(0, 17))
    axes[0].set_ylabel("bytes a parameter")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def batches() -> Figure:
    """A global batch of pairs, planned under two token budgets on two ranks."""
    lengths = np.random.default_rng(7).gamma(3.0, 40.0, size=(12, 2)).astype(int) + 20
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, budget in zip(axes, (4000, 1200), strict=True):
        steps = plan_micro_batches(lengths, token_budget=budget, ranks=2, length_buckets=2)
        _draw_plan(axis, lengths, steps)
        count = "one micro-batch" if len(steps) == 1 else f"{len(steps)} micro-batches"
        axis.set_title(f"micro_batch_tokens = {budget}: {count} a rank", fontsize=11)
    figure.supxlabel("tokens (hatched: padding)")
    return figure


def _draw_plan(axis: Axes, lengths: np.ndarray, steps: list) -> None:
    top = 0.0
    colors = (TEAL, BLUE)
    for step in steps:
        for rank, plan in enumerate(step):
            count = len(plan.items)
            for bucket in plan.buckets:
                sizes = [int(lengths[plan.items[row % count]][row // count]) for row in bucket]
                axis.add_patch(
                    Rectangle(
                        (0, top), max(sizes), len(sizes), facecolor="none", edgecolor=GRAY, hatch="////", linewidth=0
                    )
                )
                for place, size in enumerate(sizes):
                    axis.add_patch(Rectangle((0, top + place + 0.08), size, 0.84, facecolor=colors[rank]))
                middle = top + len(sizes) / 2
                axis.text(max(sizes) + 6, middle, f"rank {rank}", va="center", color=colors[rank], fontsize=8)
                top += len(sizes) + 0.35
            top += 0.6
        top += 0.6
    axis.set(xlim=(0, lengths.max() + 70), ylim=(top, 0), yticks=[])
    axis.spines[["left", "right", "top"]].set_visible(False)


def run_folder() -> Figure:
    """States of a run, what leads from one to the next, and which files are there."""
    figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
    axis.set(xlim=(0, 100), ylim=(0, 44))
    axis.axis("off")
    _box(axis, 2, 27, 19, "started", "config.yaml\nowner.json\nstatus.json", GRAY)
    _box(axis, 36, 27, 24, "running", "metrics.jsonl, tensorboard/\ncheckpoints/step-*", TEAL)
    _box(axis, 78, 27, 20, "finished", "final/, evaluation.json\ndone.json", BLUE)
    _box(axis, 22, 3, 22, "stopped", "a checkpoint of this step\nexit code 75", ORANGE)
    _box(axis, 54, 3, 22, "failed or killed", "the newest checkpoint\nthe cause in status.json", ORANGE)
    _arrow(axis, (21, 33), (36, 33), "data read,\nmodel built")
    _arrow(axis, (60, 33), (78, 33), "last step, then a\nfresh process agrees")
    _arrow(axis, (41, 27), (32, 15), "STOP, signal, clock", side="right")
    _arrow(axis, (55, 27), (64, 15), "crash, kill -9", side="left")
    _arrow(axis, (26, 15), (38, 27), "same command", side="right", bend=-0.35)
    _arrow(axis, (71, 15), (58, 27), "same command", side="left", bend=0.35)
    return figure


def _box(axis: Axes, left: float, bottom: float, width: float, title: str, text: str, color: str) -> None:
    style = "round,pad=0.2,rounding_size=1.5"
    box = FancyBboxPatch((left, bottom), width, 12, boxstyle=style, linewidth=2)
    box.set(facecolor="white", edgecolor=color)
    axis.add_patch(box)
    axis.text(left + width / 2, bottom + 9.3, title, ha="center", va="center", weight="bold", color=INK)
    axis.text(left + width / 2, bottom + 4, text, ha="center", va="center", fontsize=8.5, color=INK)


def _arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str, *, side: str = "above", bend: float = 0
) -> None:
    kind = f"arc3,rad={bend}"
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK, connectionstyle=kind))
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    if side == "above":
        axis.text(x, y + 1, text, ha="center", va="bottom", fontsize=8.5, color=INK)
    else:
        shift = {"right": 1.5, "left": -1.5}[side] * (1 if not bend else -4.2)
        axis.text(x + shift, y, text, ha="left" if shift > 0 else "right", va="center", fontsize=8.5, color=INK)


PICTURES: tuple[Callable[[], Figure], ...] = (margin, zero, batches, run_folder)


def main() -> int:
    matplotlib.use("svg")
    plt.rcParams.update({"svg.hashsalt": "margin-rlhf", "axes.spines.top": False, "axes.spines.right": False})
    for draw in PICTURES:
        figure = draw()
        figure.savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})
        plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
