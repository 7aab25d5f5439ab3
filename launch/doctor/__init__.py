"""Is this machine ready for a run? See :func:`launch.doctor.checks.run_checks`."""

from launch.doctor.checks import run_checks
from launch.doctor.finding import Finding
from launch.doctor.subject import Subject

__all__ = ["Finding", "Subject", "run_checks"]
