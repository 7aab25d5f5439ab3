import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from policy.building import build_policy
from policy.options import PolicyConfig
from rlhf.core.errors import ModelError
from rlhf.data.batching import Row, length_bucket
from rlhf.models import kernels
from rlhf.models.options import LoraOptions


def build(path, **options):
    return build_policy(PolicyConfig(path=str(path), **options), dtype=torch.float32, vocabulary=1, seed=0)


@pytest.fixture
def bucket():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 300, (length,), generator=generator).numpy() for length in (7, 12)]
    return length_bucket([Row(ids, ids >= 0) for ids in tokens])


@pytest.mark.parametrize("setting", [{"final_logit_softcapping": 2.0}, {"logit_scale": 0.3}, {"logits_scaling": 4.0}])
def test_what_a_model_does_to_its_logits_is_done(tiny_model, bucket, setting):
    plain = build(tiny_model)((bucket,)).logprobs[0]
    policy = build(tiny_model)
    for name, value in setting.items():
        setattr(policy.hf.config, name, value)
    changed = type(policy)(_with_plain_head(policy))((bucket,)).logprobs[0]
    states = policy.hf.base_model(input_ids=bucket.tokens).last_hidden_state
    logits = states @ policy.hf.lm_head.weight.T
    if "final_logit_softcapping" in setting:
        logits = 2 * torch.tanh(logits / 2)
    logits = logits * setting.get("logit_scale", 1) / setting.get("logits_scaling", 1)
    expected = logits[0, :6].log_softmax(-1).gather(1, bucket.tokens[0, 1:7, None]).squeeze(1)
    torch.testing.assert_close(changed[0, :6], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, plain, rtol=1e-2)


def _with_plain_head(policy):
    return policy.plain()


def test_the_plain_model_gives_logits_again(tiny_model, bucket):
    policy = build(tiny_model)
    logprobs = policy((bucket,)).logprobs[0]
    logits = policy.plain()(input_ids=bucket.tokens[:, :7]).logits
    expected = logits[0, :-1].log_softmax(-1).gather(1, bucket.tokens[0, 1:7, None]).squeeze(1)
    torch.testing.assert_close(logprobs[0, :6], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2, alpha=4.0)])
def test_entropies_and_log_probabilities_at_a_temperature_are_those_of_the_plain_model(tiny_model, bucket, lora):
    policy = build(tiny_model, lora=lora).eval()
    assert policy((bucket,)).entropies is None
    found = policy((bucket, bucket), with_entropies=True, temperature=0.7)
    states = policy.hf.base_model(input_ids=bucket.tokens).last_hidden_state
    rows = torch.distributions.Categorical(logits=(states @ policy.hf.get_output_embeddings().weight.T / 0.7)[:, :-1])
    mask = bucket.response_mask[:, 1:]
    for logprobs, entropies in zip(found.logprobs, found.entropies, strict=True):
        torch.testing.assert_close(logprobs, rows.log_prob(bucket.tokens[:, 1:]) * mask, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropies, rows.entropy() * mask, rtol=1e-4, atol=1e-5)
    found.entropies[0].sum().backward(retain_graph=True)
    name, trained = next((name, p) for name, p in policy.named_parameters() if p.requires_grad and "lora_A" not in name)
    gradient, trained.grad = trained.grad, None
    (rows.entropy() * mask).sum().backward()
    torch.testing.assert_close(gradient, trained.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("publish_lora", ["merged", "adapter"])
def test_a_saved_lora_policy_opens_with_plain_transformers(tiny_model, bucket, tmp_path, publish_lora):
    from transformers import AutoModelForCausalLM

    policy = build(tiny_model, lora=LoraOptions(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    policy.eval()
    expected = policy((bucket,)).logprobs[0]
    base = build(tiny_model)((bucket,)).logprobs[0]
    policy.save(tmp_path, publish_lora)
    assert (tmp_path / "adapter_config.json").exists() == (publish_lora == "adapter")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    logits = hf(input_ids=bucket.tokens[:1, :7]).logits
    found = logits[0, :-1].log_softmax(-1).gather(1, bucket.tokens[0, 1:7, None]).squeeze(1)
    torch.testing.assert_close(found, expected[0, :6], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, base, rtol=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_liger_without_cuda_is_refused_with_the_way_out(tiny_model):
    with pytest.raises(ModelError, match=r"needs a CUDA device.*model.kernels=none"):
        build(tiny_model, kernels="liger")


def test_the_reference_leaves_what_is_trained_as_it_was(tiny_model, bucket):
    """A layer that is trained all of a sudden would also break a checkpointed backward pass under way."""
    lora = LoraOptions(rank=2, alpha=4.0)
    policy = build(tiny_model, lora=lora, freeze_layers=2, gradient_checkpointing=True).train()
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained and all("layers.2." in name for name in trained)
    (logprobs,) = policy((bucket,)).logprobs
    with torch.no_grad(), policy.without_adapters():
        policy((bucket,))
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained
    logprobs.sum().backward()
    assert {name for name, parameter in policy.named_parameters() if parameter.grad is not None} == trained


def test_fused_kernels_are_those_of_one_model_and_of_gpus(tiny_model, monkeypatch):
    """Liger replaces classes and functions of the whole module: final/ was built of them, on a CPU, and failed."""
    own = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = torch.arange(3, 9)[None]
    expected = model(tokens).logits

    class FusedNorm(torch.nn.Module):
        def __init__(self, *_, **__):
            raise ValueError("Pointer argument cannot be accessed from Triton")

    def fused_rotation(*_):
        raise ValueError("Pointer argument cannot be accessed from Triton")

    def apply(model):
        modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb = FusedNorm, fused_rotation
        model.patched = True

    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    patch._apply_liger_kernel_to_instance = apply
    package = types.ModuleType("liger_kernel.transformers")
    package.monkey_patch = patch
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", own[0])
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own[1])
    kernels.apply_liger(model)
    assert model.patched and modeling_llama.LlamaRMSNorm is own[0]
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tiny_model)(tokens).logits, expected)
    on_gpu = types.SimpleNamespace(is_cuda=True)
    with pytest.raises(ValueError, match="accessed from Triton"):
        modeling_llama.apply_rotary_pos_emb(on_gpu, None, None, None)
