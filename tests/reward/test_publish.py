"""What the reward stage publishes, in this process: the manifest, and who may read it."""

import os
import pkgutil
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reward.config import MarginConfig
from reward.publish import PublishableRewardModel
from reward.stage import run
from reward.task import RewardTask
from rlhf.core.errors import ModelError
from rlhf.data.preferences import load_preferences
from rlhf.engine.ranks import Ranks
from rlhf.models.manifest import read_manifest
from rlhf.train.chat import load_chat
from rlhf.train.publishing import check_low_precision

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def stage(tiny_config, tmp_path, monkeypatch):
    """``stage(name, **train section)`` runs the stage in a folder of that name; the manifest that it published."""
    monkeypatch.setattr("rlhf.train.publishing.check_in_fresh_process", lambda *_: {"single": 0.0})

    def start(name, **train):
        settings = {"max_steps": 6, "evaluate_every": 1, "checkpoint_every": 1, "tensorboard": False} | train
        config = replace(
            tiny_config,
            output=tmp_path / name,
            margin=MarginConfig(kind="ot", warmup_share=0.0),
            train=replace(tiny_config.train, **settings),
        )
        run(config, ALONE)
        return read_manifest(tmp_path / name / "final")

    return start


def interrupt(monkeypatch, after: int) -> None:
    """Let the run die after so many steps."""
    metrics, calls = RewardTask.step_metrics, []

    def step_metrics(self):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return metrics(self)

    monkeypatch.setattr(RewardTask, "step_metrics", step_metrics)


@pytest.mark.parametrize(("after", "log"), [(3, "gone"), (5, "cut"), (6, "gone"), (6, "cut")])
def test_a_resumed_run_publishes_the_manifest_of_a_straight_one(stage, tmp_path, monkeypatch, after, log):
    """Wherever it stopped, finished runs that are started again included, and whatever became of its log."""
    straight = stage("straight")
    assert straight.margin_statistics["margin/mean"] > 0 and "margin/transport_cost" in straight.margin_statistics
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        try:
            stage("resumed")
        except KeyboardInterrupt:
            assert after < 6
    path = tmp_path / "resumed" / "metrics.jsonl"
    path.unlink() if log == "gone" else path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert stage("resumed") == straight


def test_the_numbers_of_the_manifest_are_of_the_step_that_is_published(stage, tmp_path, runs):
    found = stage("best", publish="best", best_metric="-eval/accuracy")  # the worst step, which is not the last
    rows = runs.rows(tmp_path / "best")
    step = max(
        (row for row in runs.rows(tmp_path / "best", "eval")), key=lambda row: (-row["eval/accuracy"], row["step"])
    )["step"]
    assert step < 6
    assert found.margin_statistics["margin/mean"] == rows[step - 1]["margin/mean"] != rows[-1]["margin/mean"]


def test_a_run_opens_its_tokenizer_and_its_template_once(stage, monkeypatch):
    """All parts of a run have the same form of text because they have the same object."""
    opened = []
    for name in ("rlhf.models.tokenizer.AutoTokenizer.from_pretrained", "rlhf.data.templates.template_text"):
        module, _, attribute = name.rpartition(".")
        real = pkgutil.resolve_name(name)

        def counted(*args, real=real, name=name, **options):
            opened.append(name)
            return real(*args, **options)

        monkeypatch.setattr(pkgutil.resolve_name(module), attribute, counted)
    stage("run")
    assert len(opened) == len(set(opened)) == 2


def test_a_published_model_is_shown_the_system_prompt_of_its_training(stage, tiny_config, tmp_path, monkeypatch):
    """`rlhf score` fed other text: -1.22 instead of -3.24."""
    data = replace(tiny_config.data, system_prompt="be brief", thoughts="drop")
    config = replace(tiny_config, data=data)
    chat = load_chat(config.model.path, data.template_choice)
    [row, _] = load_preferences(data, chat).train.item(0).rows
    run(replace(config, output=tmp_path / "run", train=replace(config.train, max_steps=1, publish="last")), ALONE)
    final = tmp_path / "run" / "final"
    manifest = read_manifest(final)
    assert (manifest.system_prompt, manifest.thoughts_dropped) == ("be brief", True)
    text = chat.tokenizer.decode(row.tokens)
    form = r".*user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n(.*)<\|im_end\|>"
    question, answer = re.fullmatch(form, text, re.DOTALL).groups()
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"<think>hm</think>{answer}"}]
    published = load_chat(final)
    assert published.digest == manifest.template_digest == chat.digest
    assert published.encode(messages[:1], messages[1:])[0].tolist() == row.tokens.tolist()


def test_a_colleague_can_read_what_was_published(stage, tmp_path):
    before = os.umask(0o022)
    try:
        stage("run")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run" / "final").iterdir()} == {0o644}


@pytest.mark.parametrize("spread", [0.05, 3.7, 40.0])
def test_low_precision_is_measured_by_the_spread_of_rewards_and_is_a_warning(spread, caplog):
    """At an absolute .1, reward models in bfloat16 with a usual spread were refused, again on every repeat."""
    evaluation = SimpleNamespace(reward_sd=spread)
    published = PublishableRewardModel(config=None, chat=None, evaluation=evaluation, margins={}, training_data="")
    expected = spread * torch.linspace(-1, 1, 9)
    tolerance = published.tolerance(expected)
    assert tolerance == pytest.approx(0.1 * spread)
    check_low_precision(expected + 0.09 * spread, expected, tolerance, "logits")
    assert not caplog.text
    check_low_precision(expected + 0.2 * spread, expected, tolerance, "logits")
    assert f"differ by up to {0.2 * spread:.3f} logits" in caplog.text
    with pytest.raises(ModelError, match="not finite"):
        check_low_precision(expected * float("nan"), expected, tolerance, "logits")
    none_held_out = replace(published, evaluation=None)
    assert none_held_out.tolerance(expected) == pytest.approx(0.1 * float(expected.std()))
