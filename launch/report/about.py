"""What was run, on what, at which cost, and what was warned of: the same for runs of every stage."""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from launch.report.contents import Advice, Cell, Table, cell, run_cell
from launch.report.reading import Run
from launch.stages import by_program
from rlhf.core.clock import clock
from rlhf.train.status import MINUTES, RATES

KEYS = {
    "model.path": "starts from",
    "policy.path": "starts from",
    "loss.kind": "loss",
    "margin.kind": "margin",
    "optim.learning_rate": "learning rate",
    "train.global_batch_size": "global batch",
    "train.epochs": "epochs",
    "train.seed": "seed",
    "engine.deepspeed": "DeepSpeed",
    "engine.precision": "precision",
}
"""Settings that are told without being looked for."""

RENDEZVOUS_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class About:
    """The card of one run."""

    number: int
    run: Run
    facts: tuple[tuple[str, str], ...]
    command: str
    hosts: int
    """Those that it ran on, where it says so."""
    data: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...]
    """Files by name, with a name for what is in them."""


def about(runs: Sequence[Run]) -> tuple[About, ...]:
    return tuple(_about(number, run) for number, run in enumerate(runs))


def _about(number: int, run: Run) -> About:
    stage = by_program(run.stage)
    module = "" if stage is None else stage.module
    recipe = run.folder / ("config.yaml" if (run.folder / "config.yaml").is_file() else "recipe.yaml")
    ranks = run.environment.get("ranks", ())
    hosts = len({each["host"] for each in ranks})
    again = shlex.join([*_start(len(ranks), hosts), "-m", module, "--config", str(recipe), "output=FOLDER"])
    return About(
        number=number,
        run=run,
        facts=tuple((name, text) for name, text in _facts(run) if text),
        command=again if module and run.recipe else "",
        hosts=hosts,
        data=tuple(map(str, run.data.get("report", ()))),
        inputs=tuple((name, str(value)) for name, value in run.inputs.items()),
    )


def _start(ranks: int, hosts: int) -> list[str]:
    """What starts so many ranks of a module."""
    if ranks < 2:
        return ["python"]
    several = [f"--nnodes={hosts}", "--rdzv-backend=c10d", f"--rdzv-endpoint=HOST:{RENDEZVOUS_PORT}"]
    return ["torchrun", *(several if hosts > 1 else []), f"--nproc-per-node={ranks // hosts}"]


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    status, environment = run.status, run.environment
    yield "stage", run.stage
    yield "folder", str(run.folder)
    if status is not None:
        yield "state", "gone" if status.is_gone else f"{status.state} {status.reason}".strip()
        yield "step", f"{status.step} of {status.total}" if status.total and run.metrics else ""
        yield "began", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(status.started))
    yield "worked", clock(run.seconds) if run.seconds is not None else ""
    for key, name in KEYS.items():
        value = run.settings.get(key)
        yield name, "" if value is None else str(value)
    for part, name in (("train", "training data"), ("eval", "held-out data")):
        found = run.data.get(part)
        if found:
            yield name, f"{found['items']} items, {found['fingerprint']}"
    ranks = environment.get("ranks", ())
    if ranks:
        hosts, device = len({each["host"] for each in ranks}), ranks[0]["device"]
        counts = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {hosts} host{'s' * (hosts > 1)}"
        yield "machine", f"{counts}: {device}"
    versions = environment.get("packages") or run.manifest.get("versions") or {}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "Python", str(environment.get("python", ""))


def differing(runs: Sequence[Run]) -> Iterator[Table]:
    """Settings in which runs of one stage differ."""
    for stage in dict.fromkeys(run.stage for run in runs):
        same = [(number, run) for number, run in enumerate(runs) if run.stage == stage and run.settings]
        if len(same) < 2:
            continue
        keys = dict.fromkeys(key for _, run in same for key in run.settings)
        wanted = [key for key in keys if key != "output" and len({str(run.settings.get(key)) for _, run in same}) > 1]
        if wanted:
            yield Table(
                title=f"Settings that differ: {stage}",
                headings=("run", *wanted),
                rows=tuple(
                    (run_cell(run, number), *(Cell(text=str(run.settings.get(key, "–"))) for key in wanted))
                    for number, run in same
                ),
            )


def costs(runs: Sequence[Run], planned: Mapping[str, float]) -> Iterator[Table]:
    """Time, throughput and memory of the runs; ``planned``: bytes by the name of a run."""
    rows = []
    has_plan = any(run.name in planned for run in runs)
    for number, run in enumerate(runs):
        if not run.metrics and run.seconds is None:
            continue
        rates = {name: run.columns[name][1] for name in RATES if name in run.columns}
        items = next(((name, values) for name, values in rates.items() if "tokens" not in name), None)
        tokens = rates.get("time/tokens_per_second")
        peak, plan = max(run.columns.get("memory/peak_gib", ((), (0.0,)))[1]), planned.get(run.name)
        unit = "" if items is None else items[0].removeprefix("time/").removesuffix("_per_second")
        logged = sum(run.columns.get("time/step_seconds", ((), ()))[1]) / 60 or None
        taken = _minutes(run) or logged  # not every step may be logged
        rows.append(
            (
                run_cell(run, number),
                cell(((run.status and run.status.step) or run.done.get("step")) if run.metrics else None),
                cell(taken, None if taken is None else f"{taken:.1f}"),
                cell(None if run.seconds is None else run.seconds / 60, f"{(run.seconds or 0) / 60:.1f}"),
                cell(None if items is None else median(items[1]), _rate(items and items[1], unit)),
                cell(None if tokens is None else median(tokens), _rate(tokens, "")),
                cell(peak or None, f"{peak:.2f}"),
                *([cell(None if plan is None else plan / 2**30, f"{(plan or 0) / 2**30:.2f}")] if has_plan else []),
            )
        )
    headings = (
        "run",
        "steps",
        "minutes in steps",
        "minutes in all",
        "items/s",
        "tokens/s",
        "peak GiB",
        *(["planned GiB"] if has_plan else []),
    )
    beside = "planned: rlhf plan, of the busiest rank" if has_plan else "rlhf report adds what rlhf plan foretells"
    note = f"Rates: medians over steps. Peak: of rank 0, measured; {beside}."
    if rows:
        yield Table(title="Time and memory", headings=headings, rows=tuple(rows), note=note)


def _minutes(run: Run) -> float | None:
    return run.status.metrics.get(MINUTES) if run.status is not None else None


def _rate(values: Sequence[float] | None, unit: str) -> str | None:
    return None if values is None else f"{median(values):,.1f} {unit}".strip()


def warned(runs: Sequence[Run]) -> Iterator[Advice]:
    """What the runs warned of while they ran, each thing once, how they failed, and what their folders lack."""
    for run in runs:
        status = run.status
        if status is not None and status.state == "failed":
            yield Advice(run=run.name, step=status.step, text=f"failed: {status.reason}")
        if status is not None and status.is_gone:
            yield Advice(run=run.name, step=status.step, text="says that it runs, and is gone: start it again")
        for fault in run.faults:
            yield Advice(run=run.name, text=fault)
        stage = by_program(run.stage)
        if stage is not None and stage.trains and not run.metrics:
            text = f"{run.folder}: no metrics.jsonl, or none of its lines is a step: no curves. Has it taken a step?"
            yield Advice(run=run.name, text=text)
        # Not every step may be logged; skipped.jsonl has a line for each that a row was to blame for.
        skipped = {row["step"] for row in run.metrics if row.get("step_skipped")}
        skipped |= {row["step"] for row in run.rows("skipped.jsonl")}
        if skipped:
            count = f"{len(skipped)} step{'s were' if len(skipped) > 1 else ' was'}"
            text = f"{count} skipped, as something was not finite: skipped.jsonl names their rows."
            yield Advice(run=run.name, text=text)
        said: dict[str, Any] = {}
        for row in run.warnings:
            said.setdefault(str(row.get("text")), row.get("step"))
        for text, step in said.items():
            yield Advice(run=run.name, step=step, text=text)
