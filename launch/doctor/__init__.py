"""Is this machine ready for a run? See :func:`launch.doctor.checks.run_checks`."""

from launch.doctor.checks import run_checks
from launch.doctor.finding import Finding, PlannedStage, Subject
from launch.pipeline.subject import pipeline_subject

__all__ = ["Finding", "PlannedStage", "Subject", "pipeline_subject", "run_checks"]
