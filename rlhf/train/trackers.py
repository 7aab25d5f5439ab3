"""Where the metrics of a run may be shown besides ``metrics.jsonl``: TensorBoard, W&B, MLflow, Trackio, Prometheus.

Each is a few lines behind one interface. The main rank alone has them. None may stop or spoil a run: what cannot be
reached is said once, and training goes on.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import yaml

from rlhf.config_options import flat
from rlhf.core.errors import ConfigError, RunStopped
from rlhf.core.files import write_json, write_text
from rlhf.train.options import TrainConfig

log = logging.getLogger(__name__)

IDS = "tracking.json"
"""The file in a run folder that holds the names under which services know the run."""
START_SECONDS = 60
"""Seconds until a service that does not answer at the start is done without."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a service is told of a run."""

    folder: Path
    recipe: str
    """The resolved recipe, in YAML."""
    step: int
    """The step that it goes on from; a run that begins, at -1, is a new one to every service."""

    @property
    def group(self) -> str:
        """The name of the pipeline or sweep: its folder holds one folder for each run."""
        return self.folder.absolute().parent.name

    @property
    def name(self) -> str:
        return f"{self.group}/{self.folder.name}"

    @property
    def settings(self) -> dict[str, Any]:
        return yaml.safe_load(self.recipe) or {}

    def known_as(self, service: str) -> str | None:
        """The name under which ``service`` has the steps before this one."""
        return self._ids().get(service) if self.step >= 0 else None

    def remember(self, service: str, name: str) -> None:
        write_json(self.folder / IDS, self._ids() | {service: name})

    def _ids(self) -> dict[str, str]:
        try:
            return json.loads((self.folder / IDS).read_text())
        except (OSError, ValueError):
            return {}


class Tracker(Protocol):
    """One service."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, error: BaseException | None) -> None:
        """``error`` ended the run; ``None`` if it has finished, ``RunStopped`` if it is to be continued."""


class TensorBoard:
    """Event files in the run folder. Steps that are taken again after a resume replace the earlier ones."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def close(self, error: BaseException | None) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases. Without a key or a network it writes into the run folder, to be sent by ``wandb sync``."""

    def __init__(self, project: str, run: TrackedRun) -> None:
        import wandb

        name = run.known_as("wandb") or secrets.token_hex(4)
        given: dict[str, Any] = {
            "project": project,
            "id": name,
            "resume": "allow",
            "dir": str(run.folder),
            "name": os.environ.get("WANDB_NAME", run.name),
            "group": os.environ.get("WANDB_RUN_GROUP", run.group),
            "config": run.settings,
            "settings": wandb.Settings(init_timeout=START_SECONDS, console="off"),
        }
        try:
            self._run = wandb.init(**given)
        except wandb.Error as error:
            log.warning("train.wandb_project: %s; kept in %s/wandb, for wandb sync", _first_line(error), run.folder)
            wandb.teardown()  # it holds the name of the run otherwise
            self._run = wandb.init(**given, mode="offline")
        run.remember("wandb", name)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, error: BaseException | None) -> None:
        if isinstance(error, RunStopped):
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if error is None else 1)


class MLflow:
    """MLflow, at ``MLFLOW_TRACKING_URI``. A server that does not answer is asked once more, not for minutes."""

    def __init__(self, experiment: str, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(START_SECONDS // 2))
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(experiment)
        tags = {"mlflow.runName": run.name, "group": run.group}
        self._id = mlflow.start_run(run_id=run.known_as("mlflow"), run_name=run.name, tags=tags).info.run_id
        run.remember("mlflow", self._id)
        if run.step < 0:
            mlflow.log_params({name: str(value)[:500] for name, value in flat(run.settings).items()})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step, run_id=self._id)

    def close(self, error: BaseException | None) -> None:
        stopped = isinstance(error, RunStopped)
        self._mlflow.end_run("FINISHED" if error is None else "KILLED" if stopped else "FAILED")


class Trackio:
    """Trackio: a local board, or one in a Space that ``TRACKIO_SPACE_ID`` names."""

    def __init__(self, project: str, run: TrackedRun) -> None:
        import trackio

        self._run = trackio.init(
            project=project,
            name=run.name,
            group=run.group,
            config=run.settings,
            resume="allow" if run.step >= 0 else "never",
            embed=False,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, error: BaseException | None) -> None:
        self._run.finish()


class Prometheus:
    """The latest value of each metric as a text file, for the textfile collector of node_exporter."""

    def __init__(self, path: Path, run: TrackedRun) -> None:
        self._path, self._labels = path.expanduser(), f'{{run="{_quoted(run.name)}"}}'
        self._latest: dict[str, float] = {}
        self._write()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._latest |= metrics
        self._latest["step"] = step
        self._write()

    def close(self, error: BaseException | None) -> None:
        self._latest["running"] = 0
        self._write()

    def _write(self) -> None:
        lines = []
        for name, value in sorted({"running": 1, **self._latest}.items()):
            metric = "margin_rlhf_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            lines += [f"# TYPE {metric} gauge\n", f"{metric}{self._labels} {_number(value)}\n"]
        write_text(self._path, "".join(lines), durable=False)


Start = Callable[[TrackedRun], Tracker]


def wanted(config: TrainConfig) -> dict[str, tuple[Start, str | None]]:
    """The services that a recipe asks for: by its key, how to start one, and the package that it needs."""
    found: dict[str, tuple[Start, str | None]] = {}
    if config.tensorboard:
        found["train.tensorboard"] = TensorBoard, "tensorboard"
    if (project := config.wandb_project) is not None:
        found["train.wandb_project"] = lambda run: Wandb(project, run), "wandb"
    if (experiment := config.mlflow_experiment) is not None:
        found["train.mlflow_experiment"] = lambda run: MLflow(experiment, run), "mlflow"
    if (board := config.trackio_project) is not None:
        found["train.trackio_project"] = lambda run: Trackio(board, run), "trackio"
    if (path := config.prometheus_file) is not None:
        found["train.prometheus_file"] = lambda run: Prometheus(path, run), None
    return found


def check_trackers(config: TrainConfig) -> None:
    """Refuse to begin without a package that the recipe asks for.

    Raises:
        ConfigError: naming the key and the package.
    """
    for key, (_, package) in wanted(config).items():
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key} is set, but {package} is not installed: pip install 'margin-rlhf[{package}]'")


class Trackers:
    """All services of a run. Use as a context manager, on the main rank."""

    def __init__(self, config: TrainConfig, run: TrackedRun) -> None:
        self._config, self._run = config, run
        self._open: dict[str, Tracker] = {}

    def __enter__(self) -> "Trackers":
        for key, (start, _) in wanted(self._config).items():
            with self._doing_without(key, "cannot be started"):
                self._open[key] = start(self._run)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for key, tracker in [*self._open.items()]:
            with self._doing_without(key, "did not end well"):
                tracker.close(error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, tracker in [*self._open.items()]:
            with self._doing_without(key, f"failed at step {step}"):
                tracker.write(step, metrics)

    @contextlib.contextmanager
    def _doing_without(self, key: str, what: str) -> Iterator[None]:
        """Drop the service of ``key`` if it raises whatever: it is not what the run is for."""
        try:
            yield
        except Exception as error:
            self._open.pop(key, None)
            log.warning("%s %s: %s; the run goes on without it, metrics.jsonl has all", key, what, _first_line(error))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(str(float(value)), repr(float(value)))
