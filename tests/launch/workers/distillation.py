"""A fifth stage that nothing in launch has heard of: a student learns from a teacher that stays, and from a judge."""

from dataclasses import dataclass, field
from pathlib import Path

from rlhf.data.options import ExampleDataConfig
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.models.options import BackboneConfig
from rlhf.models.roles import ModelRole
from rlhf.train.options import TrainConfig
from rlhf.train.workload import Workload


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model to learn from."""

    path: str
    placement: str = "replicated"
    """Where it lives."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """A run of distillation."""

    output: Path
    student: BackboneConfig
    teacher: TeacherConfig
    judge: TeacherConfig | None = None
    """A reward model that another run has published."""
    data: ExampleDataConfig
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def models(self) -> tuple[ModelRole, ...]:
        """The student and those that it asks."""
        student = ModelRole(
            name="student",
            section="student",
            setting="student.path",
            backbone=self.student,
            kind="language model",
            optimizer=self.optim,
            placement=self.engine.deepspeed,
            placed_by="engine.deepspeed",
            published=True,
        )
        teacher = ModelRole(
            name="teacher",
            section="teacher",
            setting="teacher.path",
            backbone=BackboneConfig(path=self.teacher.path),
            kind="language model",
            placement=self.teacher.placement,
            placed_by="teacher.placement",
        )
        if self.judge is None:
            return student, teacher
        judge = ModelRole(
            name="judge",
            section="judge",
            setting="judge.path",
            backbone=BackboneConfig(path=self.judge.path),
            kind="reward model",
            placement=self.judge.placement,
            placed_by="judge.placement",
            hub=False,
        )
        return student, teacher, judge

    @property
    def workload(self) -> Workload:
        """One pass of the student over its rows in each step."""
        return Workload(rows=self.data, kind="conversation")
