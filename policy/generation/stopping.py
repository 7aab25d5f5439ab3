"""When a response has ended."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.core.errors import ConfigError

MARGIN_TOKENS = 8  # a decoder may drop the space before its first token, and some tokens have no text


def tail_of(stop: Sequence[str]) -> int:
    """Tokens at the end of a response that are enough to see one of these texts."""
    longest = max((len(text.encode()) for text in stop), default=0)
    return longest + MARGIN_TOKENS  # a token is a byte of text at least


class StopRule:
    """A response ends with an end token, or with the first token after which its text contains a stop string.

    Args:
        eos_token_ids: the end tokens.
        stop: the stop strings; special tokens count as their text.
        tokenizer: not needed without stop strings.
    Raises:
        ConfigError: for an empty stop string.
    """

    def __init__(self, eos_token_ids: Sequence[int], stop: Sequence[str], tokenizer: Any) -> None:
        if "" in stop:
            raise ConfigError("stop: every text contains an empty stop string; leave it out")
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self._eos, self._stop, self._tokenizer = np.asarray(eos_token_ids, np.int64), tuple(stop), tokenizer
        self._tail = tail_of(stop)

    def ends(self, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
        """Which of the responses have just ended; none of them had before its last token."""
        ended = np.isin([row[-1] for row in rows], self._eos)
        if self._stop:
            for place, row in enumerate(rows):
                ended[place] = ended[place] or self._has_stop(row[-self._tail :])
        return ended

    def _has_stop(self, tokens: NDArray[np.int64]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._stop)
