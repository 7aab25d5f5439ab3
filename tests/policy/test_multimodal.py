"""Checkpoints of models that also see, of which only the text model is trained."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from policy.building import build_policy
from policy.generation.check import check_sampling
from policy.options import PolicyConfig
from rlhf.core.errors import ModelError
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.ranks import single_rank
from rlhf.models.backbones import load_causal_lm, load_classifier

TEXT = {"vocab_size": 150, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


def gemma3():
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=149)
    return Gemma3ForConditionalGeneration(config)


def mistral3():
    text, vision = {**TEXT, "model_type": "mistral"}, {**VISION, "model_type": "pixtral", "head_dim": 16}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=149)
    return Mistral3ForConditionalGeneration(config)


def llama4():
    text = TEXT | {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 32}
    vision = VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))


@pytest.fixture(params=[gemma3, mistral3, llama4])
def whole(request, tmp_path):
    torch.manual_seed(0)
    model = request.param().eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_the_text_model_is_taken_with_its_weights(whole):
    model, folder = whole
    config = PolicyConfig(path=str(folder))
    tokens = torch.arange(1, 9)[None]
    text = load_causal_lm(config, dtype=torch.float32, vocabulary=0).eval()
    torch.testing.assert_close(text(input_ids=tokens).logits, model(input_ids=tokens).logits)
    policy = build_policy(config, dtype=torch.float32, vocabulary=0, seed=0)
    check_sampling(ReplicatedModel(policy, single_rank()), "here")


def test_the_text_model_is_saved_for_plain_transformers(whole, tmp_path):
    model, folder = whole
    text = load_causal_lm(PolicyConfig(path=str(folder)), dtype=torch.float32, vocabulary=0)
    text.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("load", [load_causal_lm, load_classifier])
def test_weights_that_the_files_do_not_have_are_no_start(load, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_model / "model.safetensors")
    removed = next(name for name in weights if "layers.1.mlp" in name)
    save_file({name: value for name, value in weights.items() if name != removed}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tiny_model / "config.json").read_text())))
    options = {"pad_token_id": 0} if load is load_classifier else {}
    with pytest.raises(ModelError, match=f"lack 1 weights .*{removed}"):
        load(PolicyConfig(path=str(tmp_path)), dtype=torch.float32, vocabulary=0, **options)
