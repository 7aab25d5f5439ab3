"""Where each stage of a pipeline stands: a marker file by stage, and what follows from it."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from launch.pipeline.fingerprint import RESULT, TOOLS, Inputs, Parts, changes, files_in, parts_of
from launch.pipeline.recipe import load_pipeline
from launch.runs import INPUTS, NOTES, OVERRIDES, Pipeline, PipelineStage, put_aside_names, stage_logs
from rlhf.core.clock import clock
from rlhf.core.errors import STOP_FILE, ConfigError, UserError
from rlhf.core.files import DONE, RUN_FILES, STATUS, digest, write_json
from rlhf.train.status import MINUTES, new_status, read_status, remove_status, write_status

STARTED, FINISHED = "started", "finished"
LONG_WORK_SECONDS = 600.0
"""Work that took longer is not done again without being asked for."""


class Action(Enum):
    """What a pipeline does with a stage."""

    SKIP = "finished"
    START = "to do"
    CONTINUE = "half done"
    REDO = "to redo"
    WAIT = "waiting"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """An action, its reason in words where there is one to give, and what the result will depend on.

    The reason of a stage that goes on is what has changed all the same.
    """

    action: Action
    reason: str = ""
    parts: Parts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a finished stage said of itself. It is kept in the marker: the next start of any kind resets its status."""

    step: int
    """The step that it had come to."""
    metrics: Mapping[str, float | None]
    """The latest of each, as in its status."""
    evaluation: Mapping[str, Any]
    """What was measured on held-out data at the end."""


class Progress:
    """The markers of a pipeline, in the folder ``.pipeline`` of its output."""

    def __init__(
        self, pipeline: Pipeline, *, any_code: bool = False, redo: Sequence[str] = (), writes: bool = True
    ) -> None:
        """Read where the stages of ``pipeline`` stand.

        Args:
            pipeline: the pipeline.
            any_code: results of another version of the code, and of the libraries, count.
            redo: stages to do again whatever their marker says; those that build on them may be done again, too.
            writes: whether what was learned of the inputs is kept; not for somebody who only looks.
        """
        self._pipeline, self._any_code = pipeline, any_code
        self._redo = {pipeline.named(name).name for name in redo}
        self._allowed = set(self._redo)
        for stage in pipeline.stages:
            if self._allowed & {*stage.needs}:
                self._allowed.add(stage.name)
        self._folder = pipeline.output / NOTES
        self._inputs = Inputs(self._folder / INPUTS, writes=writes)
        self._decided: dict[str, Decision] = {}

    def decide(self, stage: PipelineStage) -> Decision:
        """What is to be done with ``stage``, as things stood when a stage last began or ended.

        Each stage is looked at once in between, however many build on it.
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
            action = Action.WAIT if waiting else Action.START
            return Decision(action=action, reason=f"for {', '.join(waiting)}" if waiting else "", parts=parts)
        if waiting:
            return Decision(action=Action.WAIT, reason=f"for {', '.join(waiting)}", parts=parts)
        if stage.name in self._redo:
            return Decision(action=Action.REDO, reason="asked for", parts=parts)
        changed = changes(marker["parts"], parts, RESULT)
        tools = "" if self._any_code else changes(marker["parts"], parts, TOOLS)
        if marker["state"] != FINISHED and not changed:
            return Decision(action=Action.CONTINUE, reason=tools, parts=parts)
        reason = ", ".join(filter(None, [changed, tools])) or _fault(stage, marker)
        if reason is None:
            return Decision(action=Action.SKIP, parts=parts)
        return Decision(action=Action.REDO, reason=reason, parts=parts)

    def check_redo(self, stages: Sequence[PipelineStage]) -> None:
        """Refuse to do long work again that nobody asked to do again.

        Raises:
            UserError: naming all such stages.
        """
        decisions = {stage.name: self.decide(stage) for stage in stages if stage.name not in self._allowed}
        lines = []
        for stage in stages:
            decision, seconds = decisions.get(stage.name), self._seconds(stage)
            if decision is not None and decision.action is Action.REDO and seconds > LONG_WORK_SECONDS:
                lines.append(
                    f"{stage.name} has worked for {clock(seconds)} and would be done again: {decision.reason}; to have "
                    f"that: --redo {stage.name}"
                )
        if lines:
            keep = "to keep what is there: the settings and files of then; --any-code where code or versions changed"
            raise UserError("\n".join([*lines, keep]))

    def _seconds(self, stage: PipelineStage) -> float:
        """How long a stage has worked, also for a pipeline that was killed and could not write it down."""
        noted, status = (self.read(stage) or {}).get("seconds", 0.0), read_status(stage.output)
        minutes = status.metrics.get(MINUTES) if status is not None else None
        return max(noted, 60 * (minutes or 0.0))

    def settle(self, stage: PipelineStage) -> None:
        """Note that a stage has finished whose pipeline was killed before it could write that down."""
        marker = self.read(stage)
        status = read_status(stage.output)
        ended_well = status is not None and status.state == "finished" and (stage.output / DONE).is_file()
        if marker is not None and marker["state"] == STARTED and ended_well:
            self.finish(stage, 0.0)

    def start(self, stage: PipelineStage, decision: Decision) -> None:
        """Note that ``stage`` is begun. An earlier result that no longer counts is put aside first."""
        if decision.action is Action.REDO:
            self._put_aside(stage)
            self._redo.discard(stage.name)
        for leftover in (DONE, STOP_FILE):
            (stage.output / leftover).unlink(missing_ok=True)
        goes_on = decision.action is Action.CONTINUE
        earlier, status = (self.read(stage), read_status(stage.output)) if goes_on else (None, None)
        seconds = (earlier or {}).get("seconds", 0.0)
        remove_status(stage.output)  # before the marker: killed in between, nothing there says that it has finished
        self._write(stage, {"state": STARTED, "parts": decision.parts, "seconds": seconds})
        # Until the stage itself speaks, the pipeline speaks for it: killed by then, both are gone.
        write_status(stage.output, new_status(stage.stage.name, metrics=status.metrics if status is not None else {}))
        stage.write_recipe()

    def interrupt(self, stage: PipelineStage, seconds: float) -> None:
        """Note that ``stage`` has worked for ``seconds`` and is not finished."""
        marker = self.read(stage) or {}
        self._write(stage, marker | {"seconds": marker.get("seconds", 0.0) + seconds})

    def speak_for(self, stage: PipelineStage, state: Literal["stopped", "failed"], reason: str) -> None:
        """Say how ``stage`` ended that is gone, and left behind that it runs."""
        status = read_status(stage.output) or new_status(stage.stage.name)
        if status.state == "running":
            ended = replace(status, state=state, phase=state, reason=reason, eta_seconds=None, updated=time.time())
            with contextlib.suppress(OSError):  # the disk may be what it died of
                write_status(stage.output, ended)

    def finish(self, stage: PipelineStage, seconds: float) -> None:
        """Note that ``stage`` has finished, what it published, and what it measured."""
        marker, status = self.read(stage) or {}, read_status(stage.output)
        if status is not None:
            said = {"step": status.step, "metrics": status.metrics, "evaluation": status.evaluation}
            marker["measured"] = said
        stats = _stats(stage.final)
        result = digest(json.dumps([self._inputs.checksum(stage.final)]))
        total = marker.get("seconds", 0.0) + seconds
        self._write(stage, marker | {"state": FINISHED, "result": result, "files": stats, "seconds": total})

    def read(self, stage: PipelineStage) -> dict[str, Any] | None:
        return _read(self._path(stage))

    def measured(self, stage: PipelineStage) -> Measured | None:
        """What ``stage`` said of itself when it finished; ``None`` if it has not."""
        said = (self.read(stage) or {}).get("measured")
        return None if said is None else Measured(**said)

    def check_free(self, stages: Sequence[PipelineStage]) -> None:
        """Refuse to begin in folders of ``stages`` that hold something which no pipeline put there.

        Raises:
            UserError: naming all of them.
        """
        new = [stage for stage in stages if stage.stage.trains and stage.output.is_dir() and self.read(stage) is None]
        taken = [each for each in new if any(path.name not in RUN_FILES for path in files_in(each.output))]
        if taken:
            elsewhere = " ".join(dict.fromkeys(self._pipeline.elsewhere.format(stage=each.name) for each in taken))
            raise UserError(
                f"{', '.join(str(each.output) for each in taken)}: holds something that this did not start: move it "
                f"away, or give another folder: {elsewhere}"
            )

    def remember(self) -> None:
        """Keep the settings that the command line gave, for calls that do not repeat them."""
        path = _overrides_file(self._pipeline.output)
        if self._pipeline.overrides or path.exists():
            write_json(path, {"recipe": _name(self._pipeline.recipe), "overrides": [*self._pipeline.overrides]})

    def log_folder(self, stage: PipelineStage) -> Path:
        return stage_logs(self._pipeline.output, stage.name)

    def _results(self, stage: PipelineStage) -> dict[str, str]:
        """Names for what the finished ones of those that ``stage`` needs have published."""
        markers = {each.name: self.read(each) for each in self._pipeline.upstream(stage)}
        return {name: marker["result"] for name, marker in markers.items() if marker and marker["state"] == FINISHED}

    def _put_aside(self, stage: PipelineStage) -> None:
        """Keep the run that no longer counts as ``<folder>.before``, or ``.before-2`` and so on. Nothing is deleted."""
        if not stage.stage.trains or not stage.output.exists():
            return
        names = put_aside_names(stage.output)
        stage.output.rename(next(path for path in names if not path.exists()))

    def _path(self, stage: PipelineStage) -> Path:
        return self._folder / f"{stage.name}.json"

    def _write(self, stage: PipelineStage, marker: dict[str, Any]) -> None:
        write_json(self._path(stage), marker | {"output": os.path.abspath(stage.output)})
        self._decided.clear()


def load_remembering(path: Path, overrides: Sequence[str] = (), *, forget: bool = False) -> Pipeline:
    """The pipeline of a recipe, with the settings that an earlier run in its folder was given on its command line.

    Args:
        path: the recipe.
        overrides: of this call; of a key that both name, this one counts.
        forget: leave out those of earlier calls.
    Raises:
        ConfigError: as :func:`load_pipeline`, saying so where it is about what an earlier call gave.
    """
    pipeline = load_pipeline(path, overrides)
    kept = kept_settings(pipeline.output, path, overrides)
    if forget or not kept:
        return pipeline
    try:
        return replace(load_pipeline(path, [*kept, *overrides]), remembered=tuple(kept))
    except ConfigError as error:
        raise ConfigError(f"{error}\n  with {' '.join(kept)} of an earlier call; --forget leaves that out") from None


def kept_settings(output: Path, recipe: Path, overrides: Sequence[str]) -> list[str]:
    """What an earlier run of ``recipe`` in ``output`` was given on its command line, and ``overrides`` do not name."""
    try:
        found = json.loads(_overrides_file(output).read_text())
    except (OSError, ValueError):
        return []
    given = {"output", *(override.partition("=")[0] for override in overrides)}
    kept = found["overrides"] if found["recipe"] == _name(recipe) else []
    return [each for each in kept if each.partition("=")[0] not in given]


def _overrides_file(output: Path) -> Path:
    return output / NOTES / OVERRIDES


def _name(recipe: Path | None) -> str:
    return str(recipe.resolve()) if recipe is not None else ""


def _read(path: Path) -> dict[str, Any] | None:
    """A marker; ``None`` if there is none, or none that can be read."""
    try:
        marker = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and "parts" in marker else None


def _fault(stage: PipelineStage, marker: dict[str, Any]) -> str | None:
    """What is wrong with the files of a finished stage."""
    if not any((stage.output / name).is_file() for name in (DONE, STATUS)):
        return f"{stage.output} is gone"  # also where it published nothing that could be missed
    now = _stats(stage.final)
    for name, state in marker["files"].items():
        if name not in now:
            return f"{stage.final / name} is gone"
        if now[name] != state:
            return f"{stage.final / name} was changed"
    return None


def _stats(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of the files in ``folder``."""
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files_in(folder)}
