"""What ``rlhf plan`` foretells of the memory of runs that have been made, on machines like those that they had."""

import logging
from collections.abc import Sequence
from pathlib import Path

from launch.report.audits import is_audit
from launch.report.reading import Run, read_runs
from launch.stages import by_program


def planned_bytes(folders: Sequence[Path]) -> dict[str, float]:
    """Bytes of the busiest rank at its peak, by the name of a run; a run that cannot be planned is left out."""
    for name in ("DeepSpeed", "deepspeed", "accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = {}
    trained = [folder for folder in folders if not is_audit(folder)]
    for run in read_runs(trained) if trained else ():
        planned = _planned(run)
        if planned is not None:
            found[run.name] = planned
    return found


def _planned(run: Run) -> float | None:
    from launch.plan.cluster import cluster_of
    from launch.plan.planner import Request, plan_stage
    from rlhf.config import load_config
    from rlhf.core.errors import UserError

    stage, ranks = by_program(run.stage), run.environment.get("ranks", ())
    if stage is None or not stage.trains or not ranks or not run.recipe or "memory/peak_gib" not in run.columns:
        return None
    recipe = run.folder / ("config.yaml" if (run.folder / "config.yaml").is_file() else "recipe.yaml")
    on_cpu = ranks[0]["device"] == "cpu"
    hosts = {each["host"] for each in ranks}
    try:
        config = load_config(stage.config_class(), [recipe], (), program="rlhf report")
        cluster = cluster_of(
            nodes=len(hosts),
            devices_per_node=len(ranks) // len(hosts),
            device="cpu" if on_cpu else None,
            device_memory=None if on_cpu else ranks[0]["device_bytes"],
            host_memory=run.environment["host_bytes"],
        )
        plan = plan_stage(stage.name, config, cluster, Request())
        return float(plan.host_peak.host_bytes if on_cpu else plan.device_peak.device_bytes)
    except (UserError, OSError):  # models or data are no longer there
        return None
