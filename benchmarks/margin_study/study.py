"""Step 2 of the margin study: train the same small reward head with every loss and margin, many times.

Reads the frozen features of step 1 (features.py). Three phases, of which only the last looks at a test set:

1. layer and learning rate, for plain Bradley-Terry, on held-out training prompts;
2. one number for each other method (margin value, margin scale or smoothing), likewise, for each share of
   flipped labels, four candidates for each method;
3. the comparison: every method, every share of flipped labels, every seed.

    python benchmarks/margin_study/study.py --features features/ --data DIR --output study/

Every finished run is a line of runs.jsonl in the output folder; started again, only missing runs are made.
At the end study.json, tables.md and margin_study.png are written there (report.py makes the last two), and results.csv,
which rlhf study reads: study.yaml does all of it, with a verdict for each method.
"""

import argparse
import json
import pathlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import numpy as np
import training
from report import write_report
from results import write_results
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import METHODS, Corpus, Run, finished, read_corpus, started, study_parser

from rlhf.core.files import whole_lines, write_text

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
FLIPPED = (0.0, 0.2)
TUNING_FOLDS = 3
TUNING_SEED = 1000
"""Seeds of the comparison count from 0, so tuning shares none with it."""


class Ledger:
    """Runs done, kept in a file of one JSON line each."""

    def __init__(self, path: pathlib.Path, settings: dict, pool: ProcessPoolExecutor) -> None:
        self._path, self._settings, self._pool = path, settings, pool
        self._done: dict[str, dict] = {}
        if path.is_file():
            self._done = {self._key(record): record for record in map(json.loads, whole_lines(path))}

    def results(self, runs: Iterable[Run], title: str) -> list[dict]:
        """The records of ``runs``, in order; those not there yet are made."""
        wanted = [{"run": asdict(run), "settings": self._settings} for run in runs]
        missing = [Run(**record["run"]) for record in wanted if self._key(record) not in self._done]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns) as progress, self._path.open("a", encoding="utf-8") as output:
            bar = progress.add_task(title, total=len(wanted), completed=len(wanted) - len(missing))
            for run, outcome in finished(self._pool, training.train, missing):
                record = {"run": asdict(run), "settings": self._settings, **outcome}
                output.write(json.dumps(record) + "\n")
                output.flush()
                self._done[self._key(record)] = record
                progress.advance(bar)
        return [self._done[self._key(record)] for record in wanted]

    @staticmethod
    def _key(record: dict) -> str:
        return json.dumps([record["run"], record["settings"]], sort_keys=True)


def settings(corpus: Corpus) -> dict:
    """What decides the outcome of all runs alike; lines of runs.jsonl made under others are left alone."""
    names = ("EPOCHS", "BATCH_PAIRS", "WARMUP_STEPS", "WEIGHT_DECAY", "HIDDEN", "EVALUATE_EVERY", "FOLDS")
    return {name.lower(): getattr(training, name) for name in names} | {"features": corpus.fingerprint}


def choose(records: list[dict], *names: str) -> tuple[tuple, list[list]]:
    """The values of ``names`` with the best mean validation accuracy, and all values with their means."""
    found: dict[tuple, list[float]] = {}
    for record in records:
        values = tuple(record["run"][name] for name in names)
        found.setdefault(values, []).append(record["curve"]["validation"][-1])
    means = {values: float(np.mean(accuracies)) for values, accuracies in found.items()}
    return max(means, key=means.__getitem__), [[*values, mean] for values, mean in means.items()]


def tuning_runs(**changes) -> list[Run]:
    """The same run with each of the first folds held out."""
    return [Run(fold=fold, seed=TUNING_SEED + fold, tests=False, **changes) for fold in range(TUNING_FOLDS)]


def choose_shared(ledger: Ledger, layers: list[int]) -> dict:
    """Phase 1."""
    runs = [
        run
        for layer in layers
        for rate in LEARNING_RATES
        for run in tuning_runs(method="Bradley-Terry", setting=0.0, flipped=0.0, layer=layer, learning_rate=rate)
    ]
    (layer, rate), tried = choose(ledger.results(runs, "1 layer, rate"), "layer", "learning_rate")
    return {"layer": layer, "learning_rate": rate, "tried": tried}


def choose_setting(ledger: Ledger, name: str, flipped: float, shared: dict) -> dict:
    """Phase 2, for one method."""
    runs = [
        run
        for setting in METHODS[name].candidates
        for run in tuning_runs(method=name, setting=setting, flipped=flipped, **shared)
    ]
    (setting,), tried = choose(ledger.results(runs, f"2 {name}, {flipped:.0%} flipped"), "setting")
    return {"method": name, "flipped": flipped, "setting": setting, "tried": tried}


def study(corpus: Corpus, ledger: Ledger, seeds: int) -> dict:
    """All three phases: what was chosen, and every run of the comparison."""
    chosen = choose_shared(ledger, [int(layer) for layer in corpus.splits["train"]["layers"]])
    shared = {"layer": chosen["layer"], "learning_rate": chosen["learning_rate"]}
    rows = [choose_setting(ledger, name, flipped, shared) for flipped in FLIPPED for name in METHODS]
    runs = [
        Run(
            method=row["method"],
            setting=row["setting"],
            flipped=row["flipped"],
            fold=seed % training.FOLDS,
            seed=seed,
            tests=True,
            **shared,
        )
        for seed in range(seeds)
        for row in rows
    ]
    records = ledger.results(runs, "3 comparison")
    return {
        "shared": chosen,
        "settings": rows,
        "runs": [{"run": record["run"], "curve": record["curve"], "right": record["right"]} for record in records],
        "prompts": {split: corpus.prompts[split].tolist() for split in ("id_test", "ood_test")},
    }


def build_parser() -> argparse.ArgumentParser:
    return study_parser(__doc__, seeds=20, of="runs for each method and share of flipped labels", made="runs")


def main() -> None:
    options = build_parser().parse_args()
    corpus = read_corpus(options.features, options.data)
    options.output.mkdir(parents=True, exist_ok=True)
    with started(options.workers, read_corpus, options.features, options.data) as pool:
        result = study(corpus, Ledger(options.output / "runs.jsonl", settings(corpus), pool), options.seeds)
    write_text(options.output / "study.json", json.dumps(result, allow_nan=False) + "\n")
    write_report(result, options.output)
    runs = ((record["run"], record["right"]) for record in result["runs"])
    write_results(
        options.output / "results.csv",
        ((f"{run['flipped']:.0%} flipped", run["method"], run["seed"], right) for run, right in runs),
        result["prompts"],
    )
    print((options.output / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
