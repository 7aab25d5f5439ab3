"""From a pipeline to what the checks look at."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.doctor.finding import PlannedStage, Subject

if TYPE_CHECKING:
    from launch.pipeline.recipe import Pipeline, PipelineStage
    from rlhf.models.options import BackboneConfig


def pipeline_subject(
    pipeline: "Pipeline",
    ahead: "Sequence[PipelineStage] | None" = None,
    *,
    ranks: int | None = None,
    hostfile: Path | None = None,
    hosts: Mapping[str, int] | None = None,
) -> Subject:
    """What a machine has to be ready for.

    Args:
        pipeline: all of it; stages that are done count as what others start from.
        ahead: the stages that are still to run; ``None`` for all.
        ranks, hostfile, hosts: see :class:`Subject`.
    """
    stages = pipeline.stages if ahead is None else ahead
    return Subject(
        ranks=ranks,
        hostfile=hostfile,
        hosts=hosts or {},
        output=pipeline.output,
        stages=tuple(
            PlannedStage(name=each.name, kind=each.kind, config=each.config, ranks=each.ranks) for each in stages
        ),
        made=_made(pipeline),
        published=tuple(folder for each in pipeline.stages for folder in (each.output, each.final)),
    )


def _made(pipeline: "Pipeline") -> "dict[str, BackboneConfig]":
    """By folder, as other stages spell it: what a stage's model starts from."""
    from launch.pipeline.recipe import flat, texts
    from launch.plan.models import made_by

    starts = {os.path.normpath(each.final): made_by(each.kind, each.config) for each in pipeline.stages}
    spelled = {text: os.path.normpath(text) for each in pipeline.stages for text in texts(flat(each.config))}
    found = {path: starts.get(folder) for path, folder in (spelled | {path: path for path in starts}).items()}
    return {path: start for path, start in found.items() if start is not None}
