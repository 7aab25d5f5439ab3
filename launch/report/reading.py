"""What run folders hold: read once, told what could not be read, for pages about one run or several."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from launch.runs import NOTES, put_aside_from
from rlhf.config import flat
from rlhf.core.errors import UserError
from rlhf.core.files import CONFIG, DATA, DONE, ENVIRONMENT, RECIPE, STATUS, WARNINGS
from rlhf.core.findings import EVALUATION, KIND
from rlhf.models.manifest import MANIFEST_NAME
from rlhf.train.held_out import HELD_OUT
from rlhf.train.status import Status, read_status

METRICS, STUDY = "metrics.jsonl", "study.json"
Rows = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The folder of one stage."""

    name: str
    """Its name on the page: the folder's own where that tells it from the others."""
    folder: Path
    stage: str
    """What its status calls it: the last word of the stage's module; or the kind that evaluation.json names."""
    status: Status | None
    metrics: Rows
    """Lines of ``metrics.jsonl``."""
    settings: Mapping[str, Any]
    """The resolved recipe, flat."""
    recipe: str
    """The same as text."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What a pipeline knows the files by that the stage read, and what others made for it."""
    seconds: float | None = None
    """How long it worked, where a pipeline says so."""
    faults: tuple[str, ...] = ()
    """What could not be read, in words."""

    @cached_property
    def columns(self) -> dict[str, tuple[list[float], list[float]]]:
        """Steps and values of each metric; a value that was not finite is left out."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.metrics:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(row["step"])
                    values.append(value)
        return found

    def last(self, name: str) -> float | None:
        """The latest value of a metric."""
        _, values = self.columns.get(name, ((), ()))
        return values[-1] if values else None

    @cached_property
    def evaluation(self) -> Mapping[str, Any]:
        return read_json(self.folder / EVALUATION)

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        return read_json(self.folder / ENVIRONMENT)

    @cached_property
    def data(self) -> Mapping[str, Any]:
        return read_json(self.folder / DATA)

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        return read_json(self.folder / "final" / MANIFEST_NAME)

    @cached_property
    def done(self) -> Mapping[str, Any]:
        return read_json(self.folder / DONE)

    def rows(self, name: str) -> Rows:
        """Lines of a file of the folder; none where it is not there."""
        return read_lines(self.folder / name)[0]

    @cached_property
    def held_out(self) -> Rows:
        return self.rows(HELD_OUT)

    @cached_property
    def warnings(self) -> Rows:
        return self.rows(WARNINGS)


def read_lines(path: Path) -> tuple[Rows, tuple[str, ...]]:
    """The JSON objects of a file, a line each, and what is wrong with the other lines."""
    rows, faults = [], []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return (), ()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            faults.append(f"{path}, line {number}: no JSON object; the line is left out")
    return tuple(rows), tuple(faults)


def read_runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    """All runs in ``folders``: each a stage's, or a pipeline's, sweep's or study's with several of them.

    Raises:
        UserError: if a folder holds no run, or single runs are of different stages.
    """
    found: list[tuple[Path, list[Run]]] = []
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected the output of a stage, or of a pipeline")
        own = _run(folder, folder.resolve().name, read_json(folder.parent / NOTES / f"{folder.name}.json"))
        runs = [own] if own is not None else list(_inside(folder))
        if not runs and not (folder / STUDY).is_file():
            raise UserError(
                f"{folder}: no run: neither {STATUS} nor {METRICS} is there, nor a folder with one; "
                "expected the output of a stage, or of a pipeline"
            )
        found.append((folder, runs))
    _check_comparable(found)
    if len(found) == 1:
        return tuple(found[0][1])
    named = [
        replace(run, name=title if run.folder == folder else f"{title}/{run.name}")
        for title, (folder, runs) in zip(_titles([folder for folder, _ in found]), found, strict=True)
        for run in runs
    ]
    return tuple(named)


def _check_comparable(found: Sequence[tuple[Path, Sequence[Run]]]) -> None:
    single = {str(folder): runs[0].stage for folder, runs in found if runs and runs[0].folder == folder}
    if len(found) > 1 and single and (len(set(single.values())) > 1 or len(single) < len(found)):
        others = {str(folder): "several stages" for folder, _ in found if str(folder) not in single}
        named = ", ".join(f"{folder} ({kind})" for folder, kind in (single | others).items())
        raise UserError(
            f"runs of different stages cannot be laid over each other: {named}; give runs of one stage, or folders of "
            "pipelines"
        )


def _titles(folders: Sequence[Path]) -> list[str]:
    """What of each path tells it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _inside(folder: Path) -> Iterator[Run]:
    """Runs in the folders of ``folder``, in the order in which they began."""
    markers = {path.stem: read_json(path) for path in sorted((folder / NOTES).glob("*.json"))}
    places = {Path(marker["output"]): name for name, marker in markers.items() if "output" in marker}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and put_aside_from(path) is None:
            places.setdefault(path.absolute(), path.name)
    runs = [_run(path, name, markers.get(name, {})) for path, name in places.items()]
    found = [run for run in runs if run is not None]
    yield from sorted(found, key=lambda run: run.status.started if run.status is not None else 0.0)


def _run(folder: Path, name: str, marker: Mapping[str, Any]) -> Run | None:
    """The run of ``folder`` itself; ``None`` if it has none. ``marker`` is what a pipeline noted of it."""
    status = read_status(folder)
    metrics, faults = read_lines(folder / METRICS)
    by_hand = str(read_json(folder / EVALUATION).get(KIND, ""))  # what rlhf evaluate wrote without being a stage
    if status is None and not metrics and not faults and not by_hand:
        return None
    whole = tuple(row for row in metrics if isinstance(row.get("step"), int))
    if len(whole) < len(metrics):
        faults += (f"{folder / METRICS}: {len(metrics) - len(whole)} lines have no step; they are left out",)
    if status is not None and status.state == "running" and faults[-1:]:
        faults = faults[:-1]  # it is just being written
    recipe = next((path for each in (CONFIG, RECIPE) if (path := folder / each).is_file()), None)
    text = "" if recipe is None else recipe.read_text(encoding="utf-8")
    return Run(
        name=name,
        folder=folder,
        stage=_stage_of(status, folder) or by_hand or "run",
        status=status,
        metrics=whole,
        settings=_settings(text),
        recipe=text,
        inputs=marker.get("parts", {}).get("inputs", {}),
        seconds=marker.get("seconds"),
        faults=faults,
    )


def _stage_of(status: Status | None, folder: Path) -> str:
    if status is not None:
        return status.stage
    try:
        return str(json.loads((folder / DONE).read_text())["stage"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _settings(text: str) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return flat(tree) if isinstance(tree, dict) else {}


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
