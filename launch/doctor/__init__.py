"""Is this machine ready for a run? See :func:`launch.doctor.checks.run_checks`."""

from launch.doctor.checks import run_checks
from launch.doctor.finding import Finding

__all__ = ["Finding", "run_checks"]
