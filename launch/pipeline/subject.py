"""What the checks look at in a pipeline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.doctor.subject import PlannedStage, Subject
from launch.stages import models_of
from rlhf.models.roles import published_role

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
            PlannedStage(name=each.name, stage=each.stage, config=each.config, ranks=each.ranks) for each in stages
        ),
        made=made_models(pipeline),
        published=tuple(folder for each in pipeline.stages for folder in (each.output, each.final)),
    )


def made_models(pipeline: "Pipeline") -> "dict[str, BackboneConfig]":
    """Where the models start that stages publish, by folder: their shapes are known before they are there."""
    published = ((each, published_role(models_of(each.config))) for each in pipeline.stages)
    return {str(each.final): role.backbone for each, role in published if role is not None}
