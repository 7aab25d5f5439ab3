"""``rlhf publish``: from the checkpoints of a run to its ``final/``."""

import contextlib
import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.cli import main
from policy.preference.__main__ import main as preference
from policy.sft.__main__ import main as sft
from reward.__main__ import main as reward
from rlhf.train.done import read_completion
from rlhf.train.status import new_status, read_status, write_status

TRAINED = 3


@pytest.fixture(scope="module")
def recipe(tiny_model, tiny_pairs, tmp_path_factory):
    """Settings of a short run that evaluates and saves after each step."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        f"model.path={tiny_model}",
        f"data.train={tiny_pairs}",
        f"data.cache_dir={cache}",
        f"train.max_steps={TRAINED}",
        "train.global_batch_size=16",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=9",
        "train.tensorboard=false",
        "engine.kind=local",
    ]


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A reward model's run that was to publish nothing."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert reward([f"output={folder}", *recipe, "train.publish=none"]) == 0
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_that_published_nothing_is_published_and_stays_the_same_run(run_folder):
    before = (run_folder / "config.yaml").read_text(), read_completion(run_folder)
    assert not (run_folder / "final").exists()
    assert main(["publish", str(run_folder)]) == 0
    assert (run_folder / "final" / "model.safetensors").is_file()
    assert ((run_folder / "config.yaml").read_text(), read_completion(run_folder)) == before


def test_fine_tuning_is_published_from_its_checkpoint(recipe, tmp_path, capfd):
    """Of the conversations of the pairs: what the run would have published, and it goes on from there."""
    chats = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"the sun {place}", "completion": "is good"} for place in range(20)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*recipe, f"data.train={chats}", "train.keep_checkpoints=1"]
    assert sft([f"output={tmp_path}/whole", *settings]) == 0
    assert sft([f"output={tmp_path}/run", *settings, "train.publish=none"]) == 0
    assert main(["publish", str(tmp_path / "run")]) == 0
    assert "reloaded in a fresh process" in "".join(capfd.readouterr())
    ours, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict() for name in ("run", "whole")
    )
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    templates = [(tmp_path / name / "final" / "chat_template.jinja").read_text() for name in ("run", "whole")]
    assert templates[0] == templates[1]


def test_a_run_whose_publication_failed_is_finished_by_it(recipe, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("policy.publish.PublishablePolicy.save", _full_disk)
        patch.setattr("policy.preference.stage.rehearsed", lambda *_: contextlib.nullcontext())
        assert preference([f"output={run}", *recipe]) != 0
    said = capfd.readouterr().err
    assert f"{run}/final is not published: the disk was in a bad mood" in said and f"rlhf publish {run}" in said
    assert read_completion(run) is None and not (run / "final").exists()
    assert main(["publish", str(run)]) == 0
    AutoModelForCausalLM.from_pretrained(run / "final")
    assert read_completion(run).step == TRAINED


def _full_disk(self, model, folder):
    from rlhf.core.errors import ModelError

    raise ModelError("the disk was in a bad mood")


def test_a_stopped_run_is_published_as_it_stands_and_can_go_on(run_folder, recipe, capfd):
    shutil.rmtree(run_folder / "checkpoints" / f"step-{TRAINED:08d}")
    (run_folder / "done.json").unlink()
    stopped = new_status("reward", state="stopped", step=TRAINED - 1, total=TRAINED)
    write_status(run_folder, stopped)
    assert main(["publish", str(run_folder), "train.publish=last"]) == 0
    assert f"has trained {TRAINED - 1} of {TRAINED} steps" in capfd.readouterr().out
    assert json.loads((run_folder / "evaluation.json").read_text())["step"] == TRAINED - 1
    assert read_completion(run_folder) is None and read_status(run_folder) == stopped
    assert reward([f"output={run_folder}", *recipe, "train.publish=none"]) == 0
    assert read_completion(run_folder).step == TRAINED


@pytest.mark.parametrize("kind", ["absent", "no run", "no checkpoint", "damaged", "at work", "untold setting"])
def test_what_cannot_be_published_is_said(kind, run_folder, capsys, tmp_path):
    folder, arguments = run_folder, []
    if kind == "absent":
        folder, said = tmp_path / "absent", "no folder of a run that has begun to train"
    elif kind == "no run":
        folder, said = run_folder / "checkpoints", "no folder of a run that has begun to train"
    elif kind == "no checkpoint":
        shutil.rmtree(run_folder / "checkpoints")
        said = "no checkpoint to publish from"
    elif kind == "damaged":
        (run_folder / "checkpoints" / f"step-{TRAINED:08d}" / "loop.json").write_text("{")
        said = "loop.json: cannot be read"
    elif kind == "at work":
        write_status(run_folder, new_status("reward", phase="training", step=1, total=3))
        said = f"the run is at work (training  step 1/3; process {os.getpid()})"
    else:
        arguments, said = ["--ranks", "1", "train.publsh=last"], "did you mean train.publish?"
    assert main(["publish", str(folder), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (run_folder / "final").exists()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_two_ranks_have_trained_is_published_by_one_or_two(run_ranks, recipe, tmp_path, ranks):
    run = tmp_path / "run"
    settings = [f"output={run}", *recipe, "engine.kind=deepspeed", "engine.deepspeed=zero2", "train.publish=none"]
    run_ranks(["-m", "reward", *settings], ranks=2)
    asked = ["--config", str(run / "config.yaml"), "train.publish=best", "train.resume=publish"]
    if ranks == 1:
        assert main(["publish", str(run), "--ranks", "1"]) == 0
    else:
        run_ranks(["-m", "reward", *asked], ranks=2)
    assert (run / "final" / "model.safetensors").is_file()
