"""Pipelines of stages that take no time."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from launch import stages
from launch.jobs.launcher import Machine
from launch.pipeline import recipe as recipes
from launch.pipeline import run
from launch.pipeline.processes import MARK
from launch.pipeline.recipe import load_pipeline
from launch.pipeline.run import PipelineRun, RunOptions
from launch.stages import Stage

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).resolve().parents[3]


def marked(folder: Path) -> list[int]:
    """Processes that a pipeline in ``folder`` has started, straight from /proc."""
    wanted, found = f"{MARK}={folder.resolve()}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def processes_of():
    return marked


class Toys:
    """Writes pipeline recipes of toy stages and runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "toys.yaml"
        self.console = Console(record=True, width=200)

    def write(self, stages: dict, **more) -> Path:
        entries = {name: {"kind": "toy", **entry} for name, entry in stages.items()}
        recipe = {"output": str(self.folder / "out"), **more, "stages": entries}
        self.path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return self.path

    def load(self, *overrides: str):
        return load_pipeline(self.path, overrides)

    def run(self, *overrides: str, **options) -> int:
        settings = RunOptions(machine=Machine(ranks=1), doctor=False, **options)
        return PipelineRun(self.load(*overrides), settings, self.console).run()

    def processes(self) -> list[int]:
        """Of the pipeline, but not the one that runs it."""
        return marked(self.folder / "out")

    def starts(self, name: str) -> int:
        path = self.folder / "out" / name / "starts"
        return len(path.read_text()) if path.exists() else 0

    def number(self, name: str) -> int:
        return int((self.folder / "out" / name / "final" / "number").read_text())

    @property
    def said(self) -> str:
        return self.console.export_text(clear=True)


@pytest.fixture
def toys(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{WORKERS}")
    monkeypatch.syspath_prepend(str(WORKERS))
    config = "toy_stage:ToyConfig"
    toy = Stage(name="toy", module="toy_stage", config=config, metric="eval/number", trains=False, alone=True)
    monkeypatch.setitem(stages.STAGES, "toy", toy)
    assert recipes.STAGES is stages.STAGES
    yield Toys(tmp_path)
    sys.modules.pop("toy_stage", None)


@pytest.fixture
def training_toys(toys, monkeypatch):
    """They count as stages that train, but are started without a launcher."""
    monkeypatch.setitem(stages.STAGES, "toy", replace(stages.STAGES["toy"], trains=True, alone=False))
    command = lambda stage, arguments, machine: [sys.executable, "-m", stage.module, *arguments]  # noqa: E731
    monkeypatch.setattr(run, "stage_command", command)
    return toys
