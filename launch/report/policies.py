"""Evaluations of policies and benchmarks of reward models."""

from collections.abc import Sequence
from dataclasses import asdict

from launch.report.contents import Cell, Reading, Section, Table, cell, named, points, run_cell, share
from launch.report.figures import Figure, Line
from launch.report.reading import Run
from launch.report.samples import compared


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
                    cell(each.reward.value),
                    cell(each.reward.low, f"{each.reward.low:.3f} to {each.reward.high:.3f}"),
                    cell(None if gain is None else gain.value),
                    cell(None if gain is None else gain.low, interval or None),
                    cell(each.log_ratio if each.kl is None else each.kl),
                    cell(each.tokens),
                    cell(each.ended_share, f"{each.ended_share:.0%}"),
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
    note = "Fresh samples for held-out prompts; gain: over the first policy, for the same prompts."
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

    lead, figures, tables = [], [], []
    for place, run in enumerate(runs):
        if not run.evaluation:
            continue
        found = read_result(run.folder)
        main = found.main
        text = f"{main.name} on {found.benchmark}: {share(main.value)} (95 % interval {share(main.low)} to"
        lead.append(named(run, runs, f"{text} {share(main.high)}, {found.items} items)."))
        columns = {"model": found.measures, "longer answer wins": found.by_length}
        if found.wrong_prompt:
            columns["wrong prompt"] = found.wrong_prompt
        key = "" if len(runs) == 1 else f"-{place}"
        width = 0.6 / len(columns)
        lines = []
        for color, (name, measures) in enumerate(columns.items()):
            shift = (color - (len(columns) - 1) / 2) * width
            line: Line = points(name, [(at + shift, asdict(each)) for at, each in enumerate(measures)], color)
            lines.append(line)
        figures.append(
            Figure(
                key=f"benchmark{key}",
                title=named(run, runs, found.benchmark),
                x="measure",
                y="score",
                categories=tuple(each.name for each in found.measures),
                lines=tuple(lines),
                percent=True,
                note="A model that does as well under a wrong prompt has not read the question.",
            )
        )
        rows = []
        for at, each in enumerate(found.measures):
            wrong = found.wrong_prompt[at].value if found.wrong_prompt else None
            rows.append(
                (
                    run_cell(run, first + place),
                    Cell(text=each.name),
                    cell(each.value, share(each.value)),
                    cell(each.low, f"{share(each.low)} to {share(each.high)}"),
                    cell(found.by_length[at].value, share(found.by_length[at].value)),
                    cell(wrong, share(wrong)),
                    cell(each.items, str(each.items)),
                )
            )
        headings = ("run", "measure", "value", "95 % interval", "longer wins", "wrong prompt", "n")
        note = f"{found.source}. {' '.join(found.notes)}"
        tables.append(Table(title=named(run, runs, found.benchmark), headings=headings, rows=tuple(rows), note=note))
    return Section(key="benchmark", title="Benchmarks", lead=tuple(lead), figures=tuple(figures), tables=tuple(tables))


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
