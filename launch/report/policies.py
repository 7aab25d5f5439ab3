"""Evaluations of policies and benchmarks of reward models."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from launch.report.contents import Advice, Cell, Reading, Section, Table, cell, named, points, run_cell, share
from launch.report.figures import Figure, Line
from launch.report.pairs import Judged, judged_figures
from launch.report.reading import Run
from launch.report.samples import compared
from rlhf.core.findings import ITEMS

if TYPE_CHECKING:
    from reward.benchmarks.results import BenchmarkResult

BINS = 30
"""Parts of the range of rewards."""


def evaluate(runs: Sequence[Run], first: int) -> Section:
    from policy.evaluation.results import read_evaluations

    lead, rows, figures = [], [], []
    readings: list[Reading] = []
    for place, run in enumerate(runs):
        if not run.evaluation:
            continue
        found = read_evaluations(run.folder)
        for each in found:
            gain = each.gain
            interval = "" if gain is None else f"{gain.low:+.3f} to {gain.high:+.3f}"
            if gain is not None:
                verdict = "better" if gain.low > 0 else "worse" if gain.high < 0 else "undecided"
                text = f"policy {each.name} gains {gain.value:+.3f} of reward over {found[0].name} (95 % interval"
                lead.append(named(run, runs, f"{text} {interval}, {each.prompts} prompts): {verdict}."))
            rows.append(
                (
                    run_cell(run, first + place),
                    Cell(text=each.name),
                    cell(each.reward.value, f"{each.reward.value:.3f}"),
                    cell(each.reward.low, f"{each.reward.low:.3f} to {each.reward.high:.3f}"),
                    cell(None if gain is None else gain.value, None if gain is None else f"{gain.value:+.3f}"),
                    cell(None if gain is None else gain.low, interval or None),
                    cell(each.log_ratio if each.kl is None else each.kl),
                    cell(each.tokens),
                    cell(each.ended_share, share(each.ended_share, 0)),
                )
            )
        names = tuple(each.name for each in found)
        rewards = [(at, asdict(each.reward)) for at, each in enumerate(found)]
        distances = [each.log_ratio if each.kl is None else each.kl for each in found]
        key = "" if len(runs) == 1 else f"-{place}"
        figures += [
            Figure(
                key=f"rewards{key}",
                title=named(run, runs, "Reward of fresh samples"),
                x="policy",
                y="mean reward",
                categories=names,
                lines=(points("mean, 95 % interval over prompts", rewards),),
            ),
            Figure(
                key=f"reward-kl{key}",
                title=named(run, runs, "Reward against KL"),
                x=f"KL from {names[0]}, nats per response",
                y="mean reward",
                lines=tuple(
                    points(each.name, [(distance, asdict(each.reward))], color)
                    for color, (each, distance) in enumerate(zip(found, distances, strict=True))
                ),
            ),
        ]
        samples = {name: run.rows(f"samples_{name}.jsonl") for name in names}
        if all(samples.values()):
            readings += compared(samples)
    headings = ("run", "policy", "reward", "95 % interval", "gain", "95 % interval", "KL, nats", "tokens", "ended")
    note = (
        "Fresh samples for held-out prompts. Gain: over the first policy, for the same prompts. Ended: responses that "
        "the policy ends by itself, before the limit."
    )
    return Section(
        key="evaluate",
        title="Policies compared",
        lead=tuple(lead),
        figures=tuple(figures),
        tables=(Table(title="Policies", headings=headings, rows=tuple(rows), note=note),) if rows else (),
        readings=tuple(readings),
    )


def benchmark(runs: Sequence[Run], first: int) -> Section:
    from reward.benchmarks.results import read_result

    found = {place: read_result(run.folder) for place, run in enumerate(runs) if run.evaluation}
    lead, figures, tables, advice = [], [], [], list[Advice]()
    for place, each in found.items():
        run, main = runs[place], each.main
        text = f"{main.name} on {each.benchmark}: {share(main.value)} (95 % interval {share(main.low)} to"
        lead.append(named(run, runs, f"{text} {share(main.high)}, {each.items} items)."))
        advice += _doubts(run, each)
        key, title = ("", each.benchmark) if len(runs) == 1 else (f"-{place}", f"{run.name}: {each.benchmark}")
        figures += [_measures(each, f"benchmark{key}", title), _rewards(run, runs, f"rewards{key}")]
        tables.append(_benchmark_table(each, run_cell(run, first + place), title))
    judged = [
        Judged(
            name=run.name,
            evaluation=run.evaluation.get("pairs", {}),
            reliability=found[place].pairs.reliability if place in found else (),
        )
        for place, run in enumerate(runs)
    ]
    figures += judged_figures(judged)
    return Section(
        key="benchmark",
        title="Benchmarks",
        lead=tuple(lead),
        figures=tuple(figures),
        tables=tuple(tables),
        advice=tuple(advice),
    )


def _doubts(run: Run, found: "BenchmarkResult") -> Iterator[Advice]:
    """What a benchmark says against a model."""
    main, length = found.main, found.by_length[0].value
    if found.wrong_prompt and main.low <= found.wrong_prompt[0].value:
        text = (
            f"{found.benchmark}: under another item's prompt it does as well ({share(found.wrong_prompt[0].value)}): "
            "it judges these answers without their question. Train on pairs that are more like them."
        )
        yield Advice(run=run.name, text=text)
    if main.low <= length:
        text = f"{found.benchmark}: it is no better than a rule that takes the longer answer ({share(length)})."
        yield Advice(run=run.name, text=text)


def _measures(found: "BenchmarkResult", key: str, title: str) -> Figure:
    """All numbers of a benchmark beside those of length alone, and of a wrong prompt."""
    columns = {"model": found.measures, "longer answer wins": found.by_length}
    if found.wrong_prompt:
        columns["wrong prompt"] = found.wrong_prompt
    width, lines = 0.6 / len(columns), []
    for color, (name, measures) in enumerate(columns.items()):
        shift = (color - (len(columns) - 1) / 2) * width
        line: Line = points(name, [(at + shift, asdict(each)) for at, each in enumerate(measures)], color)
        lines.append(line)
    return Figure(
        key=key,
        title=title,
        x="measure",
        y="score",
        categories=tuple(each.name for each in found.measures),
        lines=tuple(lines),
        percent=True,
        note="A model that does as well under a wrong prompt has not read the question.",
    )


def _rewards(run: Run, runs: Sequence[Run], key: str) -> Figure:
    """Where the rewards of right and of wrong answers lie."""
    sides: dict[str, list[float]] = {"right answers": [], "wrong answers": []}
    for row in run.rows(ITEMS):
        sides["right answers"] += row["scores"][: row["right"]]
        sides["wrong answers"] += row["scores"][row["right"] :]
    everything = [value for values in sides.values() for value in values]
    lines = []
    if everything and min(everything) < max(everything):
        edges = np.linspace(min(everything), max(everything), BINS + 1)
        middles = ((edges[:-1] + edges[1:]) / 2).tolist()
        for color, (name, values) in enumerate(sides.items()):
            counts = np.histogram(values, bins=edges)[0] / max(1, len(values))
            lines.append(Line(name=name, x=middles, y=counts.tolist(), color=color))
    return Figure(
        key=key,
        title=named(run, runs, "Rewards of right and wrong answers"),
        x="reward, logits",
        y="share of these answers",
        lines=tuple(lines),
        percent=True,
        note="The farther apart, the easier to tell.",
    )


def _benchmark_table(found: "BenchmarkResult", of: Cell, title: str) -> Table:
    rows = []
    for at, each in enumerate(found.measures):
        wrong = found.wrong_prompt[at].value if found.wrong_prompt else None
        rows.append(
            (
                of,
                Cell(text=each.name),
                cell(each.value, share(each.value)),
                cell(each.low, f"{share(each.low)} to {share(each.high)}"),
                cell(found.by_length[at].value, share(found.by_length[at].value)),
                cell(wrong, share(wrong)),
                cell(each.items, str(each.items)),
            )
        )
    headings = ("run", "measure", "value", "95 % interval", "longer wins", "wrong prompt", "n")
    calibration = f"Calibration error of all pairs: {share(found.pairs.calibration_error)}."
    note = " ".join((f"Formula: {found.source}.", calibration, *found.notes))
    return Table(title=title, headings=headings, rows=tuple(rows), note=note)


def tax(runs: Sequence[Run], first: int) -> Section:
    from policy.tax.results import read_tax

    lead, rows, figures = [], [], []
    for place, run in enumerate(runs):
        if not run.evaluation:
            continue
        found = read_tax(run.folder)
        for each in found.tasks:
            change = each.change
            interval = None if change is None else f"{change.low:+.4f} to {change.high:+.4f}"
            told = "" if interval is None else f" (change {interval}, {each.items} items)"
            text = f"{each.task}, {each.measure}: {each.before:.4f} before, {each.after:.4f} after"
            of_run = "" if len(runs) == 1 else f"{run.name}: "
            lead.append(f"{of_run}{text}{told}: {each.verdict}.")
            rows.append(
                (
                    run_cell(run, first + place),
                    Cell(text=each.task),
                    Cell(text=each.measure),
                    cell(each.before, f"{each.before:.4f}"),
                    cell(each.after, f"{each.after:.4f}"),
                    cell(None if change is None else change.low, interval),
                    cell(each.items, str(each.items)),
                    Cell(text=each.verdict),
                )
            )
        known = [each for each in found.tasks if each.change is not None]
        changes = [(at, asdict(each.change)) for at, each in enumerate(known) if each.change is not None]
        figures.append(
            Figure(
                key="changes" if len(runs) == 1 else f"changes-{place}",
                title=named(run, runs, "Change by task"),
                x="task",
                y="after less before",
                categories=tuple(f"{each.task} {each.measure}" for each in known),
                lines=(points("change, 95 % interval over items", changes),),
                levels=(0.0,),
            )
        )
    headings = ("run", "task", "measure", "before", "after", "change, 95 % interval", "n", "verdict")
    return Section(
        key="tax",
        title="What training has cost",
        lead=tuple(lead),
        figures=tuple(figures),
        tables=(Table(title="Tasks before and after", headings=headings, rows=tuple(rows)),) if rows else (),
    )
