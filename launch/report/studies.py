"""Studies: their verdicts, their table, and the main metric along the runs with bands over seeds."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.report.contents import Cell, Section, Table
from launch.report.figures import Figure, Line
from launch.report.reading import STUDY, Run, read_json

NEEDED = {"item", "is_share", "metric", "baseline", "variants", "headings", "rows", "comparisons"}


def studies(folders: Sequence[Path], runs: Sequence[Run]) -> Iterator[Section]:
    """A section for each of ``folders`` that holds a study."""
    for number, folder in enumerate(folders):
        found = read_json(folder / STUDY)
        if found.keys() >= NEEDED:  # another program's file may have this name
            yield _section(found, folder, runs, "study" if number == 0 else f"study-{number}")


def _section(found: Mapping[str, Any], folder: Path, runs: Sequence[Run], key: str) -> Section:
    rows = tuple(tuple(_cell(text) for text in row) for row in found["rows"])
    note = f"Held-out {found['item']}; deviation: of the runs' means, from seed to seed."
    along = [_along(found, folder, runs, metric) for metric in _metrics(found["metric"])] if found["metric"] else []
    return Section(
        key=key,
        title="Study",
        lead=tuple(each["verdict"] for each in found["comparisons"]),
        figures=(_differences(found), *along),
        tables=(Table(title="Variants", headings=tuple(found["headings"]), rows=rows, note=note),),
    )


def _metrics(held_out: str) -> tuple[str, ...]:
    return held_out, held_out.removeprefix("eval/")


def _cell(text: str) -> Cell:
    try:
        return Cell(text=text, order=float(text.removesuffix(" %")))
    except ValueError:
        return Cell(text=text)


def _differences(found: Mapping[str, Any]) -> Figure:
    known = [each for each in found["comparisons"] if each["found"] is not None]
    scale = 100 if found["is_share"] else 1
    line = Line(
        name="difference, 95 % interval over seeds and prompts",
        x=[*range(len(known))],
        y=[scale * each["found"]["difference"] for each in known],
        low=[scale * each["found"]["low"] for each in known],
        high=[scale * each["found"]["high"] for each in known],
        kind="points",
    )
    return Figure(
        key="differences",
        title=f"Difference from {found['baseline']}",
        x="variant",
        y=f"{found['item']}, points" if found["is_share"] else found["item"],
        categories=tuple(": ".join(filter(None, [each.get("part", ""), each["variant"]])) for each in known),
        lines=(line,),
        levels=(0.0,),
    )


def _along(found: Mapping[str, Any], folder: Path, runs: Sequence[Run], metric: str) -> Figure:
    by_place = {run.folder.resolve(): run for run in runs}
    lines = []
    for color, variant in enumerate(found["variants"]):
        mine = [by_place[path] for name in variant["runs"] if (path := (folder / name).resolve()) in by_place]
        curves = [dict(zip(*run.columns[metric], strict=True)) for run in mine if metric in run.columns]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if not steps:
            continue
        values = np.array([[curve[step] for step in steps] for curve in curves])
        middle, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0.0 * values[0]
        low, high = (middle - spread).tolist(), (middle + spread).tolist()
        lines.append(Line(name=variant["name"], x=steps, y=middle.tolist(), low=low, high=high, color=color))
    held_out = "held-out " if metric.startswith("eval/") else "training "
    return Figure(
        key=metric.replace("/", "-"),
        title=f"{held_out}{metric.removeprefix('eval/')}".capitalize(),
        x="step",
        y="mean over seeds",
        lines=tuple(lines),
        note="Bands: one deviation to both sides, over the seeds.",
    )
