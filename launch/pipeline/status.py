"""``rlhf pipeline status``: where every stage stands, read from what is on the disk."""

from rich.console import Console
from rich.table import Table

from launch.pipeline.overview import Overview, outcome
from launch.pipeline.recipe import Pipeline, PipelineStage
from launch.pipeline.state import Action, Progress
from rlhf.train.status import read_status


def status_table(pipeline: Pipeline, *, any_code: bool = False) -> Table:
    """The table that a run would show, with what it would do.

    Raises:
        UserError: if a run would be refused, as a folder of its stages holds something else.
    """
    view = Overview(pipeline, Console(quiet=True))
    progress = Progress(pipeline, any_code=any_code)
    progress.check_free(pipeline.stages)
    for stage in pipeline.stages:
        marker = progress.read(stage) or {}
        state, detail = _standing(stage, progress)
        view.show(stage.name, state, detail, marker.get("seconds"))
    return view.table()


def _standing(stage: PipelineStage, progress: Progress) -> tuple[str, str]:
    decision = progress.decide(stage)
    if decision.action is Action.SKIP:
        return Action.SKIP.value, outcome(stage, progress.measured(stage))
    if decision.action is Action.CONTINUE:
        status = read_status(stage.output)
        if status is None:
            return decision.action.value, ""
        if status.state == "running" and not status.is_gone:
            return "running", status.where
        return decision.action.value, status.reason or status.where
    return decision.action.value, decision.reason
