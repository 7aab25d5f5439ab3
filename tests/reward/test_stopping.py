"""Runs that are asked to stop, as users ask: signals, the STOP file, the clock; by hand and under the launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForSequenceClassification

from reward import stage
from reward.__main__ import main
from reward.task import RewardTask
from rlhf.core.errors import STOPPED_EXIT_CODE, ModelError
from rlhf.engine import stop
from rlhf.train.done import read_completion
from tests.ports import free_port

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
UNPUBLISHED = "train.publish=none"


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tiny_model, tiny_pairs) -> Path:
    """Random numbers (dropout), margins with a memory (queue), and a checkpoint only at the end."""
    folder = tmp_path_factory.mktemp("stopping")
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}, head_init_scale: 10, lora: {{rank: 4, alpha: 8, dropout: 0.1}}}}\n"
        f"data: {{train: {tiny_pairs}, eval_share: 0.2, cache_dir: {folder}/cache}}\n"
        "margin: {kind: ot, parameters: {queue_pairs: 12}}\n"
        "optim: {learning_rate: 1e-2}\n"
        f"train: {{global_batch_size: 12, micro_batch_tokens: 300, epochs: 99, max_steps: {STEPS}, evaluate_every: 4,"
        " checkpoint_every: 0, tensorboard: false}\n"
        "engine: {deepspeed: zero2}\n"
    )
    return path


def arguments(recipe, output, *overrides):
    return ["-m", "reward", "--config", str(recipe), f"output={output}", *overrides]


def logged_steps(folder) -> list[int]:
    path = folder / "metrics.jsonl"
    return [int(step) for step in re.findall(r'"step": (\d+),', path.read_text())] if path.exists() else []


def wait_for_a_step(folder, process) -> None:
    """Wait until a step has been logged that was not there before."""
    before, deadline = max(logged_steps(folder), default=0), time.monotonic() + 200
    while max(logged_steps(folder), default=0) <= before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_stopped(output: str, folder, reason: str) -> int:
    """The step it stopped at, which is saved."""
    found = re.search(rf"stopped at step (\d+) of {STEPS} by {re.escape(reason)}; the same command goes on", output)
    assert found, output
    step = int(found[1])
    assert 0 < step < STEPS, "the request came too late to prove anything"
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()
    assert logged_steps(folder)[-1] == step and read_completion(folder) is None
    return step


@pytest.fixture
def stop_ranks(start_ranks, recipe):
    """``stop_ranks(folder, ask, reason)``: start or go on with two ranks, ask for a stop in the middle; the step."""

    def ask_in_the_middle(folder, ask, reason: str) -> int:
        processes = start_ranks(arguments(recipe, folder, UNPUBLISHED), 2)
        wait_for_a_step(folder, processes[0])
        ask(processes)
        outputs = [process.communicate(timeout=200)[0] for process in processes]
        assert [process.returncode for process in processes] == [STOPPED_EXIT_CODE] * 2, "\n".join(outputs)
        assert "stopped at" not in outputs[1], "one rank speaks for all"
        return check_stopped(outputs[0], folder, reason)

    return ask_in_the_middle


@pytest.fixture
def stop_launched(recipe):
    """``stop_launched(folder, ask, reason)``: the same under the deepspeed command; its exit code."""
    started: list[psutil.Process] = []

    def ask_in_the_middle(folder, ask, reason: str) -> int:
        command = [
            str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators=2", f"--master_port={free_port()}",
            "--module", *arguments(recipe, folder, UNPUBLISHED)[1:],
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )
        wait_for_a_step(folder, process)
        family = psutil.Process(process.pid).children(recursive=True)
        started.extend(family)
        ask([each for each in family if "rlhf.train.reloading" not in each.cmdline()])
        output = process.communicate(timeout=200)[0]
        psutil.wait_procs(family, timeout=60)
        assert not [each for each in family if each.is_running()], "processes are left"
        check_stopped(output, folder, reason)
        return process.returncode

    yield ask_in_the_middle
    for process in started:
        if process.is_running():
            process.kill()


def final_weights(folder) -> dict:
    return AutoModelForSequenceClassification.from_pretrained(folder / "final").state_dict()


def assert_same_runs(runs, found: Path, expected: Path) -> None:
    """The last rows are a held-out evaluation of the last weights."""
    for kind in ("train", "eval"):
        assert runs.rows(found, kind) == runs.rows(expected, kind)
    assert (found / "final").exists() == (expected / "final").exists()
    if (expected / "final").exists():
        weights = final_weights(found)
        assert all(weights[name].equal(value) for name, value in final_weights(expected).items())
    done, wanted = read_completion(found), read_completion(expected)
    assert done.step == wanted.step == STEPS and done.config == wanted.config and done.stage == "reward"


@pytest.mark.slow
def test_signals_stop_all_ranks_with_and_without_a_launcher(run_ranks, stop_ranks, stop_launched, runs, recipe):
    straight, folder = recipe.parent / "straight", recipe.parent / "stopped"
    run_ranks(arguments(recipe, straight, UNPUBLISHED))
    stop_ranks(folder, lambda ranks: ranks[1].send_signal(signal.SIGTERM), "SIGTERM")
    assert stop_launched(folder, lambda family: family[-1].send_signal(signal.SIGUSR1), "SIGUSR1") == STOPPED_EXIT_CODE
    run_ranks(arguments(recipe, folder, UNPUBLISHED))
    assert_same_runs(runs, folder, straight)


@pytest.mark.slow
@pytest.mark.full
def test_a_launcher_that_is_told_to_end_lets_its_ranks_save(stop_launched, recipe):
    """It passes SIGTERM on, to one rank after another, and then has an exit code of its own."""
    (folder := recipe.parent / "told").mkdir()
    assert stop_launched(folder, lambda family: family[0].terminate(), "SIGTERM") == 1


# One rank of plain torch in this process.


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(number, action)`` lets ``action`` happen in the middle of that step."""

    def set_up(number, action):
        take = RewardTask.micro_batches

        def acting(self, step):
            if step + 1 == number:
                action()
            return take(self, step)

        monkeypatch.setattr(RewardTask, "micro_batches", acting)

    return set_up


def local(recipe, folder, *overrides) -> list[str]:
    return arguments(recipe, folder, "engine.kind=local", *overrides)[2:]


@pytest.fixture(scope="session")
def local_run(recipe) -> Path:
    """The folder of a finished run."""
    assert main(local(recipe, recipe.parent / "local")) == 0
    return recipe.parent / "local"


def test_the_file_and_the_clock_stop_a_run(runs, recipe, local_run, at_step, monkeypatch, capsys):
    folder = recipe.parent / "local stopped"
    given = local(recipe, folder)
    stop_file = folder / "STOP"

    # The clock has run out when the data are read; then in the middle of the fifth step.
    assert main([*given, "train.max_minutes=1e-3"]) == STOPPED_EXIT_CODE
    assert "stopped before training by train.max_minutes = 0.001" in capsys.readouterr().err
    assert logged_steps(folder) == []
    at_step(5, lambda: monkeypatch.setattr(stop.time, "time", lambda: time.monotonic() + 1e10))
    assert main([*given, "train.max_minutes=1e4"]) == STOPPED_EXIT_CODE
    assert check_stopped(capsys.readouterr().err, folder, "train.max_minutes = 10000.0") == 5
    monkeypatch.undo()

    at_step(9, stop_file.touch)
    assert main(given) == STOPPED_EXIT_CODE
    assert check_stopped(capsys.readouterr().err, folder, f"the file {stop_file}") == 9
    assert not stop_file.exists()

    assert main(given) == 0
    assert_same_runs(runs, folder, local_run)


def test_a_finished_run_says_so_and_a_refused_start_leaves_that_alone(recipe, local_run):
    marker = local_run / "done.json"
    done = marker.read_text()
    assert json.loads(done).keys() == {"stage", "config", "step", "seconds"}
    assert main(local(recipe, local_run, "optim.learning_rate=1")) == 2
    assert marker.read_text() == done
    assert main(local(recipe, local_run)) == 0
    assert marker.read_text() == done, "nothing was done, so nothing is new"


def test_a_run_that_fails_to_publish_is_not_done(recipe, monkeypatch):
    folder = recipe.parent / "unpublished"

    def fail(*arguments):
        assert read_completion(folder) is None
        raise ModelError("the saved model differs")

    monkeypatch.setattr(stage, "publish_run", fail)
    assert main(local(recipe, folder, "train.max_steps=2")) == 2
    assert read_completion(folder) is None
