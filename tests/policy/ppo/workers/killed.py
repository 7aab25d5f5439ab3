"""``python killed.py PHASE STEP ARGUMENT...``: one rank of the stage, which kills itself in a step, counted from 1.

The phase is generation, scoring, policy, critic (after their first part of the step), or saving (when the engines have
written); "never" lets it live. It prints the steps that it draws responses in.
"""

import os
import signal
import sys

from policy.generation.hf import HfSampler
from policy.generation.training import TrainingSampler
from policy.ppo.__main__ import main
from policy.ppo.scoring import ModelScorer
from policy.ppo.task import Engines, PpoTask
from policy.ppo.update import Updater

METHODS = {
    "generation": (HfSampler, "_write"),
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


if __name__ == "__main__":
    phase, step, *arguments = sys.argv[1:]
    count_steps()
    if phase != "never":
        kill_in(phase, int(step))
    sys.exit(main(arguments))
