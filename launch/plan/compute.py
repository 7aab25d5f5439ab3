"""Floating-point operations of a pass, and how long they take at a stated rate.

A forward pass over n tokens in rows of T_r takes, for P numbers in the matrices of L layers, a query width of A, hidden
states of width D and a vocabulary of V, if m tokens (those of responses) pass the output projection:

    2 P n  +  2 L A sum_r T_r^2 (causal: half of the square)  +  2 V D m

A backward pass takes once that for the gradients of activations, and once for those of the weights where they are
trained; checkpointing adds a forward pass of the layers, and rlhf.core.logprobs projects once more.

References:
    Kaplan et al. (2020), arXiv:2001.08361, section 2.1.
"""

from launch.plan.shapes import ModelShape


def layer_flops(shape: ModelShape, matrix_parameters: int, tokens: float, squares: float) -> float:
    """Operations of a forward pass through all layers."""
    return 2.0 * matrix_parameters * tokens + 2.0 * shape.layers * shape.query_width * squares


def head_flops(shape: ModelShape, tokens: float) -> float:
    """Operations of a forward pass through the output projection."""
    return 2.0 * shape.vocabulary * shape.hidden * tokens


def training_flops(
    shape: ModelShape,
    matrix_parameters: int,
    tokens: float,
    squares: float,
    head_tokens: float,
    *,
    active_share: float = 1.0,
    weights_trained: bool = True,
    head_trained: bool = True,
    checkpointing: bool = False,
) -> float:
    """Operations of a forward and a backward pass.

    Args:
        shape, matrix_parameters, tokens, squares: see above.
        head_tokens: that the output projection reads; 0 for a reward model.
        active_share: of the layers, that a backward pass goes through.
        weights_trained: false with LoRA: the matrices need no gradient (adapters are small).
        head_trained: as weights_trained, of the output projection; a frozen one is not projected again.
        checkpointing: the layers are computed once more.
    """
    layers = layer_flops(shape, matrix_parameters, tokens, squares)
    passes = 1.0 + active_share * (1.0 + weights_trained + checkpointing)
    return layers * passes + head_flops(shape, head_tokens) * (4.0 if head_trained else 2.0)


def decode_seconds(
    shape: ModelShape,
    parameters: int,
    *,
    rows: int,
    prompt_tokens: float,
    new_tokens: int,
    size: int,
    flops: float,
    bandwidth: float | None,
) -> float:
    """Seconds in which one rank writes ``new_tokens`` tokens of ``rows`` rows that are decoded together.

    A step reads all weights and the cache once, and multiplies: the slower of ``bytes / bandwidth`` and ``2 P rows /
    flops``. Launches of small kernels come on top, so this is a lower bound; rows that end early make it less.
    """
    mean_tokens = prompt_tokens + new_tokens / 2
    cache = 2.0 * shape.layers * shape.kv_width * size * rows * mean_tokens
    reading = 0.0 if bandwidth is None else (size * parameters + cache) / bandwidth
    return new_tokens * max(reading, 2.0 * parameters * rows / flops)
