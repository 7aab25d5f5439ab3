"""Jobs of studies of labels: what is trained on which labels, the file of finished ones, choices by held-out pairs."""

import json
import pathlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from training import finished

from rlhf.core.files import whole_lines

TUNED_AT = 0.2
TUNING_SEEDS = 3
"""Held-out tenths that numbers are chosen on; their seeds count from 1000."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is made of labels in training."""

    use: str = "as_given"
    """What becomes of doubtful labels: ``labels.use``, or as_given."""
    loss: str = "bradley_terry"
    options: tuple[tuple[str, float], ...] = ()
    found: float = 0.0
    """The estimated share of wrong labels below which the loss is Bradley-Terry instead."""
    transport: float = 0.0
    """Scale of optimal-transport margins."""
    share: bool = False
    """Whether the loss is told the estimated share."""
    mass: float = 1.0
    """Share of the pairs that weights by partial transport take along; 1 for no such weights."""
    bayesian: float | None = None
    """Weight of the divergences of a Bayesian non-negative head; ``None`` for the plain head."""
    heads: int = 1
    """Heads that are averaged, each with a start and a draw of the pairs of its own."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All methods on the same labels from the same start."""

    noise: str
    share: float
    seed: int
    fold: int
    methods: tuple[tuple[str, Method], ...]
    tests: bool


Ask = Callable[[list[Job]], list[dict]]
Work = Callable[[Job, Any], dict]
"""What makes the record of a job, of it and of what all jobs share."""


def results(jobs: Iterable[Job], path: pathlib.Path, fingerprint: str, pool, work: Work, until: float) -> list[dict]:
    """The records of ``jobs``, in order; of those not in the file, methods that are missing are made.

    Raises:
        SystemExit: if the time is up before all are there.
    """
    jobs = list(jobs)
    known: dict[str, dict] = {}
    if path.is_file():
        for line in map(json.loads, whole_lines(path)):
            _add(known, line)
    keys = {job: json.dumps([fingerprint, repr(replace(job, methods=()))]) for job in jobs}
    missing = []
    for job in jobs:
        there = known.get(keys[job], {"methods": {}})["methods"]
        lacking = tuple((name, method) for name, method in job.methods if repr(method) not in there)
        if lacking:
            missing.append(replace(job, methods=lacking))
    with path.open("a", encoding="utf-8") as output:
        size = pool._max_workers  # one for each worker, then the time is looked at
        for start in range(0, len(missing), size):
            if time.monotonic() > until:
                raise SystemExit(f"{len(missing) - start} jobs are left: start again")
            for job, result in finished(pool, work, missing[start : start + size]):
                key = json.dumps([fingerprint, repr(replace(job, methods=()))])
                made = {repr(method): result["methods"][name] for name, method in job.methods}
                line = {"key": key, "result": result | {"methods": made}}
                output.write(json.dumps(line) + "\n")
                output.flush()
                _add(known, line)
                print(f"{job.noise}, {job.share:.0%}, seed {job.seed}: {len(made)} methods", flush=True)
    found = []
    for job in jobs:
        record = known[keys[job]]
        found.append(record | {"methods": {name: record["methods"][repr(method)] for name, method in job.methods}})
    return found


def _add(known: dict[str, dict], line: dict) -> None:
    """What a line of the file says, to what is known of its job."""
    before = known.get(line["key"], {"methods": {}})["methods"]
    known[line["key"]] = line["result"] | {"methods": before | line["result"]["methods"]}


def tuning_jobs(methods: dict[str, Method], share: float, tenths: int) -> list[Job]:
    """The same labels with each of the first tenths held out."""
    return [
        Job(noise="uniform", share=share, seed=1000 + fold, fold=fold, methods=tuple(methods.items()), tests=False)
        for fold in range(tenths)
    ]


def best(
    ask: Ask,
    title: str,
    candidates: dict[str, Method],
    *,
    shares: tuple[float, ...] = (TUNED_AT,),
    tenths: int = TUNING_SEEDS,
) -> tuple[str, str]:
    """Name of the candidate that is right most often on held-out tenths, and a line on what was tried."""
    records = [record for share in shares for record in ask(tuning_jobs(candidates, share, tenths))]
    means = {name: float(np.mean([record["methods"][name]["validation"] for record in records])) for name in candidates}
    taken = max(means, key=means.__getitem__)
    cells = [
        f"**{name}: {100 * mean:.1f}**" if name == taken else f"{name}: {100 * mean:.1f}"
        for name, mean in means.items()
    ]
    return taken, f"| {title} | {', '.join(cells)} |"
