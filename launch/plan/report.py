"""A plan as tables for people, and as JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch.plan.advice import fewest_nodes, next_knob, smallest_config
from launch.plan.phases import Phase
from launch.plan.planner import StagePlan, disk
from launch.plan.roles import Role
from launch.plan.times import reference_seconds, run_seconds, step_seconds
from launch.screen import gib, titled_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def as_json(plan: StagePlan) -> dict[str, Any]:
    """Bytes and seconds as numbers."""
    batches = plan.batches
    on_device = None if plan.cluster.on_cpu else _phase_json(plan.device_peak.name, plan.device_peak.device)
    return {
        "stage": plan.stage,
        "fits": plan.fits,
        "cluster": asdict(plan.cluster),
        "precision": plan.precision,
        "models": [_model_json(plan, role) for role in plan.roles.all],
        "device_peak": on_device,
        "device_free": plan.device_free,
        "host_peak_per_rank": _phase_json(plan.host_peak.name, plan.host_peak.host),
        "host_peak_per_node": plan.node_host_bytes,
        "host_free": plan.host_free,
        "publishing": None if plan.publishing is None else _phase_json("publishing", plan.publishing.host),
        "phases": [{"name": each.name, "device": each.device_bytes, "host": each.host_bytes} for each in _peaks(plan)],
        "batches": {
            "items": batches.items,
            "global_batch": batches.global_batch,
            "steps_per_epoch": batches.steps_per_epoch,
            "total_steps": batches.total_steps,
            "micro_batches_per_step": batches.micro_batches,
            "tokens_per_step": batches.tokens_per_step,
            "computed_tokens_per_step": batches.computed_per_step,
            "largest_micro_batch_tokens": batches.load.tokens,
            "lengths": plan.lengths.origin,
        },
        "seconds_per_step": step_seconds(plan),
        "seconds_of_reference_cache": reference_seconds(plan),
        "seconds_of_run": run_seconds(plan),
        "disk": disk(plan),
        "largest_item": list(plan.largest_item),
        "next_knob": next_knob(plan),
        "smallest_config": smallest_config(plan),
        "fits_on_nodes": None if plan.fits else fewest_nodes(plan),
        "notes": list(plan.roles.notes),
    }


def _model_json(plan: StagePlan, role: Role) -> dict[str, Any]:
    states = plan.states[role.name]
    return {
        "role": role.name,
        "from": role.model.origin,
        "parameters": role.model.total,
        "trainable": role.model.trainable,
        "placement": role.placement,
        "attention": role.attention,
        "gradient_checkpointing": role.checkpointing,
        "device": {**states.device, **states.moments},
        "host": dict(states.host),
        "nvme": states.nvme,
    }


def _phase_json(name: str, items: Any) -> dict[str, Any]:
    return {"phase": name, "bytes": sum(items.values()), "items": dict(items)}


def _peaks(plan: StagePlan) -> list[Phase]:
    """The largest phase of each name, in the order of the run."""
    largest: dict[str, Phase] = {}
    for phase in plan.phases:
        largest[phase.name] = max(largest.get(phase.name, phase), phase, key=plan.rank_bytes)
    return list(largest.values())


def print_plan(console: "Console", found: dict[str, Any]) -> None:
    """Show what :func:`as_json` gave."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    cluster = found["cluster"]
    ranks = cluster["nodes"] * cluster["devices_per_node"]
    host = "host memory not stated" if cluster["host_memory"] is None else f"{gib(cluster['host_memory'])} a node"
    device = cluster["device"]
    if device != "cpu":
        device += f", {gib(cluster['device_memory'])}"
    say(
        f"{found['stage']} on {cluster['nodes']} x {cluster['devices_per_node']} = {ranks} rank(s) "
        f"({device}; {host}), {found['precision']}"
    )
    for table in (_models_table, _memory_table, _phases_table, _batches_table):
        console.print(table(found))
    notes = [f"note: {note}" for note in found["notes"]]
    for line in (*_time_lines(found), _disk_line(found), *notes, *verdict(found)):
        say(line)


def verdict(found: dict[str, Any]) -> list[str]:
    """The last lines: does it fit, what is the largest item, what to change."""
    on_cpu = found["cluster"]["device"] == "cpu"
    name, size = found["largest_item"]
    free, host_free = found["device_free"], found["host_free"]
    where = "a node" if on_cpu else "each device"
    lines = [
        f"{'FITS' if found['fits'] else 'DOES NOT FIT'}: {gib(free)} of {where} free at the peak"
        if free >= 0
        else f"DOES NOT FIT: {gib(-free)} too much for {where}"
    ]
    if not on_cpu and host_free is not None and host_free < 0:
        lines.append(f"DOES NOT FIT: {gib(-host_free)} too much for the host memory of a node")
    lines.append(f"largest item at the peak: {name}, {gib(size)}")
    if found["next_knob"]:
        lines.append(f"next knob: {found['next_knob']}")
    if found["fits_on_nodes"]:
        lines.append(f"as it is, it fits on {found['fits_on_nodes']} nodes")
    if found["smallest_config"]:
        lines.append(f"smallest configuration of ds_configs that fits: {found['smallest_config']}")
    else:
        lines.append("no configuration of ds_configs fits as the recipe is")
    return lines


def _models_table(found: dict[str, Any]) -> "Table":
    table = titled_table("Models", "role", "parameters", "trained", "placement", "device", "host", "NVMe")
    for model in found["models"]:
        table.add_row(
            model["role"],
            f"{model['parameters'] / 1e6:,.1f} M",
            f"{model['trainable'] / 1e6:,.1f} M",
            model["placement"],
            gib(sum(model["device"].values())),
            gib(sum(model["host"].values())),
            gib(model["nvme"]) if model["nvme"] else "-",
        )
    return table


def _memory_table(found: dict[str, Any]) -> "Table":
    """What is there at the peak, device beside host."""
    peak, host = found["device_peak"], found["host_peak_per_rank"]
    where = f"device: {peak['phase']}" if peak else ""
    table = titled_table("Peak of one rank", "item", where or f"memory: {host['phase']}", *(["host"] if peak else []))
    items = peak["items"] if peak else host["items"]
    for name, size in items.items():
        table.add_row(name, gib(size), *([""] if peak else []))
    if peak:
        for name, size in host["items"].items():
            table.add_row(name, "", gib(size))
    table.add_section()
    table.add_row("together", gib(sum(items.values())), *([gib(host["bytes"])] if peak else []))
    table.add_row("of a node's host memory", *([""] if peak else []), gib(found["host_peak_per_node"]))
    return table


def _phases_table(found: dict[str, Any]) -> "Table":
    table = titled_table("Phases of one rank", "phase", "device", "host")
    for phase in found["phases"]:
        table.add_row(phase["name"], gib(phase["device"]) if phase["device"] else "-", gib(phase["host"]))
    if found["publishing"]:
        table.add_row("publishing, on the main rank", "-", gib(found["publishing"]["bytes"]))
    return table


def _batches_table(found: dict[str, Any]) -> "Table":
    batches = found["batches"]
    unknown = "not known: give --rows"
    table = titled_table("Batches", "", "")
    rows = {
        "rows of the data": unknown if batches["items"] is None else f"{batches['items']:,}",
        "lengths": batches["lengths"],
        "global batch": f"{batches['global_batch']:,}",
        "micro-batches of a step, each rank": f"{batches['micro_batches_per_step']:.1f}",
        "largest micro-batch": f"{batches['largest_micro_batch_tokens']:,} tokens at once",
        "tokens of a step": f"{batches['tokens_per_step']:,.0f} ({batches['computed_tokens_per_step']:,.0f} computed)",
        "steps of an epoch": unknown if batches["steps_per_epoch"] is None else f"{batches['steps_per_epoch']:,}",
        "steps of the run": unknown if batches["total_steps"] is None else f"{batches['total_steps']:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _time_lines(found: dict[str, Any]) -> list[str]:
    parts, cluster = found["seconds_per_step"], found["cluster"]
    if not parts:
        return ["time: give --flops, the peak rate of a device"]
    rate = f"{cluster['flops'] / 1e12:g} TFLOP/s x {cluster['utilization']:g}"
    words = ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts.items())
    lines = [f"time of a step at {rate} a device: {clock(sum(parts.values()))} ({words})"]
    if found["seconds_of_reference_cache"] is not None:
        lines.append(f"time of the reference cache: {clock(found['seconds_of_reference_cache'])}")
    if found["seconds_of_run"] is not None:
        whole = clock(found["seconds_of_run"])
        lines.append(f"time of the run: {whole}, without evaluation, checkpoints, communication")
    return lines


def clock(seconds: float) -> str:
    """``3.2 s``, ``12 min`` or ``4.1 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _disk_line(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {gib(size)}" for name, size in found["disk"].items())
    return f"disk: {gib(sum(found['disk'].values()))} ({parts})"
