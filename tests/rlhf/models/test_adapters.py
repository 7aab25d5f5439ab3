import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.core.errors import ModelError
from rlhf.models.adapters import adapter_base, merge_adapters, with_adapter
from rlhf.models.backbones import weights_digest
from rlhf.models.options import BackboneConfig


def adapted(path, dtype=torch.float32):
    """A model with an adapter that changes something."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped


def test_a_merged_adapter_answers_as_the_adapted_model(tiny_model, tmp_path):
    wrapped = adapted(tiny_model).eval()
    wrapped.save_pretrained(tmp_path)
    tokens = torch.arange(3, 20)[None]
    expected = wrapped(input_ids=tokens).logits
    merged = with_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path).eval()
    torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not any("lora" in name for name, _ in merged.named_parameters())
    states = wrapped.base_model.model.model(tokens).last_hidden_state
    classifier = with_adapter(AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1), tmp_path)
    torch.testing.assert_close(classifier.model(tokens).last_hidden_state, states, rtol=1e-4, atol=1e-5)


def test_merging_in_low_precision_rounds_once(tiny_model):
    wrapped = adapted(tiny_model, torch.bfloat16)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    update = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * layer.scaling["default"]
    expected = (layer.base_layer.weight.float() + update).bfloat16()
    merge_adapters(wrapped)
    merged = wrapped.base_model.model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, expected, rtol=0, atol=0)


def test_an_adapter_of_another_model_is_refused(tiny_model, tmp_path):
    adapted(tiny_model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="the adapter does not fit LlamaForCausalLM"):
        with_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)


def test_a_base_that_is_not_here_is_named(tmp_path, tiny_model):
    for base in ("../gone", "/gone/model", "", "gone"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(ModelError, match="base_model_name_or_path"):
            adapter_base(tmp_path)
    named = {"base_model_name_or_path": "owner/name", "revision": "v1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    assert adapter_base(tmp_path) == ("owner/name", "v1")
    assert adapter_base(tiny_model) is None
    assert adapter_base("owner/name") is None


def test_the_weights_of_an_adapter_are_those_of_its_base_too(tiny_model, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model, base)
    adapted(base).save_pretrained(folder)
    before = weights_digest(BackboneConfig(path=str(folder)))
    assert weights_digest(BackboneConfig(path=str(folder))) == before
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.lm_head.weight += 1
    other.save_pretrained(base)
    assert weights_digest(BackboneConfig(path=str(folder))) != before
