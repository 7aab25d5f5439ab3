"""``python -m launch.plan.shortage STAGE RECIPE RANKS_OF_A_NODE NODES [BYTES]``: why a run ran out of memory.

BYTES is the memory of a GPU; without it the run is one on CPUs. Prints one line: the largest items at the peak of the
plan, and the next knob; found as ``rlhf plan`` does.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.plan.advice import next_knob
from launch.plan.cluster import Cluster, cluster_of
from launch.plan.planner import Request, StagePlan, plan_stage, worked_out
from launch.screen import gib

ITEMS = 3


def advice(plan: StagePlan) -> str:
    """The largest items of a rank, and what to change next, whether or not the plan says that the run fits."""
    peak = max(plan.phases, key=plan.rank_bytes)
    items = sorted((peak.host if plan.cluster.on_cpu else peak.device).items(), key=lambda item: -item[1])[:ITEMS]
    largest = ", ".join(f"{name} {gib(size)}" for name, size in items)
    knob = next_knob(worked_out(replace(plan, cluster=_a_little_less(plan))))
    change = "" if knob is None else f"; next knob: {knob.partition(' (')[0]}"
    return f"largest at the peak of the plan ({peak.name}): {largest}{change}"


def _a_little_less(plan: StagePlan) -> Cluster:
    """The cluster with less memory than the plan needs: it has been shown to be too little."""
    cluster = plan.cluster
    needed = plan.node_host_bytes if cluster.on_cpu else plan.device_peak.device_bytes
    return replace(cluster, device_memory=min(cluster.device_memory, needed - 1))


def main(argv: Sequence[str]) -> int:
    from launch.stages import STAGES
    from rlhf.config import load_config

    stage, recipe, local_size, nodes, *memory = argv
    config = load_config(STAGES[stage].config_class(), [Path(recipe)], [], program="plan")
    where = {"device_memory": int(memory[0])} if memory else {"device": "cpu"}
    cluster = cluster_of(nodes=int(nodes), devices_per_node=int(local_size), **where)
    print(advice(plan_stage(stage, config, cluster, Request())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
