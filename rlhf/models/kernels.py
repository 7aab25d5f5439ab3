"""Which attention and which fused kernels a model computes with, and whether it computes activations again."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.core.errors import ModelError
from rlhf.models.options import BackboneConfig


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute the activations of each layer in the backward pass, in training mode.

    Transformers also makes the output of the embeddings require a gradient, which re-entrant checkpoints need. These
    do not, and it would carry the backward pass through frozen layers.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()


def apply_kernels(model: PreTrainedModel, config: BackboneConfig) -> None:
    """Give a loaded and checked model the fused kernels that the recipe asks for: they run on a GPU only."""
    if config.kernels == "liger":
        apply_liger(model)


def apply_liger(model: PreTrainedModel) -> None:
    """Replace norms, rotary embeddings and MLPs of a loaded model by Liger's fused kernels.

    Raises:
        ModelError: without CUDA, without the package, or for a model that Liger does not know.
    """
    if not torch.cuda.is_available():
        raise ModelError("model.kernels = liger needs a CUDA device, and there is none; set model.kernels=none")
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ModelError(
            f"model.kernels = liger, but the package cannot be imported ({error}): pip install 'margin-rlhf[kernels]'"
        ) from error
    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"model.kernels = liger: Liger has no kernels for {model.config.model_type}; set it to none")
    modeling = vars(sys.modules[type(model).__module__])
    before = dict(modeling)
    monkey_patch._apply_liger_kernel_to_instance(model=model)
    # It replaces classes and functions of the whole module, too, which models on the CPU need: publishing builds one.
    for name, own in before.items():
        fused = modeling[name]
        if fused is not own:
            modeling[name] = own if isinstance(own, type) else _on_gpus(fused, own)


def _on_gpus(fused: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """``fused`` for tensors on a GPU, ``own`` for others."""

    @functools.wraps(own)
    def chosen(*values: Any, **named: Any) -> Any:
        on_gpu = any(getattr(value, "is_cuda", False) for value in (*values, *named.values()))
        return (fused if on_gpu else own)(*values, **named)

    return chosen


def attention_implementation(
    wanted: str, dtype: torch.dtype, settings: PretrainedConfig, has_flash: bool
) -> str | None:
    """The name Transformers takes; ``None`` leaves the choice to it (SDPA where the model has it).

    Args:
        wanted: the recipe's ``model.attention``.
        dtype: of the weights.
        settings: of the model.
        has_flash: whether the model's code can call flash attention.
    Raises:
        ModelError: if the wanted one computes something else than the model.
    """
    exact = exact_attention(settings)
    if wanted == "sdpa" and exact is not None:
        raise ModelError(
            f"model.attention = sdpa leaves out the soft-capping of attention that {settings.model_type} has "
            "(attn_logit_softcapping): set it to auto or eager"
        )
    if wanted != "auto":
        return wanted
    return "flash_attention_2" if has_flash and flash_runs(dtype) else exact


def exact_attention(settings: PretrainedConfig) -> str | None:
    """What to open a model with where the choice of Transformers would leave out a part of it, else ``None``.

    PyTorch's SDPA cannot bound the scores of attention, as Gemma 2 does; Transformers takes it all the same, unsaid.
    """
    return "eager" if getattr(settings, "attn_logit_softcapping", None) is not None else None


def flash_runs(dtype: torch.dtype) -> bool:
    """Whether flash attention is installed and this GPU has it: from Ampere on, in half precision."""
    if dtype not in (torch.bfloat16, torch.float16) or importlib.util.find_spec("flash_attn") is None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
