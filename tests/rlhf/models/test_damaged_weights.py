"""Weights that are not whole are named before anything is loaded."""

import json
import shutil

import pytest
import torch

from rlhf.core.errors import ModelError
from rlhf.models.backbones import load_causal_lm
from rlhf.models.options import BackboneConfig
from rlhf.models.weight_files import checkpoint_bytes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: POINTER, r"pointer .*git lfs pull"),
        (lambda raw: raw[:-1000], r"cut short or damaged: \d+ bytes, expected \d+"),
        (lambda raw: raw[:100], "no safetensors file, or cut short: 100 bytes"),
        (lambda raw: b"", "no safetensors file, or cut short: 0 bytes"),
        (lambda raw: b"<html>" * 9, "no safetensors file"),
        (lambda raw: raw + b"x", "cut short or damaged"),
        (lambda raw: (2).to_bytes(8, "little") + b"[]", "no safetensors file"),
    ],
    ids=["pointer", "cut", "cut in the header", "empty", "html", "longer", "a list"],
)
def test_weights_that_are_not_whole_are_named(tiny_model, tmp_path, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=rf"model\.safetensors: the weights are .*{message}"):
        checkpoint_bytes(folder, torch.float32)
    with pytest.raises(ModelError, match=r"model\.safetensors: the weights are"):
        load_causal_lm(BackboneConfig(path=str(folder)), dtype=torch.float32, vocabulary=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token_id": 99999},
        {"dtype": "auto", "torch_dtype": "auto"},
        {"num_attention_heads": 5},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        {"hidden_act": "no such"},
        {"vocab_size": "many"},
        {"model_type": "no such"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_configuration_that_does_not_fit_together_is_one_message(tiny_model, tmp_path, settings):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"model\.path = {folder}: .+"):
        load_causal_lm(BackboneConfig(path=str(folder)), dtype=torch.float32, vocabulary=0)


def test_whole_weights_are_counted(tiny_model):
    model = load_causal_lm(BackboneConfig(path=str(tiny_model)), dtype=torch.float32, vocabulary=0)
    assert checkpoint_bytes(tiny_model, torch.float32) >= sum(each.numel() * 4 for each in model.parameters())
