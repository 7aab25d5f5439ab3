"""A policy to train: a causal language model as it is loaded, checked, and what of it is trained."""

import torch

from policy.model import PolicyModel
from policy.options import PolicyConfig
from policy.self_check import check_logprobs
from rlhf.core.errors import ModelError
from rlhf.data.templates import ChatFormat
from rlhf.engine.build import DTYPES, precision_of
from rlhf.engine.ranks import Ranks
from rlhf.models.adapters import adapter_base
from rlhf.models.backbones import embedding_rows, load_causal_lm, load_model_config
from rlhf.models.kernels import apply_kernels
from rlhf.models.options import BackboneConfig
from rlhf.models.roles import ModelRole
from rlhf.models.tokenizer import required_embedding_rows
from rlhf.models.trainable import make_trainable
from rlhf.train.recipe import StageConfig
from rlhf.train.roles import is_shared_out


def policy_of_role(role: ModelRole, config: StageConfig, chat: ChatFormat, ranks: Ranks) -> PolicyModel:
    """The policy of a role of a run, trained or only asked; see :func:`build_policy`.

    Args:
        role: of the recipe.
        config: the recipe.
        chat: the format of the run: its tokenizer's tokens have embeddings.
        ranks: the main one checks the model.
    """
    return build_policy(
        role.backbone,
        dtype=DTYPES[precision_of(config.engine)],
        vocabulary=required_embedding_rows(chat.tokenizer),
        seed=config.train.seed,
        checked=ranks.is_main,
        setting=role.setting,
        shared=is_shared_out(role, config.engine),
    )


def build_policy(
    config: BackboneConfig,
    *,
    dtype: torch.dtype,
    vocabulary: int,
    seed: int,
    checked: bool = True,
    setting: str = "model.path",
    processes: int | None = None,
    shared: bool = False,
) -> PolicyModel:
    """The policy on the CPU, the same on every rank for one seed.

    Args:
        config: which model, and what of it is trained.
        dtype: of all weights.
        vocabulary: tokens of the tokenizer; the embedding grows to it, never to a rounder number.
        seed: of new weights (adapters, added tokens).
        checked: whether to compare it with its own logits: once for each model is enough, on one rank.
        setting: of the recipe, where the path comes from; for messages.
        processes: see :func:`rlhf.models.backbones.check_host_memory`.
        shared: see :func:`rlhf.models.backbones.load_classifier`.
    Raises:
        ModelError: if the model cannot be loaded or has not the parts asked for.
    """
    torch.manual_seed(seed)
    publishes = config.publish_lora if isinstance(config, PolicyConfig) and config.lora is not None else "merged"
    if publishes == "adapter" and adapter_base(config.path) is not None:
        raise ModelError(
            f"model.publish_lora = adapter: model.path = {config.path} is an adapter itself, so that a second one "
            "would need a base that is on no disk; set model.publish_lora=merged"
        )
    hf = load_causal_lm(config, dtype=dtype, vocabulary=vocabulary, processes=processes, shared=shared)
    model = PolicyModel(hf)
    on_disk = getattr(load_model_config(config).get_text_config(), "vocab_size", None)
    model.grown = on_disk is not None and embedding_rows(hf) > on_disk
    if checked:
        check_logprobs(model, f"{setting} = {config.path}")
    apply_kernels(hf, config)
    adapter = make_trainable(hf, config, dtype)
    if adapter is not None:
        object.__setattr__(model, "_adapters", (adapter,))  # a plain tuple: its weights are hf's own
    return model
