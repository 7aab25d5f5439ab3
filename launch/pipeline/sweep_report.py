"""What the finished runs of a sweep are worth beside each other: a table, its files and a plot."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from launch.pipeline.sweep import SweepRun
from rlhf.config import to_dict
from rlhf.core.files import write_json, write_text
from rlhf.core.intervals import Accuracy

SIDES = ("chosen", "rejected")
COLUMNS = ("run", "accuracy", "95 % interval", "loss", "gap", *(f"{side} drift" for side in SIDES))
COLUMNS += ("zero gradient", "minutes")
NOTES = (
    "On held-out data, sorted by accuracy. Drift: log-probability of the responses against the model that training "
    "started from (or the reference), in nats per token. Zero gradient: share of the pairs of the last step that "
    "move nothing any more. Minutes: training steps alone.",
    "Each run is measured by its own implicit reward. Loss and gap compare only where objective and beta agree. "
    "Accuracy without a reference is that of the log-probabilities themselves, which order pairs before any training; "
    "with one, that of their change.",
)
CHOSEN_COLOR, REJECTED_COLOR = "#0072B2", "#D55E00"
LABEL_CHARACTERS = 34


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run. ``None``: not measured by this kind of run, or not finite."""

    name: str
    settings: Mapping[str, str]
    step: int
    """That the evaluated weights are of."""
    accuracy: Accuracy
    loss: float | None
    gap: float | None
    chosen_drift: float | None
    """Nats per token."""
    rejected_drift: float | None
    zero_gradient_share: float | None
    """Of the last step."""
    minutes: float | None
    """Of the training steps, without start, evaluations and reference cache."""


@dataclass(frozen=True)
class _Finished:
    """What a finished run left behind."""

    run: SweepRun
    evaluation: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""

    @classmethod
    def read(cls, run: SweepRun) -> "_Finished":
        log = run.folder / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        evaluation = json.loads(run.evaluation.read_text(encoding="utf-8"))
        return cls(run, evaluation, [json.loads(line) for line in lines])

    @property
    def held_out(self) -> Mapping[str, Any]:
        """The held-out metrics of the step that was evaluated at the end; the latest ones if it has none."""
        found = [row for row in self.rows if "eval/accuracy" in row]
        at_step = [row for row in found if row["step"] == self.evaluation["step"]]
        return [{}, *found, *at_step][-1]

    @property
    def start_key(self) -> str:
        """The log-probabilities of runs with the same key had the same start, on the same held-out data."""
        config = self.run.config
        model = [config.model.path, config.model.revision, config.model.layers]
        return json.dumps([model, to_dict(config.rows), config.engine.precision, config.loss.tail_weight])

    @property
    def start(self) -> dict[str, float] | None:
        """Log-probabilities of the model that training started from by side, in nats per token, where that is known."""
        reference = self.run.config.reference
        if reference.path is not None or reference.sync_every or self.run.config.loss.tail_weight != 1:
            return None
        now, drifts = self._by_side("logprob"), self._by_side("drift")
        if None in (*now.values(), *drifts.values()):
            return None
        return {side: now[side] - drifts[side] for side in SIDES}

    def result(self, start: Mapping[str, float] | None) -> Result:
        """``start`` tells the drift of a run without a reference."""
        now, drifts = self._by_side("logprob"), self._by_side("drift")
        if start is not None and not self.run.config.loss.needs_reference and None not in now.values():
            drifts = {side: now[side] - start[side] for side in SIDES}
        last_shares = [row["zero_gradient_share"] for row in self.rows if "zero_gradient_share" in row][-1:]
        return Result(
            name=self.run.name,
            settings=dict(self.run.settings),
            step=self.evaluation["step"],
            accuracy=Accuracy(**self.evaluation["accuracy"]),
            loss=self.evaluation.get("mean_loss"),
            gap=self.evaluation.get("mean_gap"),
            chosen_drift=drifts["chosen"],
            rejected_drift=drifts["rejected"],
            zero_gradient_share=last_shares[0] if last_shares else None,
            minutes=_training_minutes(self.rows),
        )

    def _by_side(self, kind: str) -> dict[str, float | None]:
        return {side: self.held_out.get(f"eval/{side}_{kind}_per_token") for side in SIDES}


def results_of(runs: Sequence[SweepRun]) -> list[Result]:
    """The finished ones of ``runs``, the most accurate first."""
    finished = [_Finished.read(run) for run in runs if run.is_done]
    starts = {each.start_key: each.start for each in finished if each.start is not None}
    results = [each.result(starts.get(each.start_key)) for each in finished]
    return sorted(results, key=lambda result: (-result.accuracy.value, result.name))


def comparison_table(results: Sequence[Result]) -> Table:
    table = Table(title=_title(results), title_justify="left", collapse_padding=True)
    table.add_column(COLUMNS[0], overflow="fold")
    for name in COLUMNS[1:]:
        table.add_column("\n".join(name.rsplit(" ", 1)), justify="right")
    for result in results:
        table.add_row(*_cells(result))
    return table


def write_report(folder: Path, results: Sequence[Result], failures: Mapping[str, str]) -> None:
    """Write ``sweep.json``, ``sweep.md`` and, if a run is finished, ``sweep.png``; ``failures``: why, by run."""
    write_json(folder / "sweep.json", {"runs": [asdict(result) for result in results], "failed": dict(failures)})
    write_text(folder / "sweep.md", _markdown(results, failures))
    if results:
        plot(results, folder / "sweep.png")


def plot(results: Sequence[Result], path: Path) -> None:
    """A row for each run: its accuracy with the interval, and beside it where both log-probabilities went."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [_label(result.name) for result in results]
    inches = 0.2 + 0.14 * max(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(10, 1.6 + inches * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _plot_accuracies(left, results)
    _plot_drifts(right, results)
    left.set_yticks(range(len(results)), labels, fontsize=9)
    left.set_ylim(len(results) - 0.5, -0.5)  # the best on top
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _plot_accuracies(axes: Any, results: Sequence[Result]) -> None:
    values = [100 * result.accuracy.value for result in results]
    below = [100 * (result.accuracy.value - result.accuracy.low) for result in results]
    above = [100 * (result.accuracy.high - result.accuracy.value) for result in results]
    axes.errorbar(values, range(len(results)), xerr=(below, above), fmt="o", color="black", capsize=3)
    axes.axvline(50, color="grey", linewidth=1, linestyle=":")
    axes.set_xlabel("held-out accuracy, %, with 95 % interval")


def _plot_drifts(axes: Any, results: Sequence[Result]) -> None:
    known = [place for place, each in enumerate(results) if each.chosen_drift is not None]
    known = [place for place in known if results[place].rejected_drift is not None]
    chosen, rejected = ([getattr(results[place], f"{side}_drift") for place in known] for side in SIDES)
    axes.hlines(known, chosen, rejected, color="lightgrey", linewidth=3, zorder=1)
    axes.scatter(chosen, known, color=CHOSEN_COLOR, label="chosen", zorder=2)
    axes.scatter(rejected, known, color=REJECTED_COLOR, marker="D", label="rejected", zorder=2)
    axes.axvline(0, color="grey", linewidth=1, linestyle=":")
    axes.set_xlabel("drift of log-probabilities, nats per token")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _label(name: str) -> str:
    return "\n".join(textwrap.wrap(name, LABEL_CHARACTERS))


def _training_minutes(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean time of the logged steps (train.log_every may leave some out) times the number of steps."""
    steps = [row for row in rows if row.get("time/step_seconds") is not None]
    if not steps:
        return None
    return sum(row["time/step_seconds"] for row in steps) / len(steps) * steps[-1]["step"] / 60


def _title(results: Sequence[Result]) -> str:
    counts = sorted({result.accuracy.pairs for result in results})
    shown = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Sweep: {len(results)} runs on {shown} held-out pairs"


def _cells(result: Result) -> tuple[str, ...]:
    accuracy = result.accuracy
    return (
        result.name,
        f"{accuracy.value:.1%}",
        f"{accuracy.low:.1%} to {accuracy.high:.1%}",
        _number(result.loss, ".3f"),
        _number(result.gap, ".3f"),
        _number(result.chosen_drift, "+.3f"),
        _number(result.rejected_drift, "+.3f"),
        _number(result.zero_gradient_share, ".0%"),
        _number(result.minutes, ".1f"),
    )


def _number(value: float | None, layout: str) -> str:
    return "-" if value is None else format(value, layout)


def _markdown(results: Sequence[Result], failures: Mapping[str, str]) -> str:
    lines: list[str] = []
    if results:
        lines += [f"# {_title(results)}", "", _row(COLUMNS), _row(["---", *["---:"] * (len(COLUMNS) - 1)])]
        lines += [_row(_cells(result)) for result in results]
        lines += ["", *(line for note in NOTES for line in (note, "")), "![accuracy and drift](sweep.png)", ""]
    if failures:
        lines += ["Failed:", "", *(f"* `{name}`: {reason}" for name, reason in failures.items()), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
