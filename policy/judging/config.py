"""How a judge behind an OpenAI-compatible endpoint is asked. Known without torch."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

from rlhf.core.annotations import NoResult
from rlhf.core.servers import check_address


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A model behind an endpoint, and how much patience there is with it."""

    url: str | None = None
    """Base address, such as https://api.openai.com/v1."""
    model: str | None = None
    """The name that the endpoint has for the model."""
    key_variable: Annotated[str, NoResult()] = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key is written nowhere."""
    max_tokens: Annotated[int, Gt(0)] | None = 2048
    """Tokens of a reply at most, thoughts included. Null: not said; some endpoints want max_completion_tokens among
    judge.request instead."""
    request: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})
    """Further fields of every request, such as temperature or reasoning_effort."""
    tolerated: Annotated[float, Ge(0), Lt(1), NoResult()] = 0.05
    """Share of the items that may stay without a verdict, one at least unless this is 0: they are left out, and
    counted."""
    tries: Annotated[int, Gt(0), NoResult()] = 6
    """Times that a question is asked: again after 408, 409, 425, 429, 5xx and silence; after replies without a
    verdict, thrice at most."""
    wait_seconds: Annotated[float, Gt(0), NoResult()] = 1.0
    """Seconds before the second try; doubled each time, and longer where the endpoint says so (Retry-After)."""
    timeout_seconds: Annotated[float, Gt(0), NoResult()] = 120.0
    """Seconds to wait for a reply."""
    concurrency: Annotated[int, Gt(0), NoResult()] = 8
    """Questions at once."""
    prices: Annotated[tuple[float, float] | None, NoResult()] = None
    """Prices of a million tokens that it reads, and that it writes: the cost is shown before anything is asked."""

    def __post_init__(self) -> None:
        if self.url is not None and self.model is None:
            raise ValueError("url needs model: the name that the endpoint has for the model")
        if self.url is not None:
            check_address("url", self.url, example="https://api.openai.com/v1")
