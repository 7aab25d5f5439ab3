"""``python killed.py PLAN.json``: one rank of several runs of the stage, one after another; some kill themselves.

The plan is a list of runs, each with ``arguments`` of policy.ppo, a ``port`` for its ranks to meet at, a file
``said`` for what its main rank prints, and ``kill``: null, or a phase and a step, counted from 1. A killed run ends
in generation, scoring, policy, critic (after their first part of the step), or saving (when the engines have
written).

Every run is a process of its own, forked from this one: importing is what takes long. Each prints the steps that it
draws responses in; this process prints how each run ended.
"""

import json
import os
import signal
import sys
from pathlib import Path

from torch._inductor import compile_fx

from policy.generation.hf import HfSampler
from policy.generation.opening import TrainingSampler
from policy.ppo import stage
from policy.ppo.__main__ import main
from policy.ppo.scoring import ModelScorer
from policy.ppo.task import Engines, PpoTask
from policy.ppo.update import Updater
from rlhf.engine import zero

IMPORTED_BY_EVERY_RUN = stage, zero, compile_fx

METHODS = {
    "generation": (HfSampler, "_decode"),
    "scoring": (ModelScorer, "score"),
    "policy": (Updater, "_update_policy"),
    "critic": (Updater, "_update_critic"),
    "saving": (Engines, "save"),
}

latest = {"step": 0, "inside": False}


def count_steps() -> None:
    take_step, generate = PpoTask.step, TrainingSampler.generate

    def counting_step(self, number, progress):
        latest.update(step=number + 1, inside=True)
        outcome = take_step(self, number, progress)
        latest.update(inside=False)
        return outcome

    def telling_generate(self, *arguments):
        if latest["inside"]:
            print(f"drawing in step {latest['step']}", flush=True)
        return generate(self, *arguments)

    PpoTask.step, TrainingSampler.generate = counting_step, telling_generate


def kill_in(phase: str, step: int) -> None:
    owner, name = METHODS[phase]
    method = getattr(owner, name)

    def deadly(self, *arguments, **options):
        result = method(self, *arguments, **options)
        if latest["step"] == step and latest["inside"] == (phase != "saving"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def run_alone(run: dict) -> int:
    """The exit code of a child that does the run; negative if it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ["MASTER_PORT"] = str(run["port"])
    if os.environ["RANK"] == "0":
        said = os.open(run["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
    count_steps()
    if run["kill"] is not None:
        kill_in(*run["kill"])
    code = main(run["arguments"])
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    for place, each in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        print(f"run {place} ended with {run_alone(each)}", flush=True)
