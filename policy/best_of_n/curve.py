"""Best of n: what a gold scorer says of the sample that a reward model would choose among n, as n grows.

The curve is the one of Gao et al. (2022), arXiv:2210.10760: gold reward against the KL of best-of-n sampling.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.core.intervals import Estimate, mean_with_interval


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> NDArray[np.float64]:
    r"""Expected gold reward of the best of n samples by the proxy, over all choices of n of the N samples of a prompt.

        sum_i C(i - 1, n - 1) / C(N, n) gold_(i),   samples sorted by proxy, the worst first

    Args:
        proxy: ``(P, N)`` rewards that choose. Equal ones share their places.
        gold: ``(P, N)`` rewards of the same samples.
        n: samples to choose from, 1 to N.
    Returns:
        ``(P,)`` expectations; for n = 1 the mean of the gold rewards, for n = N the gold reward of the best.
    Raises:
        ValueError: if the shapes differ or n is out of range.
    References:
        Nakano et al. (2021), arXiv:2112.09332, appendix I.
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if proxy.shape != gold.shape or proxy.ndim != 2:
        raise ValueError(f"proxy {proxy.shape} and gold {gold.shape} must have one shape, prompts x samples")
    count = proxy.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n = {n}: there are {count} samples to a prompt")
    chances = np.array([math.comb(place, n - 1) for place in range(count)], object) / math.comb(count, n)
    order = np.argsort(proxy, axis=1, kind="stable")
    ranked, values = np.take_along_axis(proxy, order, 1), np.take_along_axis(gold, order, 1)
    return (_shared(values, ranked) * chances.astype(np.float64)).sum(axis=1)


def _shared(values: NDArray[np.float64], ranked: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(P, N)`` values, of which those whose rank is equal are replaced by their mean."""
    found = values.copy()
    for row, keys in zip(found, ranked, strict=True):
        _, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
        if len(counts) < len(keys):
            row[:] = (np.bincount(places, weights=row) / counts)[places]
    return found


def kl_of_best_of_n(n: int) -> float:
    """KL of best-of-n sampling from the policy, in nats: ``log n - (n - 1) / n``; an upper bound where samples repeat.

    References:
        Stiennon et al. (2020), arXiv:2009.01325, appendix G.3; the bound: Beirami et al. (2024), arXiv:2401.01879.
    """
    if n < 1:
        raise ValueError(f"n = {n}: expected at least 1")
    return math.log(n) - (n - 1) / n


def curve(proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int]) -> list[tuple[int, float, Estimate, Estimate]]:
    """Rows of n, its KL, and the means of the chosen samples' proxy and gold rewards, with 95 % intervals.

    Args:
        proxy, gold: ``(P, N)``; see :func:`best_of_n`.
        ns: from 1 to N.
    """
    return [
        (
            n,
            kl_of_best_of_n(n),
            mean_with_interval(best_of_n(proxy, proxy, n)),
            mean_with_interval(best_of_n(proxy, gold, n)),
        )
        for n in ns
    ]
