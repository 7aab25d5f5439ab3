"""A policy's log-probabilities against the model's own logits, before anything is trained on them.

The toolkit computes them from the last layer's states, so it must know all that a model does to its states and logits.
That is read off its configuration, which has been wrong for some family. A few tokens show it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.core.errors import ModelError
from rlhf.data.batching import Row, length_bucket
from rlhf.models.backbones import embedding_rows
from rlhf.train.probing import attention_of_any_device, padding_of, probe_rows

if TYPE_CHECKING:
    from policy.model import PolicyModel

LOGITS_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest difference, as a share of the spread of the logits; other types: 1e-3."""


def check_logprobs(model: "PolicyModel", path: str) -> None:
    """Compare the log-probabilities that ``model`` gives with the logits of the Transformers model inside.

    Args:
        model: it stays as it is.
        path: its name, for messages.
    Raises:
        ModelError: if they differ, or the model cannot be asked in one of the two ways.
    """
    hf = model.hf
    was_training = hf.training
    rows = probe_rows(embedding_rows(hf), padding_of(hf.config))
    try:
        with attention_of_any_device(hf):
            hf.eval()
            with model.as_plain():
                own = [_own_logits(hf, row) for row in rows]
            found = _policy_logprobs(model, rows)
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(
            f"{path} ({type(hf).__name__}) cannot be asked for log-probabilities of plain text "
            f"({type(error).__name__}: {str(error)[:300]}): this toolkit needs a decoder that reads tokens alone"
        ) from error
    finally:
        hf.train(was_training)
    worst, spread = 0.0, 0.0
    for row, logits, ours in zip(rows, own, found, strict=True):
        targets = torch.from_numpy(row.tokens[1:])
        expected = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
        worst = max(worst, *((ours[way] - expected).abs().max().item() for way in range(len(ours))))
        spread = max(spread, (logits.amax(dim=-1) - logits.amin(dim=-1)).max().item())
    allowed = LOGITS_TOLERANCE.get(hf.dtype, 1e-3) * max(spread, 1e-3)
    if not worst <= allowed:
        raise ModelError(
            f"{path} ({type(hf).__name__}): log-probabilities made from its last layer are up to {worst:.3g} nats off "
            f"those of its own logits (expected at most {allowed:.2g}): the model does something to its states or "
            "logits that this toolkit does not know, and would be trained on wrong numbers. Take a model of another "
            "family (docs/models.md)"
        )


@torch.no_grad()
def _own_logits(hf: PreTrainedModel, row: Row) -> Tensor:
    """``(T - 1, V)`` in float32."""
    tokens = torch.from_numpy(row.tokens)[None].to(hf.device)
    return hf(input_ids=tokens, use_cache=False).logits[0, :-1].float().cpu()


def _policy_logprobs(model: "PolicyModel", rows: list[Row]) -> list[list[Tensor]]:
    """Log-probabilities of each row, as evaluation asks (one block) and as training does (several, with gradient)."""
    device = model.hf.device
    with torch.no_grad():
        (together,) = model((length_bucket(rows).to(device),)).logprobs
    with torch.enable_grad():
        apart = model(tuple(length_bucket([row]).to(device) for row in rows)).logprobs
    found = []
    for place, row in enumerate(rows):
        count = len(row.tokens) - 1
        found.append([together[place, :count].cpu(), apart[place][0, :count].detach().float().cpu()])
    return found
