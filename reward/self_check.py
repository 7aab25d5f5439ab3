"""A reward model's scores against those of plain Transformers, before anything is trained on them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf.core.errors import ModelError
from rlhf.data.batching import length_bucket
from rlhf.models.backbones import embedding_rows
from rlhf.train.probing import attention_of_any_device, padding_of, probe_rows

if TYPE_CHECKING:
    from reward.model import RewardModel

TOLERANCE = {torch.bfloat16: 0.2, torch.float16: 0.05}
"""Largest difference as a share of the size that scores have; other types: 1e-3."""


@torch.no_grad()
def check_scores(model: "RewardModel", path: str) -> None:
    """Compare scores with those of ``AutoModelForSequenceClassification``, which finds the end by the padding token.

    Args:
        model: it stays as it is.
        path: its name, for messages.
    Raises:
        ModelError: if they differ, or the model cannot be asked in one of the two ways.
    """
    hf = model.hf
    was_training = hf.training
    rows = probe_rows(embedding_rows(hf), padding_of(hf.config))
    bucket = length_bucket(rows)
    tokens = bucket.tokens.masked_fill(~bucket.token_mask, hf.config.pad_token_id)
    sizes: list[float] = []
    layers = [module for module in model.head.modules() if isinstance(module, nn.Linear)]
    final = layers[-1] if layers else model.head  # a head of non-negative weights alone is its own last layer
    watched = final.register_forward_pre_hook(lambda layer, inputs: sizes.append(_usual_score(layer, inputs[0])))
    try:
        with attention_of_any_device(hf):
            hf.eval()
            own = hf(input_ids=tokens, attention_mask=bucket.token_mask.long()).logits.float().mean(dim=1)
            found = model((bucket,))
            alone = torch.cat([model((length_bucket([row]),)).rewards for row in rows])
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(
            f"{path} ({type(hf).__name__}) cannot be asked for scores of plain text "
            f"({type(error).__name__}: {str(error)[:300]}); take a model of another family (docs/models.md)"
        ) from error
    finally:
        watched.remove()
        hf.train(was_training)
    if found.embeddings.dim() != 2:
        raise ModelError(
            f"{path} ({type(hf).__name__}): its head scores every token of a text and pools afterwards, so that a text "
            "has no one state to compare answers by. Take a model of another family (docs/models.md), or one whose "
            "config.json pools first"
        )
    ours = found.rewards
    allowed = TOLERANCE.get(hf.dtype, 1e-3) * max(float(own.abs().max()), float(ours.abs().max()), *sizes, 1e-6)
    shifted = float((ours - alone).abs().max())
    if not shifted <= allowed:
        raise ModelError(
            f"{path} ({type(hf).__name__}): padding behind a text changes its score by up to {shifted:.3g} (expected "
            f"at most {allowed:.2g}), so that scores would depend on what else is in a batch. Take a model of another "
            "family (docs/models.md)"
        )
    worst = float((ours - own).abs().max())
    if not worst <= allowed:
        raise ModelError(
            f"{path} ({type(hf).__name__}): scores from its last layer are up to {worst:.3g} off those that plain "
            f"Transformers gives (expected at most {allowed:.2g}): it pools or scores in a way that this toolkit does "
            "not know. Take a model of another family (docs/models.md)"
        )


def _usual_score(layer: nn.Module, states: Tensor) -> float:
    """The deviation of scores over directions of the weight: one score may be near 0, and says nothing of rounding."""
    rms = states.float().square().mean(dim=-1).sqrt()
    weight = next(layer.parameters()).float()
    return float(weight.norm() * rms.max())
