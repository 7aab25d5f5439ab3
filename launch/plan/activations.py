"""Bytes that a forward pass keeps for the backward pass, and those of a moment in between.

The formulas count the tensors that autograd saves in Transformers' Llama-like layers (RMSNorm, rotary embedding,
grouped attention, gated MLP), term by term; tests compare them with what saved_tensors_hooks of torch sees.
With D, F, A, G = hidden, intermediate, query and key width, s bytes a number and n tokens:

    norm        s = 4: D (input) + D (normalized)           s = 2: 2 D (input in float32) + D (normalized)
    its output  D, read by the projections behind it
    attention   A (query) + 2 G (keys, values) + A (output) + one float32 per head (log-sum-exp); of packed rows that
                attend one by one, these of the rows' padded tokens, and A of the sequence's (the output, put back)
    MLP         4 F (gate, its activation, up, their product)

Liger's kernels compute some of these again: of a norm they keep its input in the run's precision, of an MLP 3 F.

References:
    Korthikanti et al. (2022), arXiv:2205.05198, section 4, does the same for GPT's layers.
"""

from dataclasses import dataclass
from typing import Literal

from launch.plan.shapes import Attention, ModelShape

Trained = Literal["full", "lora", "none"]

FLOAT32 = 4
PROJECTIONS = 7
"""Linear maps of a layer: query, key, value, output, gate, up, down."""
CHUNK_LOGITS = 3
"""float32 tensors of a chunk of logits that are alive at once: logits, their exponentials or slopes, a product."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The tokens that one rank computes at once."""

    tokens: int
    """Tokens of a micro-batch: of a packed sequence, or the padded ones of all length buckets."""
    bucket_tokens: int
    """What one layer computes at once: the packed sequence, or the largest length bucket."""
    attended: int | None = None
    """Padded tokens of the rows, where the attention of a packed sequence lays them out."""
    squares: int
    """Sum over rows of their padded length squared; for eager attention."""
    bucket_squares: int = 0
    """Sum over rows of their padded length squared, in the largest length bucket."""


def layer_bytes(
    shape: ModelShape,
    tokens: int,
    *,
    size: int,
    attention: Attention = "sdpa",
    trained: Trained = "full",
    lora_rank: int = 0,
    squares: int = 0,
    attended: int | None = None,
    fused: bool = False,
) -> int:
    """Bytes that one layer keeps of ``tokens`` tokens until its backward pass.

    Args:
        shape: of the model.
        tokens: that it computes.
        size: bytes of a number: 4 or 2.
        attention: eager keeps the ``T x T`` weights twice over (float32 softmax, and its copy in the run's precision).
        trained: full: weights have gradients. lora: adapters only, and norms are frozen. none: nothing is kept.
        lora_rank: of the adapters.
        squares: sum over rows of their padded length squared.
        attended: padded tokens of the rows, if ``tokens`` are packed and rows attend one by one.
        fused: whether norms and MLPs are Liger's.
    """
    if trained == "none":
        return 0
    width, mlp = shape.hidden, shape.intermediate
    norm = norm_bytes(width, size=size, trained=trained == "full", fused=fused) + width * size
    keys = shape.query_width if attention == "eager" else shape.kv_width  # eager repeats them for each query head
    per_token = 2 * norm + (3 if fused else 4) * mlp * size
    if trained == "lora":
        per_token += PROJECTIONS * lora_rank * size
    attend = (2 * shape.query_width + 2 * keys) * size
    if attended is None:
        attended = tokens
    else:
        per_token += shape.query_width * size
    if attention == "eager":
        scores = shape.heads * squares * (FLOAT32 if size == FLOAT32 else FLOAT32 + size)
        return tokens * per_token + attended * attend + scores
    return tokens * per_token + attended * (attend + shape.heads * FLOAT32)


def adapter_holes_bytes(shape: ModelShape, tokens: int, *, size: int, attended: int | None = None) -> int:
    """What LoRA leaves unused of the heap of a CPU, one layer.

    An adapted projection makes the base's output, adds the adapter's, and frees the first. The adapter's narrow output,
    which is kept, is put into the hole, and the next projection's no longer fits: the outputs of all seven (one of
    width A, two each of widths G, F and D) stay as holes. So do, of packed rows that attend one by one, queries, keys
    and values before they are laid out as rows (``attended`` padded tokens), and the rows' output before it is put
    back.
    """
    attention = shape.query_width + 2 * shape.kv_width
    outputs = tokens * (attention + 2 * shape.intermediate + 2 * shape.hidden)
    if attended is not None:
        outputs += tokens * attention + attended * shape.query_width
    return outputs * size


def norm_bytes(width: int, *, size: int, trained: bool, fused: bool = False) -> int:
    """Bytes per token that an RMSNorm keeps: input and root in float32, and the normalized values for its weight."""
    if fused:
        return width * size + FLOAT32
    return width * FLOAT32 + FLOAT32 + (width * size if trained else 0)


def boundary_bytes(shape: ModelShape, tokens: int, *, size: int) -> int:
    """What gradient checkpointing keeps of a layer: its input."""
    return tokens * shape.hidden * size


def working_bytes(shape: ModelShape, bucket_tokens: int, *, size: int) -> int:
    """Passing tensors of one layer: of its MLP, the widest part, three of width F, and two of the hidden width.

    Forward: gate, up and their product before one is freed; backward: the gradients of these.
    """
    return bucket_tokens * (3 * shape.intermediate + 2 * shape.hidden) * size


def head_bytes(shape: ModelShape, tokens: int, *, size: int, chunk_tokens: int, backward: bool, trained: bool) -> int:
    """Bytes at the output projection of rlhf.core.logprobs: chunks of logits, never those of whole rows.

    ``CHUNK_LOGITS`` float32 tensors ``(chunk, V)``; the states of the response tokens (all tokens, at most) and, in the
    backward pass of a trained head, its gradient ``(V, D)`` in float32.
    """
    chunk = min(chunk_tokens, tokens) * shape.vocabulary * FLOAT32 * CHUNK_LOGITS
    states = tokens * shape.hidden * size
    gradient = shape.vocabulary * shape.hidden * FLOAT32 if backward and trained else 0
    return chunk + states * (2 if backward else 1) + gradient


def cache_bytes(shape: ModelShape, rows: int, tokens: int, *, size: int) -> int:
    """Keys and values of ``rows`` rows with room for ``tokens`` tokens each: 2 layers x kv_width numbers a token.

    One layer's worth comes on top while the cache of the prompts is copied into its buffers.
    """
    layer = 2 * rows * tokens * shape.kv_width * size
    return (shape.layers + 1) * layer


def next_token_bytes(shape: ModelShape, rows: int) -> int:
    """Logits of one decoding step in float32, sorted and summed beside them: ``(rows, V)`` four times."""
    return 4 * rows * shape.vocabulary * FLOAT32
