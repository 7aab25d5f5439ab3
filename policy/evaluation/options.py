"""How the responses of an evaluation are drawn."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are drawn."""

    samples: Annotated[int, Gt(0)] = 4
    """Responses to each prompt."""
    max_new_tokens: Annotated[int, Gt(0)] = 128
    """A response that has not ended by then is cut there."""
    temperature: Annotated[float, Gt(0)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    batch_rows: Annotated[int, Gt(0)] = 64
    """Responses drawn together. Lower it when memory runs out: results do not change."""
    seed: int = 0
