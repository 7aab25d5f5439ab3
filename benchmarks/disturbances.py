"""Preempt, break and stop a pipeline on a real SLURM at random moments, and compare what it publishes.

    python -m benchmarks.disturbances runs/disturbances

Starts a SLURM of four nodes on this machine (slurm-wlm and munge must be installed) and on it, twice, a pipeline of
reward, preference and PPO stages of a tiny random model on two nodes. The second is preempted (PreemptMode=REQUEUE with
GraceTime), loses a node (slurmd, its step daemons and their tasks killed -9), gets SIGTERM by scancel, and SIGUSR1 as
SLURM sends it before a time limit; each ``--times`` times, in random order. Moments are drawn from ``--seconds`` since
the job has started, imports and checks of nodes included; whoever is quicker than that is disturbed at an even share of
the steps. A job that has ended is submitted again, as its log says. Exit status 1 if a weight differs, a job had to be
submitted again, or there was nothing left to disturb.
"""

import argparse
import dataclasses
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.families import small_config, small_tokenizer
from benchmarks.killed_pipeline import weights
from rlhf.train.status import Status, read_status
from tests.slurm import PROGRAMS, SYSTEM, Cluster

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "launch" / "quickstart" / "sentiment_pairs_train.jsonl"
PROMPTS = ROOT / "launch" / "quickstart" / "prompts_train.jsonl"
STEPS = {"reward": 800, "preference": 400, "ppo": 100}
LOST = ("NODE_FAIL", "FAILED", "TIMEOUT", "CANCELLED", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of both pipelines and their models")
    parser.add_argument("--times", type=int, default=3, help="how often each thing happens")
    parser.add_argument("--seconds", type=float, nargs=2, default=(1, 120), help="of life, at least and at most")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the steps of all stages")
    parser.add_argument("--seed", type=int, default=13)
    return parser


def write_inputs(folder: Path, steps: dict[str, int]) -> tuple[Path, Path]:
    """A model, a pipeline that trains it, and a profile of the cluster; the paths of the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.exists():
        config = small_config("llama")
        assert isinstance(config, LlamaConfig)
        LlamaForCausalLM(config).save_pretrained(base)
        small_tokenizer().save_pretrained(base)
    steady = {"learning_rate": 1e-3, "schedule": "constant", "warmup_share": 0}
    data = {"train": str(PAIRS), "eval_share": 0.05, "max_tokens": 256, "cache_dir": str(folder / "cache")}

    def train(stage: str, every: int) -> dict:
        length = {"max_steps": steps[stage], "epochs": 1000, "checkpoint_every": every}
        return {"global_batch_size": 8, "micro_batch_tokens": 2048, "evaluate_every": 0, "publish": "last", **length}

    stages: dict[str, dict] = {
        "reward": {
            "model": {"path": str(base)},
            "data": data,
            "margin": {"kind": "ot"},
            "train": train("reward", 100),
        },
        "preference": {
            "model": {"path": str(base)},
            "data": data,
            "loss": {"kind": "apo_hinge_zero"},
            "train": train("preference", 50),
        },
        "ppo": {
            "policy": {"path": "${stages.preference.final}"},
            "reward": {"path": "${stages.reward.final}"},
            "critic": {"optim": steady},
            "data": data | {"train": str(PROMPTS)},
            "rollout": {"prompts": 8, "max_new_tokens": 24},
            "train": train("ppo", 12),
        },
    }
    common = {"optim": steady, "engine": {"deepspeed": "zero2"}}
    pipeline = folder / "pipeline.yaml"
    recipes = {name: {"set": each | common} for name, each in stages.items()}
    pipeline.write_text(yaml.safe_dump({"output": str(folder / "unset"), "stages": recipes}, sort_keys=False))
    profile = folder / "cluster.yaml"
    settings = {
        "partition": "spare",
        "nodes": 2,
        "devices": 1,
        "device_kind": "cpu",
        "time": "600",
        "interface": "lo",
        "signal_lead_seconds": 60,
        "free_disk_gib": 0.1,
        "probe_seconds": 15,
        "srun_options": ["--wait=15"],
        "max_node_failures": 100,
    }
    profile.write_text(yaml.safe_dump(settings))
    return pipeline, profile


@dataclasses.dataclass
class Runner:
    """A pipeline as jobs of a cluster: one after the other, if one has ended before its time."""

    cluster: Cluster
    pipeline: Path
    profile: Path
    output: Path
    steps: dict[str, int]
    number: str = ""
    submitted: int = 0

    def submit(self) -> None:
        words = ("--config", str(self.pipeline), "--profile", str(self.profile), f"output={self.output}")
        said = self.cluster.rlhf("slurm", "submit", "pipeline", *words)
        self.number = said.partition("submitted job ")[2].partition(":")[0]
        self.submitted += 1

    @property
    def log(self) -> Path:
        return self.output / "slurm" / "logs" / f"{self.number}.log"

    @property
    def starts(self) -> tuple[int, int]:
        """A number that grows with every start of the pipeline."""
        return self.submitted, self.cluster.restarts(self.number)

    def statuses(self) -> dict[str, Status]:
        """What each stage that has begun says of itself."""
        found = {stage: read_status(self.output / stage) for stage in self.steps}
        return {stage: status for stage, status in found.items() if status is not None}

    @property
    def share(self) -> float:
        """How far it is, stages alike."""
        return sum(status.step / self.steps[stage] for stage, status in self.statuses().items()) / len(self.steps)

    @property
    def place(self) -> str:
        """Where it was when it last said so."""
        begun = self.statuses()
        stage = max(begun, key=lambda name: begun[name].updated, default=next(iter(self.steps)))
        return f"{stage}, {begun[stage].phase}, step {begun[stage].step}" if begun else "nothing has started yet"

    def nodes(self) -> list[str]:
        listed = self.cluster.run("squeue", "--noheader", "--format=%N", "--jobs", self.number).stdout.strip()
        return self.cluster.run("scontrol", "show", "hostnames", listed).stdout.split()

    def until_running(self, after: tuple[int, int]) -> bool:
        """Wait for the next start, and submit again what has ended otherwise; false if the pipeline is at its end."""
        while True:
            state = self.cluster.state(self.number)
            if state == "COMPLETED":
                return False
            if state == "RUNNING" and self.starts > after:
                return True
            if state in LOST and not self.cluster.run("squeue", "--noheader", "--jobs", self.number).stdout.strip():
                print(f"    job {self.number} is {state}: {last_line(self.log)}; submitted again", flush=True)
                self.submit()
            time.sleep(0.5)


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    return lines[-1] if lines else "no log"


def preempt(runner: Runner, generator: random.Random) -> None:
    runner.cluster.run("sbatch", "-p", "urgent", "-N4", "--output=/dev/null", "--wrap", "sleep 1")


def lose_a_node(runner: Runner, generator: random.Random) -> None:
    """It is silent for a while until SLURM gives it up, and then another one, with the same name, is there."""
    node = generator.choice(runner.nodes())
    runner.cluster.kill_node(node)
    time.sleep(generator.uniform(0, 60))
    runner.cluster.declare_lost(node)
    runner.cluster.mend_node(node)


def terminate(runner: Runner, generator: random.Random) -> None:
    runner.cluster.run("scancel", "--signal=TERM", "--full", runner.number)


def near_the_limit(runner: Runner, generator: random.Random) -> None:
    """SIGUSR1 to the shell of the job alone, which is what --signal=B:USR1@SECONDS makes SLURM do."""
    runner.cluster.run("scancel", "--signal=USR1", "--batch", runner.number)


KINDS: dict[str, Callable[[Runner, random.Random], None]] = {
    "preempted": preempt,
    "a node lost": lose_a_node,
    "scancel --signal=TERM --full": terminate,
    "USR1 before the limit": near_the_limit,
}


def disturb(runner: Runner, kind: str, generator: random.Random) -> None:
    """Let it happen, and wait until the job no longer runs as it did."""
    starts = runner.starts
    KINDS[kind](runner, generator)
    while runner.cluster.state(runner.number) in ("RUNNING", "SIGNALING") and runner.starts == starts:
        time.sleep(0.5)


def run_disturbed(runner: Runner, kinds: list[str], seconds: tuple[float, float], generator: random.Random) -> int:
    """The pipeline to its end; how many of ``kinds`` have happened."""
    runner.submit()
    starts = (0, 0)
    for done, kind in enumerate(kinds):
        if not runner.until_running(starts):
            return done
        starts, began, life = runner.starts, time.monotonic(), generator.uniform(*seconds)
        while time.monotonic() - began < life and runner.share < (done + 1) / (len(kinds) + 1):
            time.sleep(0.2)
        print(f"{done + 1:2} {kind}: {time.monotonic() - began:.0f} s after start {starts}, {runner.place}", flush=True)
        disturb(runner, kind, generator)
    while runner.until_running(starts):
        starts = runner.starts
    return len(kinds)


def main() -> int:
    options = _parser().parse_args()
    missing = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM) is None]
    if missing:
        sys.exit(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    os.chdir(ROOT)
    steps = {stage: max(2, round(count * options.steps)) for stage, count in STEPS.items()}
    output = options.output.absolute()
    inputs = write_inputs(output, steps)
    generator = random.Random(options.seed)
    kinds = [kind for kind in KINDS for _ in range(options.times)]
    generator.shuffle(kinds)
    print(f"seed {options.seed}: {', '.join(kinds)}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path must be short
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        straight = Runner(cluster, *inputs, output / "straight", steps)
        began = time.monotonic()
        run_disturbed(straight, [], options.seconds, generator)
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        disturbed = Runner(cluster, *inputs, output / "disturbed", steps)
        began = time.monotonic()
        happened = run_disturbed(disturbed, kinds, options.seconds, generator)
        print(f"disturbed: {time.monotonic() - began:.0f} s", flush=True)
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    found, expected = weights(disturbed.output), weights(straight.output)
    differing = [name for name in expected if found.get(name) != expected[name]]
    print(f"{happened} disturbances of {len(kinds)}, {disturbed.submitted} submission(s)")
    print(f"{len(expected)} files of published weights, {len(differing)} differ: {', '.join(differing) or 'none'}")
    faults = (differing, len(expected) < len(steps), happened < len(kinds), disturbed.submitted > 1)
    return 1 if any(faults) else 0


if __name__ == "__main__":
    sys.exit(main())
