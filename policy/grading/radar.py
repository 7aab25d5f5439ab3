"""Scores by category as a radar plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.core.pictures import write_figure

COLORS = ("#1b6ca8", "#c8553d", "#3b8b5a", "#8a5aa8", "#b08020", "#4a4a4a")
FEWEST = 3
"""Categories that make an area."""


def write_radar(path: Path, categories: Sequence[str], scores: Mapping[str, Sequence[float]], *, best: float) -> None:
    """Draw a closed line for each model.

    Args:
        path: ends in .svg.
        categories: names of K axes.
        scores: ``(K,)`` by the name of the model.
        best: the outermost value.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.6, 5.2), layout="constrained", subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * place / len(categories) for place in range(len(categories))]
    for number, (name, values) in enumerate(scores.items()):
        color = COLORS[number % len(COLORS)]
        axes.plot([*angles, angles[0]], [*values, values[0]], color=color, label=name)
        axes.fill([*angles, angles[0]], [*values, values[0]], color=color, alpha=0.12)
    axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]
    axes.set_theta_direction(-1)  # type: ignore[attr-defined]
    axes.set_xticks(angles, categories)
    axes.tick_params(axis="x", pad=16)
    axes.set_ylim(0, best)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    write_figure(path, figure)
    pyplot.close(figure)
