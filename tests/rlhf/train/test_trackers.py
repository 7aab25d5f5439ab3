"""Services that show metrics: the real ones, offline; what a service does must not matter to the run."""

import contextlib
import json
import logging
import math
import os
import re
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policy.sft.config import SftConfig
from rlhf.config import load_config
from rlhf.core.errors import ConfigError, RunStopped
from rlhf.engine.ranks import Ranks
from rlhf.train import trackers
from rlhf.train.metrics import MetricLog, drop_rows_after
from rlhf.train.options import TrainConfig

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
RECIPE = "model: {path: m}\noptim: {learning_rate: 0.1}\n"
QUIET = TrainConfig(tensorboard=False)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pipeline" / "reward"
    path.mkdir(parents=True)
    return path


def track(folder, config, steps, resume_step=-1, error=None):
    """A run of ``steps`` with the loss 1 / step, as the training loop logs it."""
    log = MetricLog(folder, ALONE, config, recipe=RECIPE, resume_step=resume_step)
    with contextlib.suppress(RunStopped, ZeroDivisionError), log:
        for step in steps:
            log.write(step, {"loss": 1 / step, "eval/accuracy": 0.5})
        if error is not None:
            raise error


def curve(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("end", ["\u2028", "\x85"])
def test_rows_whose_texts_hold_other_ends_of_lines_are_kept_when_later_ones_are_dropped(tmp_path, end):
    rows = [json.dumps({"step": step, "response": f"one{end}two"}, ensure_ascii=False) + "\n" for step in (1, 2, 3)]
    cut = '{"step": 2, "response": "\u00e9'.encode()[:-1]  # killed within a character
    (tmp_path / "rollouts.jsonl").write_bytes("".join(rows).encode() + cut)
    drop_rows_after(tmp_path / "rollouts.jsonl", 2)
    assert (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8") == rows[0] + rows[1]


def test_tensorboard_replaces_steps_that_are_taken_again(folder):
    config = replace(QUIET, tensorboard=True)
    track(folder, config, [1, 2, 3])
    track(folder, config, [3, 4], resume_step=2)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4] == curve(folder)


@pytest.mark.slow
def test_wandb_without_a_network_keeps_one_run_over_all_starts(folder, monkeypatch):
    """No key, no mode: a machine that has never heard of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(folder / "none"))
    config = replace(QUIET, wandb_project="margins")
    track(folder, config, [1, 2], error=RunStopped("SIGTERM", "at step 2", 2))
    first = json.loads((folder / "tracking.json").read_text())["wandb"]
    track(folder, config, [3], resume_step=2)
    written = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert len(written) == 2 and all(name.endswith(f"-{first}") for name in written)
    track(folder, config, [1])
    assert json.loads((folder / "tracking.json").read_text())["wandb"] != first, "a run anew is another one"
    records = b"".join(path.read_bytes() for path in (folder / "wandb").rglob("*.wandb"))
    assert b"margins" in records and b"pipeline/reward" in records and b"learning_rate" in records


class StandIn(ModuleType):
    """What is used of mlflow 3.17. DeepSpeed imports the real one where it is there, with threads that forks forbid."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.now = {}, None

    def set_experiment(self, name):
        self.experiment = name

    def start_run(self, run_id=None, run_name=None, tags=None):
        assert run_id is None or run_id in self.runs
        self.now = run_id or f"id{len(self.runs)}"
        self.runs.setdefault(self.now, {"name": run_name, "group": tags["group"], "params": {}, "loss": []})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.now))

    def log_params(self, params):
        self.runs[self.now]["params"] |= params

    def log_metrics(self, metrics, step, run_id):
        self.runs[run_id]["loss"].append((step, metrics["loss"]))

    def end_run(self, status):
        self.runs[self.now]["status"] = status


def test_mlflow_has_one_run_with_settings_curve_and_end(folder, monkeypatch):
    mlflow = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    config = replace(QUIET, mlflow_experiment="margins")
    track(folder, config, [1, 2], error=RunStopped("SIGTERM", "at step 2", 2))
    assert mlflow.runs["id0"]["status"] == "KILLED"
    track(folder, config, [3], resume_step=2)
    track(folder, config, [1], error=ZeroDivisionError())
    settings = {"model.path": "m", "optim.learning_rate": "0.1"}
    named = {"name": "pipeline/reward", "group": "pipeline", "params": settings}
    whole = {"loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)], "status": "FINISHED"}
    assert mlflow.runs == {"id0": named | whole, "id1": named | {"loss": [(1, 1.0)], "status": "FAILED"}}


@pytest.mark.slow
def test_trackio_has_the_curve(folder, monkeypatch):
    import trackio.utils

    place = folder.parent / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(place))
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", place)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", place)
    config = replace(QUIET, trackio_project="margins")
    track(folder, config, [1, 2])
    track(folder, config, [3], resume_step=2)
    with sqlite3.connect(place / "margins.db") as database:
        found = database.execute("select run_name, step from metrics order by step").fetchall()
    assert found == [("pipeline/reward", step) for step in (1, 2, 3)]


def test_prometheus_reads_the_latest_values_and_whether_it_runs(folder, tmp_path):
    path = tmp_path / "collector" / "run.prom"
    config = replace(QUIET, prometheus_file=path)
    with MetricLog(folder, ALONE, config, recipe=RECIPE, resume_step=-1) as log:
        log.write(1, {"loss": 2.0, "eval/accuracy": 0.25})
        log.write(2, {"loss": math.nan})
        said = path.read_text()
    line = re.compile(r'(# TYPE [a-z_]+ gauge|[a-zA-Z_]+\{run="pipeline/reward"\} (NaN|[+-]?[0-9.e+-]+))\n')
    assert line.sub("", said) == ""
    values = dict(re.findall(r"^margin_rlhf_(\w+)\{.*\} (.*)$", said, re.M))
    assert values == {"loss": "NaN", "eval_accuracy": "0.25", "step": "2.0", "running": "1.0"}
    assert 'running{run="pipeline/reward"} 0.0' in path.read_text()


@pytest.mark.parametrize("broken", ["__init__", "write", "close"])
def test_a_service_that_fails_is_done_without(folder, monkeypatch, caplog, broken):
    class Service:
        def __init__(self, run):
            self.fail("__init__")

        def write(self, step, metrics):
            self.fail("write")

        def close(self, error):
            self.fail("close")

        def fail(self, where):
            calls.append(where)
            if where == broken:
                raise ConnectionError("no route to host\nmore")

    calls = []
    monkeypatch.setattr(trackers, "wanted", lambda config: {"train.service": (Service, None)})
    with caplog.at_level(logging.WARNING):
        track(folder, QUIET, [1, 2, 3])
    assert curve(folder) == [1, 2, 3] and calls.count("write") == {"__init__": 0, "write": 1, "close": 3}[broken]
    (said,) = caplog.messages
    assert said.startswith("train.service") and said.count("\n") == 0 and "no route to host" in said


def test_a_prometheus_file_that_cannot_be_written_is_done_without(folder, caplog):
    track(folder, replace(QUIET, prometheus_file=folder / "metrics.jsonl" / "x.prom"), [1])
    assert curve(folder) == [1] and "train.prometheus_file cannot be started" in caplog.text


@pytest.mark.parametrize("key", ["wandb_project", "mlflow_experiment", "trackio_project", "tensorboard"])
def test_a_package_that_is_not_there_is_told_before_anything_is_read(monkeypatch, key):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = True if key == "tensorboard" else "p"
    with pytest.raises(ConfigError, match=rf"train.{key} is set, but (\w+) is not installed: pip install .*\[\1\]"):
        trackers.check_trackers(replace(QUIET, **{key: given}))


def test_ids_that_cannot_be_read_begin_anew(folder):
    (folder / "tracking.json").write_text("{")
    run = trackers.TrackedRun(folder=folder, recipe=RECIPE, step=3)
    assert run.known_as("wandb") is None
    run.remember("wandb", "a")
    assert run.known_as("wandb") == "a" and Path(run.folder / "tracking.json").is_file()


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("wandb_project", "''"),
        ("wandb_project", "'  '"),
        ("mlflow_experiment", "''"),
        ("trackio_project", "''"),
        ("prometheus_file", "''"),
    ],
)
def test_a_service_without_a_name_is_refused_and_null_is_none(key, given):
    def load(text: str) -> TrainConfig:
        words = ("model.path=m", "data.train=t.jsonl", "output=o", f"train.{key}={text}")
        return load_config(SftConfig, [], words, program="sft").train

    with pytest.raises(ConfigError, match=rf"train: {key} is empty; give it a name, or {key}=null to do without"):
        load(given)
    assert getattr(load("null"), key) is None
