"""Which attention and which precision a run takes by itself, on GPUs of several kinds."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, GPTNeoConfig, LlamaConfig

from rlhf.engine.build import precision_of
from rlhf.engine.options import EngineConfig
from rlhf.models import backbones
from rlhf.models.kernels import attention_implementation
from rlhf.models.options import BackboneConfig

AMPERE, TURING, VOLTA = (8, 0), (7, 5), (7, 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a capability, as PyTorch sees it, with the flash-attn package installed."""

    def put(capability):
        def supports(including_emulation=True):
            return including_emulation or capability >= AMPERE

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supports)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))

    return put


@pytest.mark.parametrize(("capability", "expected"), [(AMPERE, "bfloat16"), (TURING, "float32"), (VOLTA, "float32")])
def test_bfloat16_is_taken_where_the_gpu_has_it_not_where_it_is_emulated(gpu, capability, expected):
    gpu(capability)
    assert precision_of(EngineConfig(kind="deepspeed", precision="auto")) == expected


@pytest.mark.parametrize(
    ("settings", "has_flash", "capability", "expected"),
    [
        (LlamaConfig(), True, AMPERE, "flash_attention_2"),
        (LlamaConfig(), True, TURING, None),
        (GPTNeoConfig(), False, AMPERE, None),
        (Gemma2Config(), True, AMPERE, "flash_attention_2"),
        (Gemma2Config(), True, TURING, "eager"),
    ],
)
def test_flash_attention_is_taken_where_gpu_and_model_have_it(gpu, settings, has_flash, capability, expected):
    gpu(capability)
    assert attention_implementation("auto", torch.float16, settings, has_flash) == expected


@pytest.mark.parametrize(
    ("attention", "capability", "expected"),
    [
        ("auto", AMPERE, "eager"),
        ("auto", TURING, "auto"),
        ("flash_attention_2", AMPERE, "eager"),
        ("sdpa", AMPERE, "sdpa"),
    ],
)
def test_a_copy_on_the_cpu_has_nothing_that_runs_on_gpus_alone(gpu, attention, capability, expected):
    gpu(capability)
    config = BackboneConfig(path="m", attention=attention, kernels="liger", gradient_checkpointing=True)
    copied = backbones.plain_copy(config)
    assert (copied.attention, copied.kernels, copied.gradient_checkpointing) == (expected, "none", False)


@pytest.mark.parametrize("name", ["bloom", "mamba", "llama"])
def test_whether_a_family_has_flash_attention_is_asked_of_its_class(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    assert backbones._has_flash(AutoModelForCausalLM, AutoConfig.for_model(name)) == (name == "llama")
