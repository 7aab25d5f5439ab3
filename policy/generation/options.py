"""What a recipe says about sampling."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn."""

    max_new_tokens: Annotated[int, Gt(0)] = 128
    """A response that has not ended by then is cut there."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits: below 1 the likely tokens are drawn more often."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draw only from the likeliest tokens that together have this probability; 1 draws from all."""
    top_k: Annotated[int, Ge(0)] = 0
    """Draw only from so many likeliest tokens, before top_p is looked at; 0 draws from all, 1 is greedy."""
    stop: tuple[str, ...] = ()
    """A response ends with the first token after which its text contains one of these."""
    batch_rows: Annotated[int, Gt(0)] = 64
    """Responses decoded together. Lower it when memory runs out: results do not change."""
