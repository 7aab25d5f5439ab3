from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from policy.building import build_policy
from policy.options import PolicyConfig
from policy.publish import PublishablePolicy
from policy.reload_check import check_ends, open_policy
from rlhf.core.errors import ModelError
from rlhf.data.options import DataConfig
from rlhf.data.preferences import load_preferences
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.options import LoraOptions
from rlhf.train.chat import load_chat
from rlhf.train.fresh import plain_environment
from rlhf.train.publishing import publish

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def trained(tiny_model, tiny_pairs, tmp_path):
    """``trained(dtype, publish_lora)``: an engine whose adapters have moved, its data, and what to publish."""

    def make(dtype=torch.float32, publish_lora="merged"):
        config = PolicyConfig(path=str(tiny_model), lora=LoraOptions(rank=4, alpha=8.0), publish_lora=publish_lora)
        chat = load_chat(tiny_model)
        module = build_policy(config, dtype=dtype, vocabulary=len(chat.tokenizer), seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
        engine = LocalEngine(module, ranks=ALONE, optimizer=OptimizerConfig(), total_steps=1)
        data = load_preferences(DataConfig(train=str(tiny_pairs), cache_dir=tmp_path / "cache"), chat)
        published = PublishablePolicy(
            stage="preference",
            model=config,
            dtype=dtype,
            seed=0,
            chat=chat,
            objective={},
            training_data="",
        )
        return engine, data.train, published

    return make


@pytest.mark.parametrize("publish_lora", ["merged", "adapter"])
def test_low_precision_adapters_are_reproduced_by_a_fresh_process(trained, tmp_path, publish_lora):
    differences = publish(*trained(torch.bfloat16, publish_lora), tmp_path / "final")
    assert max(differences.values()) < 1e-5
    assert (tmp_path / "final" / "adapter_config.json").exists() == (publish_lora == "adapter")


def test_adapters_are_merged_in_float32_and_rounded_once(trained):
    engine, _, _ = trained(torch.bfloat16)
    before = {name: value.detach().clone() for name, value in engine.module.named_parameters()}
    merged = dict(engine.module.merged().named_parameters())
    checked = 0
    for name, value in before.items():
        if "lora_A" not in name:
            continue
        stem = name.removeprefix("hf.").partition(".lora_A")[0]
        down, up = value.float(), before[name.replace("lora_A", "lora_B")].float()
        base = before[f"hf.{stem}.base_layer.weight"].float()
        expected = (base + 8.0 / 4 * up @ down).bfloat16()
        assert torch.equal(merged[f"{stem}.weight"], expected), name
        checked += not torch.equal(expected, base.bfloat16() + (8.0 / 4 * up @ down).bfloat16())
    assert checked  # rounding twice would give other numbers


def test_weights_that_were_not_saved_are_found_out_and_an_earlier_final_stays(trained, tmp_path, monkeypatch):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "earlier").write_text("kept")
    base = AutoModelForCausalLM.from_pretrained(trained()[2].model.path)
    monkeypatch.setattr("policy.model.PolicyModel.save", lambda self, folder, lora: base.save_pretrained(folder))
    with pytest.raises(ModelError, match="does not reproduce the live values"):
        publish(*trained(), tmp_path / "final")
    assert [path.name for path in tmp_path.joinpath("final").iterdir()] == ["earlier"]


def test_an_adapter_ends_where_training_did_though_its_base_does_not(trained, tiny_model, tmp_path):
    _, _, published = trained()
    model = build_policy(replace(published.model, publish_lora="adapter"), dtype=torch.float32, vocabulary=1, seed=0)
    tokenizer = published.chat.tokenizer
    other = tokenizer.convert_tokens_to_ids("a")
    assert other not in AutoModelForCausalLM.from_pretrained(tiny_model).generation_config.to_dict().values()
    model.hf.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    model.save(tmp_path, "adapter")
    check_ends(open_policy(tmp_path).eval(), tokenizer, [5, 6, 7], [tokenizer.eos_token_id, other])


def test_what_is_published_is_built_without_kernels_checkpoints_and_checks(trained, monkeypatch):
    _, _, published = trained()
    asked = replace(published, model=replace(published.model, kernels="liger", gradient_checkpointing=True))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    seen = []
    monkeypatch.setattr("policy.building.check_logprobs", lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr("rlhf.models.backbones.check_host_memory", lambda *args, **more: seen.append(args[2]))
    monkeypatch.setattr("rlhf.models.kernels.apply_liger", lambda *_: pytest.fail("kernels for a GPU"))
    assert not asked.build(torch.float32).hf.is_gradient_checkpointing
    assert seen == [1]


@pytest.mark.parametrize("launcher", [None, "LOCAL_RANK", "TORCHELASTIC_RUN_ID"])
def test_the_fresh_process_has_the_threads_of_all_ranks(monkeypatch, launcher):
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if launcher is not None:
        monkeypatch.setenv(launcher, "0")
    assert ("OMP_NUM_THREADS" in plain_environment()) == (launcher is None)
