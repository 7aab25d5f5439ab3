"""Where each stage of a pipeline stands: a marker file by stage, and what follows from it."""

import json
import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from launch.pipeline.fingerprint import Inputs, Parts, changes, files_in, fingerprint, parts_of
from launch.pipeline.recipe import Pipeline, PipelineStage
from rlhf.core.errors import STOP_FILE, UserError
from rlhf.core.files import DONE, RUN_FILES, digest, write_json
from rlhf.train.status import new_status, read_status, remove_status, write_status

STARTED, FINISHED = "started", "finished"


class Action(Enum):
    """What a pipeline does with a stage."""

    SKIP = "finished"
    START = "to do"
    CONTINUE = "half done"
    REDO = "to redo"
    WAIT = "waiting"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """An action, its reason in words where there is one to give, and what the result will depend on."""

    action: Action
    reason: str = ""
    parts: Parts


class Progress:
    """The markers of a pipeline, in the folder ``.pipeline`` of its output."""

    def __init__(self, pipeline: Pipeline, *, any_code: bool = False) -> None:
        """``any_code``: results of another version of the code count."""
        self._pipeline, self._any_code = pipeline, any_code
        self._folder = pipeline.output / ".pipeline"
        self._inputs = Inputs(self._folder / "inputs.json")
        self._decided: dict[str, Decision] = {}

    def decide(self, stage: PipelineStage) -> Decision:
        """What is to be done with ``stage``, as things stood when a stage last began or ended.

        Each stage is looked at once in between, however many build on it.

        Raises:
            UserError: if its folder holds something that no pipeline put there.
        """
        if stage.name not in self._decided:
            self._decided[stage.name] = self._decision(stage)
        return self._decided[stage.name]

    def _decision(self, stage: PipelineStage) -> Decision:
        marker = self.read(stage)
        parts = parts_of(stage, self._pipeline, self._inputs, self._results(stage))
        upstream = self._pipeline.upstream(stage)
        waiting = [each.name for each in upstream if self.decide(each).action is not Action.SKIP]
        if marker is None:
            self._check_free(stage)
            action = Action.WAIT if waiting else Action.START
            return Decision(action=action, reason=f"for {', '.join(waiting)}" if waiting else "", parts=parts)
        if waiting:
            return Decision(action=Action.WAIT, reason=f"for {', '.join(waiting)}", parts=parts)
        before = marker["parts"] | {"code": parts["code"]} if self._any_code else marker["parts"]
        if fingerprint(before) != fingerprint(parts):
            return Decision(action=Action.REDO, reason=changes(before, parts), parts=parts)
        if marker["state"] == FINISHED:
            fault = _fault(stage, marker)
            if fault is None:
                return Decision(action=Action.SKIP, parts=parts)
            return Decision(action=Action.REDO, reason=fault, parts=parts)
        return Decision(action=Action.CONTINUE, parts=parts)

    def settle(self, stage: PipelineStage) -> None:
        """Note that a stage has finished whose pipeline was killed before it could write that down."""
        marker = self.read(stage)
        status = read_status(stage.output)
        ended_well = status is not None and status.state == "finished"
        if marker is not None and marker["state"] == STARTED and ended_well:
            self.finish(stage, 0.0)

    def start(self, stage: PipelineStage, decision: Decision) -> None:
        """Note that ``stage`` is begun. An earlier result that no longer counts is put aside first."""
        if decision.action is Action.REDO:
            self._put_aside(stage)
        for leftover in (DONE, STOP_FILE):
            (stage.output / leftover).unlink(missing_ok=True)
        goes_on = decision.action is Action.CONTINUE
        earlier, status = (self.read(stage), read_status(stage.output)) if goes_on else (None, None)
        seconds = (earlier or {}).get("seconds", 0.0)
        self._write(stage, {"state": STARTED, "parts": decision.parts, "seconds": seconds})
        remove_status(stage.output)
        # Until the stage itself speaks, the pipeline speaks for it: killed by then, both are gone.
        write_status(stage.output, new_status(stage.kind, metrics=status.metrics if status is not None else {}))
        stage.write_recipe()

    def interrupt(self, stage: PipelineStage, seconds: float) -> None:
        """Note that ``stage`` has worked for ``seconds`` and is not finished."""
        marker = self.read(stage) or {}
        self._write(stage, marker | {"seconds": marker.get("seconds", 0.0) + seconds})

    def finish(self, stage: PipelineStage, seconds: float) -> None:
        """Note that ``stage`` has finished, and what it published."""
        marker = self.read(stage) or {}
        stats = _stats(stage.final)
        result = digest(json.dumps([self._inputs.checksum(stage.final)]))
        total = marker.get("seconds", 0.0) + seconds
        self._write(stage, marker | {"state": FINISHED, "result": result, "files": stats, "seconds": total})

    def read(self, stage: PipelineStage) -> dict[str, Any] | None:
        return _read(self._path(stage))

    def log_folder(self, stage: PipelineStage) -> Path:
        return self.logs / stage.name

    @property
    def logs(self) -> Path:
        return self._pipeline.output / "logs"

    def _results(self, stage: PipelineStage) -> dict[str, str]:
        """Names for what the finished ones of those that ``stage`` needs have published."""
        markers = {each.name: self.read(each) for each in self._pipeline.upstream(stage)}
        return {name: marker["result"] for name, marker in markers.items() if marker and marker["state"] == FINISHED}

    def _put_aside(self, stage: PipelineStage) -> None:
        """Keep the run that no longer counts as ``<folder>.before``; one that was there makes room.

        A finished run does not make room for a half-done one: that goes.
        """
        if not stage.stage.trains or not stage.output.exists():
            return
        aside = stage.output.with_name(f"{stage.output.name}.before")
        if (aside / DONE).is_file() and not (stage.output / DONE).is_file():
            shutil.rmtree(stage.output)
            return
        shutil.rmtree(aside, ignore_errors=True)
        stage.output.rename(aside)

    def _check_free(self, stage: PipelineStage) -> None:
        if not stage.stage.trains or not stage.output.is_dir():
            return
        if any(path.name not in RUN_FILES for path in files_in(stage.output)):
            raise UserError(
                f"{stage.output} holds something that this pipeline did not start: move it away, or give the stage "
                f"another folder: {stage.name}.output=FOLDER"
            )

    def _path(self, stage: PipelineStage) -> Path:
        return self._folder / f"{stage.name}.json"

    def _write(self, stage: PipelineStage, marker: dict[str, Any]) -> None:
        write_json(self._path(stage), marker)
        self._decided.clear()


def _read(path: Path) -> dict[str, Any] | None:
    """A marker; ``None`` if there is none, or none that can be read."""
    try:
        marker = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and "parts" in marker else None


def _fault(stage: PipelineStage, marker: dict[str, Any]) -> str | None:
    """What is wrong with the files of a finished stage."""
    now = _stats(stage.final)
    for name, state in marker["files"].items():
        if name not in now:
            return f"{stage.final / name} is gone"
        if now[name] != state:
            return f"{stage.final / name} was changed"
    return None


def _stats(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of the files in ``folder``."""
    return {
        str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files_in(folder)
    }
