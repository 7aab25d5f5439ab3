"""The sampler's log-probabilities against those of a forward pass, before anything is sampled.

The sampler feeds tokens one by one to a model with a cache of its own. That a family of models takes both as the
sampler means them is not sure; a few tokens show it.
"""

import numpy as np
import torch

from policy.generation.api import sampler_tolerance
from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig
from policy.model import policy_of
from rlhf.core.errors import ModelError
from rlhf.data.batching import Row, length_bucket
from rlhf.engine.frozen import Frozen
from rlhf.models.backbones import embedding_rows
from rlhf.train.batches import asking
from rlhf.train.probing import padding_of, probe_rows

NEW_TOKENS = 3


def check_sampling(model: Frozen, path: str) -> None:
    """Compare log-probabilities of a few sampled tokens with those of a forward pass over the whole text.

    Args:
        model: its module is a :class:`PolicyModel`. Sharded or not, every rank must call this.
        path: its name, for messages.
    Raises:
        ModelError: if the sampler draws from another distribution.
        RemoteError: if it does so on another rank.
    """
    model.ranks.together(lambda: _check(model, path))


def _check(model: Frozen, path: str) -> None:
    policy = policy_of(model)
    sharded = any(hasattr(parameter, "ds_id") for parameter in policy.parameters())
    settings = SamplingConfig(max_new_tokens=NEW_TOKENS)
    sampler = HfSampler(model, settings, eos_token_ids=(), pad_token_id=0, synced=sharded)
    rows = probe_rows(embedding_rows(policy.hf), padding_of(policy.hf.config))
    prompts = [row.tokens for row in rows for _ in range(2)]
    try:
        drawn = sampler.generate(prompts, range(len(prompts)))
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(
            f"{path} ({type(policy.hf).__name__}) cannot be sampled from token by token with a cache of keys and "
            f"values ({type(error).__name__}: {str(error)[:300]}); take a model of another family (docs/models.md)"
        ) from error
    worst = 0.0
    for prompt, response in zip(prompts, drawn, strict=True):
        tokens = np.concatenate([prompt, response.tokens])
        bucket = length_bucket([Row(tokens, np.arange(len(tokens)) >= len(prompt))])
        with asking(model):
            (whole,) = model.forward((bucket.to(model.ranks.device),)).logprobs
        gaps = whole[0, len(prompt) - 1 :].float().cpu() - torch.from_numpy(response.logprobs)
        worst = max(worst, gaps.abs().max().item())
    allowed = sampler_tolerance(policy.hf.dtype)
    if not worst <= allowed:
        raise ModelError(
            f"{path} ({type(policy.hf).__name__}): tokens sampled one by one have log-probabilities up to {worst:.3g} "
            f"nats off those of a forward pass over the whole text (expected at most {allowed:.2g}): samples would "
            "come from another model than the one trained. Take a model of another family (docs/models.md), or try "
            "model.attention=eager"
        )
