"""Peaks that ``rlhf plan`` predicts, beside the peaks of resident memory that the same runs reach on this machine.

Every case is two steps of a stage on a CPU in float32, each rank a process with one thread. The table of docs/plan.md
is the output of

    python -m benchmarks.plan_check --model models/SmolLM2-135M-Instruct --output plan_check.json
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "launch" / "quickstart"
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One run."""

    stage: str
    settings: tuple[str, ...]
    ranks: int = 1


SLICE = "model.layers=8"
LARGE, CHECKPOINTING = "train.micro_batch_tokens=6000", "model.gradient_checkpointing=true"
RULE = "def score(prompts, responses):\n    return map(len, responses)\n"
CASES = [
    Case("reward", (SLICE, "engine.deepspeed=zero0")),
    Case("reward", (SLICE, "engine.deepspeed=zero0"), 2),
    Case("reward", (SLICE, "engine.deepspeed=zero1"), 2),
    Case("reward", (SLICE, "engine.deepspeed=zero2")),
    Case("reward", (SLICE, "engine.deepspeed=zero2"), 2),
    Case("reward", (SLICE, "engine.deepspeed=zero3")),
    Case("reward", (SLICE, "engine.deepspeed=zero3"), 2),
    Case("reward", (SLICE, "engine.deepspeed=zero2", LARGE)),
    Case("reward", (SLICE, "engine.deepspeed=zero2", LARGE, CHECKPOINTING)),
    Case("reward", (SLICE, "engine.deepspeed=zero2", "model.attention=eager")),
    Case("reward", ("engine.deepspeed=zero2",)),
    Case("reward", ("engine.deepspeed=zero2",), 2),
    Case("reward", ("engine.deepspeed=zero3",), 2),
    Case("reward", ("engine.deepspeed=zero2", "model.freeze_layers=20")),
    Case("reward", ("engine.deepspeed=zero2", "model.lora={rank: 16}")),
    Case("reward", ("engine.deepspeed=zero2_offload",)),
    Case("sft", (SLICE, "engine.kind=local")),
    Case("sft", (SLICE, "engine.deepspeed=zero2")),
    Case("sft", (SLICE, "engine.deepspeed=zero2", "train.micro_batch_tokens=500")),
    Case("sft", ("engine.deepspeed=zero2", CHECKPOINTING), 2),
    Case("preference", (SLICE, "engine.deepspeed=zero2")),
    Case("preference", (SLICE, "engine.deepspeed=zero2", "reference.kind=live")),
    Case("preference", ("engine.deepspeed=zero2", "model.lora={rank: 16}", "reference.kind=live")),
    Case("preference", ("engine.deepspeed=zero3", "reference.kind=live", "reference.placement=zero3"), 2),
    Case("ppo", ("engine.deepspeed=zero2",)),
    Case("ppo", ("engine.deepspeed=zero3",), 2),
]


def settings_of(case: Case, model: Path, folder: Path) -> list[str]:
    """The whole recipe of a case, on the corpus of the quickstart."""
    batch = ["train.global_batch_size=32", "train.micro_batch_tokens=1500"]
    data = ["data.eval_share=0", f"data.template={QUICKSTART / 'chat.jinja'}", f"data.cache_dir={folder / 'cache'}"]
    pairs = QUICKSTART / "sentiment_pairs_train.jsonl"
    if case.stage == "ppo":
        (folder / "rule_of_plan_check.py").write_text(RULE)
        policy = [f"policy.path={model}", "policy.layers=8", "reward.function=rule_of_plan_check:score"]
        prompts = f"data.train={QUICKSTART / 'prompts_train.jsonl'}"
        rollout = ["rollout.prompts=32", "rollout.max_new_tokens=64", "data.max_tokens=96"]
        return [*policy, prompts, *rollout, "train.evaluate_first=false", *data, *batch, *case.settings]
    rows = pairs
    if case.stage == "sft":
        rows = folder / "conversations.jsonl"
        lines = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
        kept = ({"prompt": line["prompt"], "completion": line["chosen"]} for line in lines)
        rows.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    extra = [f"reference.cache={folder / 'reference'}"] if case.stage == "preference" and _caches(case) else []
    return [f"model.path={model}", f"data.train={rows}", "data.max_tokens=128", *data, *batch, *extra, *case.settings]


def _caches(case: Case) -> bool:
    return not any(each.startswith("reference.kind=live") for each in case.settings)


def predicted(case: Case, settings: list[str]) -> Any:
    """The plan of a case on CPUs."""
    from launch.plan.cluster import cluster_of
    from launch.plan.planner import Request, plan_stage
    from launch.stages import STAGES
    from rlhf.config import load_config

    quick = [*settings, "train.max_steps=2", "train.publish=none", "output=runs/unused"]
    config = load_config(STAGES[case.stage].config_class(), [], quick, program="plan_check")
    cluster = cluster_of(device="cpu", devices_per_node=case.ranks)
    return plan_stage(case.stage, config, cluster, Request())


def check(case: Case, model: Path) -> dict[str, Any]:
    """Predict, run, compare: the largest peak of any rank counts."""
    from benchmarks.measure import measure

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_of(case, model, folder)
        plan = predicted(case, settings)
        found = measure(case.stage, settings, ranks=case.ranks, folder=folder, timeout_seconds=900)
    peak = max(each["peak_resident"] for each in found)
    return {
        **asdict(case),
        "predicted": plan.host_peak.host_bytes,
        "measured": peak,
        "ratio": plan.host_peak.host_bytes / peak,
        "phase": plan.host_peak.name,
        "items": dict(plan.host_peak.host),
        "ranks_measured": found,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    numbers = range(1, len(CASES) + 1)
    parser.add_argument("--only", type=int, nargs="*", choices=numbers, metavar="NUMBER", help="of cases, from 1")
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: there is no config.json; make quickstart makes the default one")
    chosen = [case for number, case in enumerate(CASES, start=1) if not options.only or number in options.only]
    rows = []
    for case in chosen:
        rows.append(check(case, options.model.resolve()))
        row = rows[-1]
        print(
            f"{case.stage} {' '.join(case.settings)} x{case.ranks}: predicted {row['predicted'] / MIB:.0f} MiB, "
            f"measured {row['measured'] / MIB:.0f} MiB, ratio {row['ratio']:.3f}",
            flush=True,
        )
        if options.output:
            options.output.write_text(json.dumps(rows, indent=2))
    Console(width=140, highlight=False).print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table("stage", "settings", "ranks", "predicted MiB", "measured MiB", "predicted / measured", "peak")
    for row in rows:
        numbers = f"{row['predicted'] / MIB:.0f}", f"{row['measured'] / MIB:.0f}", f"{row['ratio']:.2f}"
        found.add_row(row["stage"], " ".join(row["settings"]), str(row["ranks"]), *numbers, row["phase"])
    return found


if __name__ == "__main__":
    main()
