import itertools
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EuroBertConfig,
    EuroBertModel,
    FNetConfig,
    FNetModel,
    LlamaConfig,
)

from reward.building import build_reward_model
from reward.config import RewardModelConfig
from reward.model import RewardModel
from reward.self_check import check_scores
from rlhf.core.errors import ModelError
from rlhf.data.batching import length_bucket
from rlhf.models import backbones
from rlhf.models.backbones import embedding_rows
from rlhf.train.probing import padding_of, probe_rows


def build(path, dtype=torch.float32, **options):
    config = RewardModelConfig(path=str(path), **options)
    return build_reward_model(config, dtype=dtype, pad_token_id=0, vocabulary=0, seed=3)


def pool_at_the_beginning(monkeypatch):
    pool = RewardModel._pool
    monkeypatch.setattr(RewardModel, "_pool", lambda self, states, last: pool(self, states, torch.zeros_like(last)))


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_model_scores_as_plain_transformers_does(tiny_model, dtype, head):
    build(tiny_model, dtype, head=head)


def test_a_model_that_pools_elsewhere_is_refused_with_numbers(tiny_model, monkeypatch):
    pool_at_the_beginning(monkeypatch)
    with pytest.raises(ModelError, match=rf"{tiny_model} \(LlamaForSequenceClassification\).* up to [\d.e-]+ off"):
        build(tiny_model)


def test_an_encoder_that_sees_padding_is_refused_before_training(tmp_path):
    """FNet mixes all places of a row by a Fourier transform, and takes no mask."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    FNetModel(FNetConfig(pad_token_id=0, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"FNetForSequenceClassification\): padding behind a text changes its score"):
        build(tmp_path)


def test_a_head_that_scores_every_token_is_refused_by_name(tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config = EuroBertConfig(num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, clf_pooling="late", **sizes)
    EuroBertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"EuroBertForSequenceClassification\): its head scores every token"):
        build(tmp_path)


def test_a_classifier_of_other_labels_lends_its_body_and_only_that(tmp_path):
    sizes = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    old = DistilBertForSequenceClassification(DistilBertConfig(num_labels=3, pad_token_id=0, **sizes))
    old.save_pretrained(tmp_path)
    new = build(tmp_path).hf
    assert new.classifier.weight.shape == (1, 32)
    assert torch.equal(new.pre_classifier.weight, old.pre_classifier.weight)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_dim": 48}))
    with pytest.raises(ModelError, match=r"ffn\.lin1\.bias has shape \(64,\) in its files, expected \(48,\)"):
        build(tmp_path)


@pytest.mark.parametrize("family", ["cohere", "mamba"])
def test_a_family_without_a_classifier_is_refused_in_one_line(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"AutoModelForSequenceClassification for models of type {family}$") as found:
        build(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_new_head_is_the_same_in_every_precision_and_after_any_other_random_number(tiny_model, head, monkeypatch):
    first = build(tiny_model, head=head).hf.score.state_dict()
    low = build(tiny_model, torch.bfloat16, head=head).hf.score.state_dict()
    shorter = build(tiny_model, layers=1, head=head).hf.score.state_dict()
    for name, value in first.items():
        assert torch.equal(value, shorter[name])
        assert torch.equal(value.bfloat16(), low[name])

    load = backbones.load_classifier

    def draws_more(*given, **named):  # as another version of Transformers may
        loaded = load(*given, **named)
        torch.rand(7)
        return loaded

    monkeypatch.setattr("reward.building.load_classifier", draws_more)
    other = build(tiny_model, head=head).hf.score.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.items())


def test_the_last_layer_starts_small(tiny_model):
    width = LlamaConfig.from_pretrained(tiny_model).hidden_size
    weight = build(tiny_model, head_init_scale=2.0).hf.score.weight
    assert float(weight.std()) == pytest.approx(2.0 / (width + 1), rel=0.4)


def test_scores_near_0_are_no_reason_to_refuse_a_model_in_low_precision(tiny_model):
    """What one seed in a hundred was refused for: both probes score near 0 by chance, and kernels round apart."""
    model = build(tiny_model, torch.bfloat16)
    bucket = length_bucket(probe_rows(embedding_rows(model.hf), padding_of(model.hf.config)))
    with torch.no_grad():
        states = model((bucket,)).embeddings.float()
        weight = model.hf.score.weight
        direction = weight.float()[0]
        basis = torch.linalg.qr(states.T).Q  # both scores 0, but for rounding
        weight.copy_((direction - basis @ (basis.T @ direction))[None])
    hook = model.hf.model.register_forward_hook(every_other_call_off_by(2**-7))
    check_scores(model, "here")
    hook.remove()
    model.hf.model.register_forward_hook(every_other_call_off_by(2.0))
    with pytest.raises(ModelError, match="up to"):
        check_scores(model, "here")


def every_other_call_off_by(share):
    calls = itertools.count()

    def change(module, args, output):
        if next(calls) % 2 == 0:
            states = output.last_hidden_state
            noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
            output.last_hidden_state = states + (share * states.float().square().mean().sqrt() * noise).to(states.dtype)
        return output

    return change


def test_a_copy_is_not_checked_again(tiny_model, monkeypatch):
    pool_at_the_beginning(monkeypatch)
    config = RewardModelConfig(path=str(tiny_model))
    build_reward_model(config, dtype=torch.float32, pad_token_id=0, vocabulary=0, seed=3, checked=False)
    with pytest.raises(ModelError, match=r"critic\.path = "):
        build_reward_model(config, dtype=torch.float32, pad_token_id=0, vocabulary=0, seed=3, setting="critic.path")
