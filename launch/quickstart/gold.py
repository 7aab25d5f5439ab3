"""The quickstart's gold reward: a function that everyone can recompute, so true improvement is measurable."""

import functools
from collections.abc import Sequence
from typing import Any

from rlhf.core.errors import DataError


def gold_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Sentiment of each response: VADER's compound score, in [-1, 1]; 0 for a text without feeling words.

    Only the response counts. ``prompts`` gives the signature that any reward of (prompt, response) has, and
    must be as long as ``responses``.

    Raises:
        DataError: if the ``vaderSentiment`` package is not installed.
        ValueError: if the two sequences differ in length.
    References:
        Hutto and Gilbert (2014), VADER: a parsimonious rule-based model for sentiment analysis.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    analyzer = _analyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


@functools.cache
def _analyzer() -> Any:
    """VADER's analyzer; imported here because only the quickstart needs the package."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise DataError(
            "the gold reward needs the package vaderSentiment, which is not installed: "
            "pip install 'margin-rlhf[demo]' (or pip install vaderSentiment)"
        ) from error
    return SentimentIntensityAnalyzer()
