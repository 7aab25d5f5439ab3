"""A reward model to train: a backbone as it is loaded, its head, and what of it is trained."""

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reward.config import RewardModelConfig
from reward.heads import Heads, NonNegativeHead, draw, find_head, linear_layers, mlp_head, with_float32_head
from reward.model import LanguageModelHead, RewardModel
from reward.self_check import check_scores
from rlhf.core.errors import ModelError
from rlhf.models.backbones import load_classifier
from rlhf.models.kernels import apply_kernels
from rlhf.models.options import BackboneConfig
from rlhf.models.trainable import make_trainable


def build_reward_model(
    config: RewardModelConfig,
    *,
    dtype: torch.dtype,
    pad_token_id: int,
    vocabulary: int,
    seed: int,
    with_lm_head: bool = False,
    checked: bool = True,
    setting: str = "model.path",
    processes: int | None = None,
    shared: bool = False,
) -> RewardModel:
    """A fresh reward model on the CPU, the same on every rank for one seed.

    Args:
        config: backbone and head.
        dtype: of all weights.
        pad_token_id: see rlhf.models.tokenizer.
        vocabulary: tokens of the tokenizer; the embedding grows to it, never to a rounder number.
        seed: of new weights.
        with_lm_head: also keep a frozen language-model head, for the GRM losses.
        checked: whether to compare it with plain Transformers: once for each model is enough, on one rank.
        setting: of the recipe, where the path comes from; for messages.
        processes: see :func:`rlhf.models.backbones.check_host_memory`.
        shared: see :func:`rlhf.models.backbones.load_classifier`.

    Raises:
        ModelError: if the backbone cannot be loaded or has not the parts asked for.
    """
    torch.manual_seed(seed)
    hf, missing = load_classifier(
        config, dtype=dtype, pad_token_id=pad_token_id, vocabulary=vocabulary, processes=processes, shared=shared
    )
    if not missing and config.head == "linear" and config.heads == 1 and not config.new_head:
        with_float32_head(hf)
        origin = f"the one of {config.path} (model.new_head=true draws a new one)"
    else:
        _init_head(hf, config, dtype, missing, torch.Generator().manual_seed(seed))
        origin = "a new one" if missing else f"a new one, in place of that of {config.path}"
    lm_head = LanguageModelHead(_output_projection(config, hf.dtype), hf.config) if with_lm_head else None
    model = RewardModel(hf, lm_head)
    model.head_origin = origin
    if checked:
        check_scores(model, f"{setting} = {config.path}")
    apply_kernels(hf, config)
    make_scorer_trainable(model, config, dtype)
    return model


def make_scorer_trainable(model: RewardModel, config: BackboneConfig, dtype: torch.dtype) -> None:
    """What :func:`rlhf.models.trainable.make_trainable` does; the head is always trained."""
    adapter = make_trainable(model.hf, config, dtype)
    if adapter is not None:
        object.__setattr__(model, "_adapters", (adapter,))  # a plain tuple: its weights are hf's own
        find_head(model.hf).requires_grad_(True)


def _init_head(
    hf: PreTrainedModel,
    config: RewardModelConfig,
    dtype: torch.dtype,
    missing: Collection[str],
    generator: torch.Generator,
) -> None:
    """New weights of type ``dtype`` for the head; what an encoder's files have of it but for its last layer stays."""
    head = find_head(hf)
    own = config.head != "linear" or config.heads > 1
    if own and not hasattr(hf, "score"):
        asked = f"head = {config.head}" if config.heads == 1 else f"heads = {config.heads}"
        raise ModelError(f"model.{asked} is for decoder backbones; encoders bring a head of their own")
    width = hf.config.hidden_size
    if config.head == "bnrm":
        hf.score = NonNegativeHead(width, config.head_hidden)
        hf.score.start(config.head_init_scale, generator)
        hf.score.to(dtype)
        return
    if config.heads > 1:
        head = hf.score = Heads(width, config.heads, bias=False)
        hf.config.num_labels = config.heads
    if config.head == "mlp":
        head = hf.score = mlp_head(width, config.head_hidden)
    with_float32_head(hf)
    *inner, final = linear_layers(head)
    names = {layer: f"{name}.weight" for name, layer in hf.named_modules()}
    for layer in inner:
        if config.head == "mlp":
            draw(layer.to(dtype), (3 * layer.in_features) ** -0.5, generator)
        elif names[layer] in missing:
            draw(layer.to(dtype), getattr(hf.config, "initializer_range", 0.02), generator)
    draw(final.to(dtype), config.head_init_scale / (final.in_features + 1), generator)


def _output_projection(config: RewardModelConfig, dtype: torch.dtype) -> Tensor:
    """The language-model head of the backbone's checkpoint: ``(V, D)``."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.path, revision=config.revision, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    except ValueError as error:
        raise ModelError(f"model.path = {config.path}: the GRM losses need a language-model head: {error}") from error
    return model.get_output_embeddings().weight
