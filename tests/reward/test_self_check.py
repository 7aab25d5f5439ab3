import pytest
import torch
from transformers import LlamaConfig

from reward.config import RewardModelConfig
from reward.model import build_reward_model
from rlhf.core.errors import ModelError


def build(path, dtype=torch.float32, **options):
    config = RewardModelConfig(path=str(path), **options)
    return build_reward_model(config, dtype=dtype, pad_token_id=0, vocabulary=0, seed=3)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_model_scores_as_plain_transformers_does(tiny_model, dtype, head):
    build(tiny_model, dtype, head=head)


def test_a_model_that_pools_elsewhere_is_refused_with_numbers(tiny_model, monkeypatch):
    monkeypatch.setattr("reward.model.last_token_index", lambda mask: torch.zeros(len(mask), dtype=torch.long))
    with pytest.raises(ModelError, match=rf"{tiny_model} \(LlamaForSequenceClassification\).* up to [\d.e-]+ off"):
        build(tiny_model)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_new_head_is_the_same_in_every_precision_and_after_any_other_random_number(tiny_model, head):
    first = build(tiny_model, head=head).hf.score.state_dict()
    low = build(tiny_model, torch.bfloat16, head=head).hf.score.state_dict()
    shorter = build(tiny_model, layers=1, head=head).hf.score.state_dict()
    for name, value in first.items():
        assert torch.equal(value, shorter[name])
        assert torch.equal(value.bfloat16(), low[name])


def test_the_last_layer_starts_small(tiny_model):
    width = LlamaConfig.from_pretrained(tiny_model).hidden_size
    weight = build(tiny_model, head_init_scale=2.0).hf.score.weight
    assert float(weight.std()) == pytest.approx(2.0 / (width + 1), rel=0.4)
