"""A run that finds no more memory ends in one line, and goes on from its checkpoint."""

import pytest
import torch

from reward.__main__ import main
from reward.task import RewardTask
from rlhf.core.errors import REFUSED_EXIT_CODE
from rlhf.train import shortage
from rlhf.train.shortage import is_shortage


@pytest.fixture
def run(tiny_model, tiny_pairs, tmp_path, capsys):
    """``run()``: exit code and what was said, of three steps with a checkpoint after each."""

    def start() -> tuple[int, str]:
        settings = [f"output={tmp_path}/run", f"model.path={tiny_model}", f"data.train={tiny_pairs}"]
        settings += [f"data.cache_dir={tmp_path}/cache", "train.checkpoint_every=1", "train.max_steps=3"]
        settings += ["train.global_batch_size=10", "engine.kind=local", "train.publish=none", "train.tensorboard=false"]
        code = main(settings)
        said = capsys.readouterr()
        return code, said.err + said.out

    return start


def of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB\nand more")


def of_the_host():
    torch.empty(2**47)


def of_python():
    raise MemoryError


def let_the_second_step(fail, monkeypatch):
    loss, steps = RewardTask.loss, RewardTask.step_metrics
    taken = []
    monkeypatch.setattr(RewardTask, "step_metrics", lambda self: (taken.append(1), steps(self))[1])
    monkeypatch.setattr(RewardTask, "loss", lambda self, batch: fail() if taken else loss(self, batch))


@pytest.mark.slow
def test_the_line_names_what_was_largest_and_the_next_knob(run, monkeypatch):
    with monkeypatch.context() as patch:
        let_the_second_step(of_a_gpu, patch)
        code, said = run()
    assert code == REFUSED_EXIT_CODE
    assert "Traceback" not in said
    (line,) = (each for each in said.splitlines() if "out of memory" in each)
    assert "of rank 0 is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB)" in line
    assert "the checkpoint of step 1 is intact" in line
    assert "libraries" in line and "MiB" in line and line.endswith("next knob: model.gradient_checkpointing=true")
    code, said = run()
    assert code == 0 and "at step 1" in said


@pytest.mark.parametrize("fail", [of_the_host, of_python])
def test_a_host_without_memory_is_known_by_what_torch_and_python_say(run, monkeypatch, fail):
    monkeypatch.setattr(shortage, "_advice", lambda *given: "advice")
    let_the_second_step(fail, monkeypatch)
    code, said = run()
    assert code == REFUSED_EXIT_CODE
    (line,) = (each for each in said.splitlines() if "out of memory" in each)
    assert line.startswith("the host of rank 0 is out of memory (") and line.endswith("is intact. advice")


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_are_no_shortage(error):
    assert not is_shortage(error)
