"""What a run is going to publish is tried before its first step."""

import copy
import json
import time
from types import SimpleNamespace

import pytest
import torch

from policy.options import PolicyConfig
from policy.publish import PublishablePolicy
from policy.sft.__main__ import main as sft
from reward.config import RewardConfig, RewardModelConfig
from reward.publish import PublishableRewardModel
from rlhf.core.errors import ModelError
from rlhf.data.options import DataConfig
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.options import LoraOptions
from rlhf.train import fresh, publishing, rehearsal
from rlhf.train.chat import load_chat
from rlhf.train.rehearsal import rehearsed

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def chat(tiny_model):
    return load_chat(tiny_model)


@pytest.fixture
def publishables(tiny_model, chat):
    """By name: policies merged and as adapter in two precisions, and a reward model."""

    def policy(dtype, **model):
        config = PolicyConfig(path=str(tiny_model), **model)
        settings = {"stage": "sft", "seed": 0, "objective": {}, "training_data": ""}
        return PublishablePolicy(model=config, dtype=dtype, chat=chat, **settings)

    lora = LoraOptions(rank=4, targets=["q_proj", "v_proj"])
    reward = RewardConfig(
        output=tiny_model,
        model=RewardModelConfig(path=str(tiny_model), freeze_layers=3),
        data=DataConfig(train="x"),
        engine=EngineConfig(kind="local", precision="float32"),
    )
    return {
        "whole": policy(torch.bfloat16),
        "merged": policy(torch.float32, lora=lora),
        "adapter": policy(torch.bfloat16, lora=lora, publish_lora="adapter", freeze_layers=1),
        "reward": PublishableRewardModel(config=reward, chat=chat, evaluation=None, margins={}, training_data=""),
    }


def recipe(folder, publish="last"):
    return SimpleNamespace(output=folder, train=SimpleNamespace(publish=publish, resume="auto"))


def rehearse(config, ranks, publishable) -> None:
    with rehearsed(config, ranks, publishable):
        pass


@pytest.fixture
def written(monkeypatch):
    """Number of layers of each model that is written."""
    seen, write = [], rehearsal.write_folder

    def noted(publishable, model, *rest):
        seen.append(model.hf.config.num_hidden_layers)
        return write(publishable, model, *rest)

    monkeypatch.setattr(rehearsal, "write_folder", noted)
    return seen


@pytest.mark.parametrize("kind", ["whole", "merged", "adapter", "reward"])
def test_two_layers_of_a_large_model_are_published_and_nothing_is_left(
    kind, publishables, written, monkeypatch, tmp_path
):
    monkeypatch.setattr("rlhf.models.backbones.LITTLE_BYTES", 0)
    rehearse(recipe(tmp_path), ALONE, publishables[kind])
    assert written == [2]
    assert list(tmp_path.iterdir()) == []


def test_a_little_model_is_rehearsed_whole_and_none_where_nothing_is_published(publishables, written, tmp_path):
    rehearse(recipe(tmp_path), ALONE, publishables["whole"])
    rehearse(recipe(tmp_path, publish="none"), ALONE, publishables["whole"])
    assert written == [3]


def test_a_run_that_fails_meanwhile_leaves_no_folder_and_no_answer_to_the_next_one(publishables, written, tmp_path):
    with pytest.raises(ZeroDivisionError), rehearsed(recipe(tmp_path), ALONE, publishables["whole"]):
        assert list(tmp_path.iterdir())
        1 // 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    rehearse(recipe(tmp_path), ALONE, publishables["merged"])
    assert written == [3, 3]


def test_a_process_that_nobody_waits_for_is_ended_at_once(tmp_path):
    process = fresh._FreshProcess()
    process.ask({"module": "rlhf.train.nothing", "folder": str(tmp_path), "request": {}})
    began = time.monotonic()
    process.end()
    assert not process.lives and time.monotonic() - began < fresh.SECONDS_TO_END / 2


def test_a_model_that_cannot_be_cut_is_rehearsed_whole(publishables, written, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("rlhf.models.backbones.LITTLE_BYTES", 0)
    save = PublishablePolicy.save

    def picky(self, model, folder):
        if model.hf.config.num_hidden_layers < 3:
            raise ValueError("layer_types has 3 entries")
        save(self, model, folder)

    monkeypatch.setattr(PublishablePolicy, "save", picky)
    rehearse(recipe(tmp_path), ALONE, publishables["whole"])
    assert written == [2, 3]
    assert "2 layers alone cannot be published (ValueError: layer_types has 3 entries)" in caplog.text


def test_an_adapter_that_is_left_out_is_noticed_though_it_begins_at_zero(publishables, monkeypatch, tmp_path):
    def without(self, model, folder):
        model.plain()
        model._adapters[0].unload().save_pretrained(folder)

    monkeypatch.setattr(PublishablePolicy, "save", without)
    with pytest.raises(ModelError, match=r"tried before the first step, .*does not reproduce the live values"):
        rehearse(recipe(tmp_path), ALONE, publishables["merged"])


def other_template(chat):
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return tokenizer


def other_tokens(chat):
    tokenizer = publishing_portable(chat)
    tokenizer.add_tokens(["happy"])
    return tokenizer


publishing_portable = publishing.portable_tokenizer


@pytest.mark.parametrize(
    ("fault", "said"),
    [(other_template, "the saved chat template shows"), (other_tokens, "splits the text differently")],
)
def test_a_run_whose_tokenizer_cannot_be_published_ends_before_its_first_step(
    fault, said, tiny_model, tmp_path, monkeypatch, capfd
):
    rows = [{"messages": [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "happy"}]}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(publishing, "portable_tokenizer", fault)
    monkeypatch.setattr(publishing, "CONVERSATIONS", ([*rows[0]["messages"]],))
    run = tmp_path / "run"
    settings = [f"output={run}", f"model.path={tiny_model}", f"data.train={tmp_path}/rows.jsonl", "data.eval_share=0"]
    assert sft([*settings, f"data.cache_dir={tmp_path}/cache", "engine.kind=local", "train.tensorboard=false"]) != 0
    assert said in capfd.readouterr().err
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()
