"""Held-out pairs in figures, tables and texts: what reward models and preference policies have in common."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from launch.report.contents import Advice, Passage, Reading, Table, Text, cell, named, points, run_cell, share
from launch.report.figures import Figure, Line
from launch.report.reading import Run
from reward.evaluate import Confidence, reliability_curve

SHOWN = 6
"""Pairs of each kind that are shown."""
POOR_CALIBRATION = 0.1


def lead(runs: Sequence[Run], what: str) -> tuple[str, ...]:
    """A sentence for each run: accuracy beside what length alone would do."""
    found = []
    for run in runs:
        accuracy, length = run.evaluation.get("accuracy"), run.evaluation.get("length_baseline")
        if accuracy is None:
            found.append(named(run, runs, "nothing was measured on held-out pairs."))
            continue
        low, high = share(accuracy["low"]), share(accuracy["high"])
        beside = "" if length is None else f"; the longer answer wins in {share(length['value'])}"
        text = f"{what} {share(accuracy['value'])} of {accuracy['pairs']} held-out pairs right (95 % interval {low} to"
        found.append(named(run, runs, f"{text} {high}){beside}."))
    return tuple(found)


def advice(runs: Sequence[Run]) -> Iterator[Advice]:
    """What the held-out pairs say against a run."""
    for run in runs:
        accuracy, length = run.evaluation.get("accuracy"), run.evaluation.get("length_baseline")
        if accuracy is None or length is None:
            continue
        if accuracy["low"] <= 0.5 <= accuracy["high"]:
            yield Advice(
                run=run.name,
                text=f"Accuracy {share(accuracy['value'])} cannot be told from a guess with {accuracy['pairs']} "
                "held-out pairs: hold out more of them, or train longer.",
            )
        elif accuracy["low"] <= length["value"]:
            yield Advice(
                run=run.name,
                text=f"It is no better than a rule that takes the longer answer ({share(length['value'])}): train on "
                "pairs of like length (rlhf data check shows the bias), or look at accuracy by length difference.",
            )
        error = run.evaluation.get("calibration_error")
        if error is not None and error > POOR_CALIBRATION:
            yield Advice(
                run=run.name,
                text=f"Calibration error {share(error)}: reward gaps are no measure of confidence. Fewer epochs, "
                "loss.kind=label_smoothing, or a smaller margin.scale bring them closer.",
            )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a run says of pairs of answers."""

    name: str
    """What the run is called."""
    evaluation: Mapping[str, Any]
    """Fields of :class:`reward.evaluate.Evaluation`; empty where nothing was measured."""
    reliability: Sequence[Confidence]


def figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Calibration, accuracy by length, and where the gaps lie."""
    gaps = [[_gap(row) for row in _pairs(run)] for run in runs]
    curves = [reliability_curve(each) if each else () for each in gaps]
    yield from judged_figures(
        [
            Judged(name=run.name, evaluation=run.evaluation, reliability=curve)
            for run, curve in zip(runs, curves, strict=True)
        ]
    )
    yield _gaps(runs)


def judged_figures(judged: Sequence[Judged]) -> Iterator[Figure]:
    """Calibration, and accuracy by length and by score gap: a color a run."""
    yield _calibration(judged)
    yield _by_bucket(judged, "by_length_difference", "Accuracy by length difference", "chosen minus rejected, tokens")
    yield _by_bucket(judged, "by_score_gap", "Accuracy by score gap", "gap of the annotator's scores")


def _gap(row: Mapping[str, Any]) -> float:
    return row["chosen_reward"] - row["rejected_reward"]


def _pairs(run: Run) -> list[Mapping[str, Any]]:
    return [row for row in run.held_out if "chosen_reward" in row]


def _calibration(judged: Sequence[Judged]) -> Figure:
    lines = [Line(name="perfect", x=[0.5, 1], y=[0.5, 1], color=7, dashed=True)]
    for place, each in enumerate(judged):
        if each.reliability:
            found = ((part.confidence, asdict(part.accuracy)) for part in each.reliability)
            lines.append(points(each.name, found, place))
    return Figure(
        key="calibration",
        title="Calibration",
        x="confidence: sigmoid of the reward gap",
        y="share of pairs ranked right",
        lines=tuple(lines) if len(lines) > 1 else (),
        percent=True,
        note="On the dashed line, 80 % sure means right in 80 % of pairs; below it the model is too sure. "
        "Bars: 95 % intervals.",
    )


def _by_bucket(judged: Sequence[Judged], name: str, title: str, x: str) -> Figure:
    known = [(place, each.evaluation.get(name) or []) for place, each in enumerate(judged)]
    most = max((buckets for _, buckets in known), key=len, default=[])
    width = 0.5 / max(1, len(judged))
    lines = [
        points(
            judged[place].name,
            [(at + (place - (len(judged) - 1) / 2) * width, each["accuracy"]) for at, each in enumerate(buckets)],
            place,
        )
        for place, buckets in known
        if buckets
    ]
    digits = 0 if name == "by_length_difference" else 2
    return Figure(
        key=name,
        title=title,
        x=x,
        y="accuracy",
        lines=tuple(lines),
        percent=True,
        levels=(0.5,),
        categories=tuple(f"{each['smallest']:.{digits}f} to {each['largest']:.{digits}f}" for each in most),
        note="Quartiles of the pairs, with 95 % intervals. A guess is right in 50 % (dotted line).",
    )


def _gaps(runs: Sequence[Run]) -> Figure:
    lines = []
    everything = [_gap(row) for run in runs for row in _pairs(run)]
    if everything:
        width = (max(everything) - min(everything)) / min(30, max(8, len(everything) // 15)) or 1.0
        first, last = np.floor(min(everything) / width), np.floor(max(everything) / width) + 1
        edges = np.arange(first, last + 1) * width  # 0 is one of them
        middles = ((edges[:-1] + edges[1:]) / 2).tolist()
        for place, run in enumerate(runs):
            counts = np.histogram([_gap(row) for row in _pairs(run)], bins=edges)[0].tolist()
            kind: Any = "bars" if len(runs) == 1 else "line"
            lines.append(Line(name=run.name, x=middles, y=counts, color=place, kind=kind))
    return Figure(
        key="gaps",
        title="Reward gaps of held-out pairs",
        x="chosen minus rejected, logits",
        y="pairs",
        lines=tuple(lines),
        marks=((0.0, ""),) if lines and min(everything) < 0 < max(everything) else (),
        note="Left of the dashed line the rejected answer has the higher reward.",
    )


def tables(runs: Sequence[Run], first: int) -> Iterator[Table]:
    """The held-out numbers of each run; ``first`` is the number of the first run in the page."""
    rows = []
    for place, run in enumerate(runs):
        found = run.evaluation
        if "accuracy" not in found:
            continue
        accuracy, length = found["accuracy"], found.get("length_baseline")
        rows.append(
            (
                run_cell(run, first + place),
                cell(accuracy["value"], share(accuracy["value"])),
                cell(accuracy["low"], f"{share(accuracy['low'])} to {share(accuracy['high'])}"),
                cell(accuracy["pairs"], str(accuracy["pairs"])),
                cell(length and length["value"], share(length and length["value"])),
                cell(found.get("mean_loss")),
                cell(found.get("calibration_error"), share(found.get("calibration_error"))),
                cell(found.get("mean_gap")),
            )
        )
    headings = ("run", "accuracy", "95 % interval", "pairs", "longer wins", "loss, nats", "calibration", "gap, logits")
    if rows:
        note = (
            "Longer wins: accuracy of a rule that takes the longer answer. Knowing nothing costs 0.693 nats. "
            "Calibration: how far confidence is from accuracy, on average (expected calibration error)."
        )
        yield Table(title="Held-out pairs", headings=headings, rows=tuple(rows), note=note)


def readings(runs: Sequence[Run]) -> Iterator[Reading]:
    """Telling pairs with their texts: the most misranked, the least decided, the most decided."""
    for run in runs:
        rows = [row for row in _pairs(run) if "prompt" in row]
        by_gap = sorted(rows, key=_gap)
        kinds = {
            "Misranked": [row for row in by_gap if _gap(row) < 0][:SHOWN],
            "Hard": sorted(rows, key=lambda row: abs(_gap(row)))[:SHOWN],
            "Easy": [row for row in by_gap[::-1] if _gap(row) > 0][:SHOWN],
        }
        notes = {
            "Misranked": "The rejected answer gets the higher reward. Is the label wrong, or the model?",
            "Hard": "Both answers get nearly the same reward.",
            "Easy": "The reward gap is widest.",
        }
        for kind, found in kinds.items():
            if found:
                title = named(run, runs, f"{kind} pairs")
                yield Reading(title=title, passages=tuple(map(_passage, found)), note=notes[kind])


def _passage(row: Mapping[str, Any]) -> Passage:
    texts = tuple(
        Text(title=f"{side}: reward {row[f'{side}_reward']:.3f}", parts=((row[side], False),))
        for side in ("chosen", "rejected")
    )
    return Passage(title=f"{row['row']}: gap {_gap(row):+.3f}", prompt=row["prompt"], texts=texts)


def margin_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """The margins along training, and against gap and likeness of their pairs."""
    yield Figure(
        key="margins",
        title="Margins over training",
        x="step",
        y="margin, logits",
        lines=tuple(_margin_lines(runs)),
        note="How far chosen has to lie above rejected. Line: median over the pairs of a step; band: 10th to 90th "
        "percentile.",
    )
    for column, title, x in (
        ("gap", "Margin against reward gap", "chosen minus rejected, logits"),
        ("similarity", "Margin against likeness", "cosine of the two answers' embeddings"),
    ):
        lines = []
        for place, run in enumerate(runs):
            lines += _scatter(run, column, place, alone=len(runs) == 1)
        yield Figure(
            key=f"margin-{column}",
            title=title,
            x=x,
            y="margin, logits",
            lines=tuple(lines),
            note="Pairs of training steps, as written to margins.jsonl.",
        )


def _margin_lines(runs: Sequence[Run]) -> Iterator[Line]:
    for place, run in enumerate(runs):
        columns = {name: run.columns.get(f"margin/{name}", ((), ())) for name in ("p10", "p50", "p90")}
        steps, middle = columns["p50"]
        if middle and any(middle):
            low, high = columns["p10"][1], columns["p90"][1]
            yield Line(name=run.name, x=steps, y=middle, low=low, high=high, color=place)


def _scatter(run: Run, column: str, color: int, *, alone: bool) -> list[Line]:
    rows = [row for row in run.rows("margins.jsonl") if column in row and "margin" in row]
    if not rows:
        return []
    part = max(1, len(rows) // 4)
    wanted = {"last quarter of training": (rows[-part:], color)}
    if alone and len(rows) > part:
        wanted = {"first quarter of training": (rows[:part], 1)} | wanted
    lines = []
    for name, (chosen, tone) in wanted.items():
        across = [value for row in chosen for value in row[column]][-400:]
        heights = [value for row in chosen for value in row["margin"]][-400:]
        lines.append(Line(name=name if alone else run.name, x=across, y=heights, color=tone, kind="points"))
    return lines
