"""``rlhf pipeline status``: where every stage stands, read from what is on the disk."""

from rich.console import Console
from rich.table import Table

from launch.jobs import log
from launch.pipeline.overview import Overview, outcome
from launch.pipeline.processes import is_running
from launch.pipeline.recipe import Pipeline, PipelineStage
from launch.pipeline.state import Action, Progress


def status_table(pipeline: Pipeline, *, any_code: bool = False) -> Table:
    """The table that a run would show, with what it would do."""
    view = Overview(pipeline, Console(quiet=True))
    progress, at_work = Progress(pipeline, any_code=any_code), is_running(pipeline)
    for stage in pipeline.stages:
        marker = progress.read(stage) or {}
        state, detail = _standing(stage, progress, at_work)
        at_work = at_work and state != "running"
        view.show(stage.name, state, detail, marker.get("seconds"))
    return view.table()


def _standing(stage: PipelineStage, progress: Progress, at_work: bool) -> tuple[str, str]:
    decision = progress.decide(stage)
    if decision.action is Action.SKIP:
        return Action.SKIP.value, outcome(stage)
    if decision.action is Action.CONTINUE:
        where = log.progress_line(progress.log_folder(stage) / "rank0.log") or ""
        return ("running" if at_work else decision.action.value), where
    return decision.action.value, decision.reason
