"""Log-probabilities of responses under a language-model head, without a (rows, tokens, vocabulary) tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.core.checks import check_positive, check_same_shape
from rlhf.core.masking import check_mask


def response_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    response_mask: Tensor,
    *,
    head_bias: Tensor | None = None,
    chunk_tokens: int = 512,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of each row's response, summed over its tokens.

        logits_bt = logit_scale (head_weight hidden_bt + head_bias);  softcap tanh(logits / softcap) if given
        sums_b    = sum over t in the response of log softmax(logits_bt)[targets_bt]

    ``hidden[b, t]`` is what predicts ``targets[b, t]``: nothing is shifted here. With a causal model over
    ``tokens`` pass ``hidden[:, :-1]``, ``tokens[:, 1:]`` and ``response_mask[:, 1:]``.

    Only response places are projected, ``chunk_tokens`` at a time, and projected again in the backward pass;
    the largest tensor is ``(chunk_tokens, V)``.

    Args:
        hidden: ``(B, T, D)`` last-layer states, after the final norm.
        head_weight: ``(V, D)``, of the type of ``hidden``. Under ZeRO-3 it must stay gathered until backward.
        targets: ``(B, T)`` token ids; read only where ``response_mask`` is True.
        response_mask: ``(B, T)`` bool.
        head_bias: ``(V,)`` or ``None``.
        chunk_tokens: places projected at once; memory against launches.
        logit_scale: factor on the logits (Cohere; for Granite, one over its ``logits_scaling``).
        softcap: bound on the logits (Gemma 2), or ``None``.
    Returns:
        ``sums`` ``(B,)`` in nats and ``counts`` ``(B,)`` int64 of response tokens; both 0 for a row without.
        The projection runs in the type of ``hidden``, all after it in float32 (float64 if it is that).
    Raises:
        ValueError: if the shapes do not fit, the mask is not bool, or ``chunk_tokens`` or ``softcap`` is not
            positive.
    """
    check_mask("response_mask", response_mask)
    check_same_shape(hidden=hidden[..., 0], targets=targets, response_mask=response_mask)
    check_positive(chunk_tokens=chunk_tokens, softcap=1.0 if softcap is None else softcap)
    chunks = zip(
        hidden[response_mask].split(chunk_tokens), targets[response_mask].split(chunk_tokens), strict=True
    )
    # Without a response token there is one empty chunk: hidden and head stay in the graph of every rank.
    logprobs = [
        checkpoint(
            _chunk_logprobs,
            *(chunk, head_weight, head_bias, chunk_targets, logit_scale, softcap),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for chunk, chunk_targets in chunks
    ]
    per_token = torch.cat(logprobs)
    placed = torch.zeros(targets.shape, dtype=per_token.dtype, device=per_token.device)
    return placed.masked_scatter(response_mask, per_token).sum(dim=1), response_mask.sum(dim=1)


def _chunk_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """``(n,)`` log-probabilities of ``targets`` ``(n,)`` after ``hidden`` ``(n, D)``."""
    logits = F.linear(hidden, head_weight, head_bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
