"""Adapter folders as peft writes them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from policy.options import PolicyConfig
from rlhf.models.backbones import load_causal_lm
from rlhf.train.chat import load_chat


def test_an_adapter_without_a_tokenizer_reads_and_ends_as_its_base(tiny_model, tiny_tokenizer, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    also = tiny_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    GenerationConfig(eos_token_id=[tiny_tokenizer.eos_token_id, also]).save_pretrained(base)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter += 0.5
    wrapped.save_pretrained(adapter)
    assert not list(adapter.glob("*token*")) and not (adapter / "generation_config.json").exists()
    expected, found = load_chat(base), load_chat(adapter)
    assert (found.digest, found.tokenizer_digest) == (expected.digest, expected.tokenizer_digest)
    assert found.end_token_ids == expected.end_token_ids and also in found.end_token_ids
    tokens = torch.arange(4, 12)[None]
    loaded = load_causal_lm(PolicyConfig(path=str(adapter)), dtype=torch.float32, vocabulary=0)
    torch.testing.assert_close(loaded(tokens).logits, wrapped(input_ids=tokens).logits)
    assert (loaded(tokens).logits - model(tokens).logits).abs().max() > 1e-2
