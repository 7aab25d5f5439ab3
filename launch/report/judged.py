"""Answers that a judge has compared or graded, and samples that a reward has chosen from."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from launch.report.contents import (
    Advice,
    Cell,
    Passage,
    Reading,
    Section,
    Table,
    Text,
    cell,
    named,
    points,
    run_cell,
    share,
)
from launch.report.figures import Figure, Line
from launch.report.reading import Run
from launch.report.samples import prompt_text
from rlhf.core.findings import ITEMS
from rlhf.core.intervals import Estimate
from rlhf.train.held_out import shortened

if TYPE_CHECKING:
    from policy.grading.results import Grading
    from policy.win_rate.run import Comparison

PASSAGES = 12


def win_rate(runs: Sequence[Run], first: int) -> Section:
    from policy.win_rate.run import read_comparison

    lead, rows, advice = [], [], []
    readings: list[Reading] = []
    bars: list[tuple[str, dict[str, float], dict[str, float] | None]] = []
    for place, run in enumerate(runs):
        if not run.evaluation:
            continue
        found = read_comparison(run.folder)
        rate = found.rate
        reach = 1.96 * (rate.standard_error or 0.0)
        plain = {"value": rate.value, "low": max(0.0, rate.value - reach), "high": min(1.0, rate.value + reach)}
        text = f"{_outcome(found, plain)}. Judge: {found.judge}."
        lead.append(named(run, runs, text) if len(runs) > 1 else text)
        advice += [Advice(run=run.name, text=note) for note in found.notes]
        controlled = None if rate.length_controlled is None else asdict(rate.length_controlled)
        bars.append((f"{found.name} / {found.reference}", plain, controlled))
        rows.append((run_cell(run, first + place), *_rate_cells(found)))
        readings += _verdicts(run, runs, found.name, found.reference)
    headings = (
        "run",
        "model",
        "against",
        "win rate",
        "error",
        "length-controlled",
        "95 % interval",
        "won, lost, tied",
        "left out",
    )
    lines = (
        points("win rate, 95 % interval", [(at - 0.1, plain) for at, (_, plain, _) in enumerate(bars)]),
        points("at equal lengths", [(at + 0.1, each) for at, (_, _, each) in enumerate(bars) if each is not None], 1),
    )
    figure = Figure(
        key="rates",
        title="Win rates",
        x="model / against",
        y="share won, ties half",
        categories=tuple(name for name, _, _ in bars),
        lines=lines,
        levels=(0.5,),
        percent=True,
        note="The dotted line: neither is better.",
    )
    note = "Length-controlled: AlpacaEval 2's minimal logistic model. Left out: questions without a verdict."
    return Section(
        key="win-rate",
        title="Win rates",
        lead=tuple(lead),
        figures=(figure,),
        tables=(Table(title="Win rates", headings=headings, rows=tuple(rows), note=note),) if rows else (),
        readings=tuple(readings),
        advice=tuple(advice),
    )


def _outcome(found: "Comparison", plain: dict[str, float]) -> str:
    """A sentence: who wins how often, and what that decides."""
    error, controlled = found.rate.standard_error, found.rate.length_controlled
    verdict = "better" if plain["low"] > 0.5 else "worse" if plain["high"] < 0.5 else "undecided"
    verdict = verdict if error else "undecided"
    counted = found.questions - found.left_out
    told = "" if error is None else f" (standard error {share(error)}, {counted} questions)"
    text = f"{found.name} wins {share(found.rate.value)} against {found.reference}{told}: {verdict}"
    if controlled is None:
        return text
    return f"{text}; at equal lengths {share(controlled.value)} ({share(controlled.low)} to {share(controlled.high)})"


def _rate_cells(found: "Comparison") -> tuple[Cell, ...]:
    """A row of the table, but for its run."""
    rate, controlled = found.rate, found.rate.length_controlled
    return (
        Cell(text=found.name),
        Cell(text=found.reference),
        cell(rate.value, share(rate.value)),
        cell(rate.standard_error, share(rate.standard_error)),
        cell(None if controlled is None else controlled.value, share(controlled.value if controlled else None)),
        cell(
            None if controlled is None else controlled.low,
            None if controlled is None else f"{share(controlled.low)} to {share(controlled.high)}",
        ),
        Cell(text=f"{rate.wins}, {rate.losses}, {rate.ties}", order=float(rate.wins)),
        cell(found.left_out, str(found.left_out)),
    )


def _verdicts(run: Run, runs: Sequence[Run], name: str, reference: str) -> list[Reading]:
    """Pairs of answers side by side, the clear ones first."""
    items = [row for row in run.rows(ITEMS) if row.get("preference") is not None]
    chosen = [row for value in (1.0, 0.0, 0.5) for row in items if row["preference"] == value][
        :: max(1, len(items) // PASSAGES)
    ]
    said = {1.0: f"{name} preferred", 0.0: f"{reference} preferred"}
    passages = tuple(
        Passage(
            title=f"{row['id']}: {said.get(row['preference'], 'a tie')}",
            prompt=prompt_text(row["prompt"]),
            texts=tuple(
                Text(title=title, parts=((shortened(row[side]), False),))
                for title, side in ((reference, "other"), (name, "own"))
            ),
        )
        for row in chosen[:PASSAGES]
    )
    return [Reading(title=named(run, runs, "Answers side by side"), passages=passages)] if passages else []


def grading(runs: Sequence[Run], first: int) -> Section:
    from policy.grading.results import read_grading

    lead, tables, advice, figures = [], [], [], []
    for place, run in enumerate(runs):
        if not run.evaluation:
            continue
        found = read_grading(run.folder)
        base = found.models[0]
        for each in found.models:
            score = each.score
            text = f"{each.name} is graded {score.value:.2f} of 10 ({score.low:.2f} to {score.high:.2f})"
            if each.gain is not None:
                decided = "better" if each.gain.low > 0 else "worse" if each.gain.high < 0 else "undecided"
                gain = f"{each.gain.value:+.2f} ({each.gain.low:+.2f} to {each.gain.high:+.2f})"
                text += f", {gain} against {base.name} on the same questions: {decided}"
            lead.append(f"{text}." if len(runs) == 1 else f"{run.name}: {text}.")
        advice += [Advice(run=run.name, text=note) for note in found.notes]
        key = "" if len(runs) == 1 else f"-{place}"
        figures += _grade_figures(found, named(run, runs, "Grades by category"), key)
        tables.append(_grade_table(found, named(run, runs, f"Grades by {found.judge}")))
    return Section(
        key="grade",
        title="Graded answers",
        lead=tuple(lead),
        figures=tuple(figures),
        tables=tuple(tables),
        advice=tuple(advice),
    )


def _grade_table(found: "Grading", title: str) -> Table:
    """A line a measure, a column a model."""
    turns = len(found.models[0].by_turn)
    of_models = [
        {"score": each.score}
        | {f"turn {number}": turn for number, turn in enumerate(each.by_turn, 1) if turns > 1}
        | each.by_category
        for each in found.models
    ]
    names = ("score", *(f"turn {number}" for number in range(1, turns + 1) if turns > 1), *found.categories)
    rows = []
    for name in names:
        known = [measures.get(name) for measures in of_models]
        cells = [
            cell(None) if e is None else cell(e.value, f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})") for e in known
        ]
        rows.append((Cell(text=name), *cells))
    note = "Grades from 1 to 10, each answer by itself, with 95 % intervals over questions."
    headings = ("measure", *(each.name for each in found.models))
    return Table(title=title, headings=headings, rows=tuple(rows), note=note)


def _grade_cell(grade: Estimate | None) -> Cell:
    return (
        cell(None) if grade is None else cell(grade.value, f"{grade.value:.2f} ({grade.low:.2f} to {grade.high:.2f})")
    )


def _grade_figures(found: "Grading", title: str, key: str) -> list[Figure]:
    names = found.categories
    figures = []
    if len(names) > 2:
        lines = [
            Line(
                name=each.name, x=[*range(len(names))], y=[each.by_category[name].value for name in names], color=color
            )
            for color, each in enumerate(found.models)
            if all(name in each.by_category for name in names)
        ]
        radar = Figure(
            key=f"radar{key}",
            title=title,
            x="category",
            y="mean grade",
            categories=names,
            lines=tuple(lines),
            radar=10.0,
        )
        figures.append(radar)
    shown = [
        (each, [each.score, *(each.by_category[name] for name in names if name in each.by_category)])
        for each in found.models
    ]
    width = 0.6 / len(shown)
    spread = tuple(
        points(
            each.name,
            [(at + (color - (len(shown) - 1) / 2) * width, asdict(value)) for at, value in enumerate(values)],
            color,
        )
        for color, (each, values) in enumerate(shown)
    )
    figures.append(
        Figure(
            key=f"grades{key}",
            title=f"{title}, with 95 % intervals",
            x="category",
            y="mean grade",
            categories=("all", *names),
            lines=spread,
        )
    )
    return figures


def best_of_n(runs: Sequence[Run], first: int) -> Section:
    lead, figures, rows = [], [], []
    for place, run in enumerate(runs):
        found = run.evaluation.get("choices")
        if not found:
            continue
        best = max(found, key=lambda each: each["gold"]["value"])
        text = f"the gold reward is highest for the best of {best['n']}, at a KL of {best['kl']:.2f} nats:"
        lead.append(named(run, runs, f"{text} {best['gold']['value']:.3f}."))
        key = "" if len(runs) == 1 else f"-{place}"
        for side, label in (("gold", "Gold reward"), ("proxy", "Reward that chooses")):
            estimates = [each[side] for each in found]
            line = Line(
                name=run.name,
                x=[each["kl"] for each in found],
                y=[each["value"] for each in estimates],
                low=[each["low"] for each in estimates],
                high=[each["high"] for each in estimates],
            )
            title = named(run, runs, f"{label}, best of n")
            x = "KL from the policy, nats"
            figures.append(Figure(key=f"best-{side}{key}", title=title, x=x, y="mean reward", lines=(line,)))
        for each in found:
            gold = each["gold"]
            rows.append(
                (
                    run_cell(run, first + place),
                    cell(each["n"], str(each["n"])),
                    cell(each["kl"]),
                    cell(each["proxy"]["value"]),
                    cell(gold["value"]),
                    cell(gold["low"], f"{gold['low']:.3f} to {gold['high']:.3f}"),
                )
            )
    headings = ("run", "n", "KL, nats", "reward that chooses", "gold reward", "95 % interval")
    return Section(
        key="best-of-n",
        title="Best of n",
        lead=tuple(lead),
        figures=tuple(figures),
        tables=(Table(title="Best of n samples", headings=headings, rows=tuple(rows)),) if rows else (),
    )
