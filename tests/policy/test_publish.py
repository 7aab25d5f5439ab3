import pytest
import torch
from transformers import AutoModelForCausalLM

from policy.model import build_policy
from policy.options import PolicyConfig
from policy.publish import PublishablePolicy
from rlhf.core.errors import ModelError
from rlhf.data.options import DataConfig
from rlhf.data.preferences import load_preferences
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.options import LoraOptions
from rlhf.train.chat import load_chat
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


def test_weights_that_were_not_saved_are_found_out_and_an_earlier_final_stays(trained, tmp_path, monkeypatch):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "earlier").write_text("kept")
    base = AutoModelForCausalLM.from_pretrained(trained()[2].model.path)
    monkeypatch.setattr("policy.model.PolicyModel.save", lambda self, folder, lora: base.save_pretrained(folder))
    with pytest.raises(ModelError, match="does not reproduce the live values"):
        publish(*trained(), tmp_path / "final")
    assert [path.name for path in tmp_path.joinpath("final").iterdir()] == ["earlier"]
