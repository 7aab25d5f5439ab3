"""What the finished runs of a sweep are worth beside each other: a table, its files and a plot."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from launch.pipeline.state import Action, Progress
from launch.pipeline.sweep import Sweep, comparison_of
from launch.screen import titled_table
from launch.stages import Stage
from rlhf.core.files import write_json, write_text
from rlhf.core.pictures import write_figure
from rlhf.train.comparison import Column
from rlhf.train.status import MINUTES

MINUTES_NOTE = "Minutes: training steps alone, without start, evaluations and caches."
FIRST_COLOR, SECOND_COLOR = "#0072B2", "#D55E00"
LABEL_CHARACTERS = 34


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run."""

    name: str
    settings: Mapping[str, str]
    """Its value on each axis."""
    step: int
    """The step whose weights were evaluated."""
    metrics: Mapping[str, float]
    """The latest of each; what was not measured or is not finite is left out."""
    interval: tuple[float, float] | None
    """The 95 % interval of the key metric, where the stage gives one."""
    items: int | None
    """Held-out pairs, where the stage says how many."""


@dataclass(frozen=True)
class Report:
    """The finished runs of a sweep, the best first."""

    stage: Stage
    results: Sequence[Result]

    @property
    def columns(self) -> tuple[Column, ...]:
        """What is shown of each run. The key metric comes first."""
        found = comparison_of(self.stage).columns
        if found:
            return found
        names = dict.fromkeys(name for result in self.results for name in result.metrics if name.startswith("eval/"))
        key = self.stage.key_metric
        ordered = [key, *(name for name in names if name != key)] if key in names else [*names]
        return tuple(Column(metric=name, label=_label(name)) for name in ordered)

    @property
    def title(self) -> str:
        counts = sorted({result.items for result in self.results if result.items is not None})
        shown = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1])))) if counts else ""
        return f"Sweep: {len(self.results)} runs" + (f" on {shown} held-out pairs" if shown else "")

    @property
    def notes(self) -> tuple[str, ...]:
        key = next(iter(self.columns), None)
        order = f"On held-out data, sorted by {key.label}. {MINUTES_NOTE}" if key else MINUTES_NOTE
        return order, *comparison_of(self.stage).notes

    @property
    def headings(self) -> list[str]:
        labels = [column.label for column in self.columns]
        if self._has_intervals:
            labels.insert(1, "95 % interval")
        return ["run", *labels, "minutes"]

    def cells(self, result: Result) -> list[str]:
        shown = [_number(result.metrics.get(column.metric), column.layout) for column in self.columns]
        if self._has_intervals:
            layout = self.columns[0].layout
            shown.insert(1, " to ".join(format(end, layout) for end in result.interval) if result.interval else "-")
        return [result.name, *shown, _number(result.metrics.get(MINUTES), ".1f")]

    @property
    def _has_intervals(self) -> bool:
        return any(result.interval for result in self.results)


def report_of(sweep: Sweep, *, any_code: bool = False) -> Report:
    """What the runs that are finished with the present settings, inputs and code came to."""
    progress = Progress(sweep.pipeline, any_code=any_code)
    finished = [run for run in sweep.pipeline.stages if progress.decide(run).action is Action.SKIP]
    found = [(run, said) for run in finished if (said := progress.measured(run)) is not None]
    metrics = [{name: value for name, value in each.metrics.items() if value is not None} for _, each in found]
    completed = comparison_of(sweep.stage).complete(
        [(run.config, each) for (run, _), each in zip(found, metrics, strict=True)]
    )
    key = sweep.stage.key_metric
    results = []
    for (run, said), values in zip(found, completed, strict=True):
        interval, items = _interval(said.evaluation.get(key.rpartition("/")[2]))
        result = Result(
            name=run.name,
            settings=dict(sweep.points[run.name]),
            step=said.evaluation.get("step", said.step),
            metrics=values,
            interval=interval,
            items=items,
        )
        results.append(result)
    sign = 1.0 if sweep.stage.metric.startswith("-") else -1.0

    def rank(result: Result) -> tuple[float, str]:
        return (sign * result.metrics[key] if key in result.metrics else math.inf), result.name

    return Report(sweep.stage, sorted(results, key=rank))


def comparison_table(report: Report) -> Table:
    """The table for a terminal."""
    table = titled_table(report.title, *report.headings)
    for result in report.results:
        table.add_row(*report.cells(result))
    return table


def write_report(folder: Path, report: Report, failures: Mapping[str, str]) -> None:
    """Write ``sweep.json``, ``sweep.md`` and, if a run is finished, ``sweep.png``; ``failures``: why, by run."""
    write_json(folder / "sweep.json", {"runs": [asdict(result) for result in report.results], "failed": dict(failures)})
    write_text(folder / "sweep.md", "\n".join(_markdown(report, failures)))
    if report.results:
        plot(report, folder / "sweep.png")


def plot(report: Report, path: Path) -> None:
    """A row for each run: its key metric with the interval, and beside it where the two ends of its span went."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = ["\n".join(textwrap.wrap(result.name, LABEL_CHARACTERS)) for result in report.results]
    inches = 0.2 + 0.14 * max(label.count("\n") + 1 for label in labels)
    span = comparison_of(report.stage).span
    figure = Figure(figsize=(10 if span else 6, 1.6 + inches * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.subplots()] if span is None else [*figure.subplots(1, 2, sharey=True)]
    _plot_key_metric(panels[0], report)
    if span is not None:
        _plot_span(panels[1], report, span)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=9)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)  # the best on top
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    write_figure(path, figure, dpi=150)  # in one step: jobs of a sweep may end at one moment


def _plot_key_metric(axes: Any, report: Report) -> None:
    column = next(iter(report.columns), Column(metric=report.stage.key_metric, label=_label(report.stage.key_metric)))
    scale, unit = (100, ", %") if column.layout.endswith("%") else (1, "")
    for place, result in enumerate(report.results):
        value = result.metrics.get(column.metric)
        if value is None:
            continue
        low, high = result.interval or (value, value)
        around = ([max(0.0, scale * (value - low))], [max(0.0, scale * (high - value))])
        axes.errorbar([scale * value], [place], xerr=around, fmt="o", color="black", capsize=3)
    chance = comparison_of(report.stage).chance
    if chance is not None:
        axes.axvline(scale * chance, color="grey", linewidth=1, linestyle=":")
    interval = ", with 95 % interval" if any(result.interval for result in report.results) else ""
    axes.set_xlabel(f"held-out {column.label}{unit}{interval}")


def _plot_span(axes: Any, report: Report, span: tuple[str, str]) -> None:
    known = [place for place, each in enumerate(report.results) if all(name in each.metrics for name in span)]
    first, second = ([report.results[place].metrics[name] for place in known] for name in span)
    labels = {column.metric: column.label for column in report.columns}
    axes.hlines(known, first, second, color="lightgrey", linewidth=3, zorder=1)
    axes.scatter(first, known, color=FIRST_COLOR, label=labels.get(span[0]), zorder=2)
    axes.scatter(second, known, color=SECOND_COLOR, marker="D", label=labels.get(span[1]), zorder=2)
    axes.axvline(0, color="grey", linewidth=1, linestyle=":")
    axes.set_xlabel(comparison_of(report.stage).span_label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _interval(measured: Any) -> tuple[tuple[float, float] | None, int | None]:
    """The ends of an interval and the number of pairs, where a held-out record has them."""
    if not isinstance(measured, dict):
        return None, None
    low, high = measured.get("low"), measured.get("high")
    return (None if low is None or high is None else (low, high)), measured.get("pairs")


def _label(metric: str) -> str:
    return metric.rpartition("/")[2].replace("_", " ")


def _number(value: float | None, layout: str) -> str:
    return "-" if value is None else format(value, layout)


def _markdown(report: Report, failures: Mapping[str, str]) -> Iterator[str]:
    if report.results:
        rule = ["---", *["---:"] * (len(report.headings) - 1)]
        yield from (f"# {report.title}", "")
        for cells in (report.headings, rule, *map(report.cells, report.results)):
            yield f"| {' | '.join(cells)} |"
        for paragraph in (*report.notes, "![the runs beside each other](sweep.png)"):
            yield from ("", paragraph)
        yield ""
    if failures:
        yield from ("Failed:", "", *(f"* `{name}`: {' '.join(why.split())}" for name, why in failures.items()), "")
