"""What a policy is worth on held-out conversations: the loss per response token, with an interval.

Plain arrays in, a frozen record out: no ranks, no files.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from rlhf.core.errors import DataError
from rlhf.data.examples import ExampleDataset

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class SftEvaluation:
    """What :func:`evaluate_responses` measured."""

    loss: float
    """Mean loss in nats per response token, over all of them alike."""
    loss_low: float | None
    """Lower end of the 95 % interval; ``None`` with a single conversation."""
    loss_high: float | None
    """Upper end of the 95 % interval."""
    response_tokens: int
    conversations: int
    """Number of conversations with a response token to predict."""

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": self.perplexity}


def evaluate_responses(nll: ArrayLike, tokens: ArrayLike) -> SftEvaluation:
    r"""Mean loss per token of N conversations, drawn independently; their tokens are not.

        loss = sum_i nll_i / sum_i tokens_i
        interval = loss +- t_{N-1} sqrt(N / (N - 1) sum_i (nll_i - loss tokens_i)^2) / sum_i tokens_i

    Args:
        nll: ``(N,)`` negative log-likelihoods in nats, each summed over the response.
        tokens: ``(N,)`` response tokens that were predicted; a conversation without any is left out.
    Raises:
        DataError: if no conversation has one.
    References:
        Cochran (1977), Sampling Techniques, section 6.3: the variance of a ratio, linearized.
    """
    nll, tokens = np.asarray(nll, np.float64), np.asarray(tokens, np.float64)
    nll, tokens = nll[tokens > 0], tokens[tokens > 0]
    count = len(tokens)
    if count == 0:
        raise DataError("the held-out conversations have no response token to predict; change data.eval or max_tokens")
    total = tokens.sum()
    loss = nll.sum() / total
    low = high = None
    if count > 1:
        spread = np.sqrt(count / (count - 1) * ((nll - loss * tokens) ** 2).sum()) / total
        reach = student.ppf((1 + CONFIDENCE) / 2, count - 1) * spread
        low, high = float(loss - reach), float(loss + reach)
    return SftEvaluation(
        loss=float(loss), loss_low=low, loss_high=high, response_tokens=int(total), conversations=count
    )


def held_out_rows(data: ExampleDataset, nll: np.ndarray, tokens: np.ndarray) -> Iterator[dict[str, Any]]:
    """A row for ``held_out.jsonl`` of each conversation with a response: ``value`` is its loss in nats per token."""
    for place in np.flatnonzero(tokens > 0).tolist():
        yield {
            "row": data.row_id(place),
            "group": f"{int(data.prompt_keys[place]):016x}",
            "value": float(nll[place] / tokens[place]),
            "weight": float(tokens[place]),
        }


def print_evaluation(evaluation: SftEvaluation) -> None:
    """A table on the terminal."""
    title = f"{evaluation.response_tokens:,} response tokens in {evaluation.conversations:,} held-out conversations"
    table = Table(title=title, title_justify="left")
    for name in ("measure", "value", "95 % interval"):
        table.add_column(name)
    low, high = evaluation.loss_low, evaluation.loss_high
    spreads = "-", "-"
    if low is not None and high is not None:
        spreads = f"{low:.4f} to {high:.4f}", f"{np.exp(low):.3f} to {np.exp(high):.3f}"
    table.add_row("loss, nats per response token", f"{evaluation.loss:.4f}", spreads[0])
    table.add_row("perplexity", f"{evaluation.perplexity:.3f}", spreads[1])
    Console().print(table)
