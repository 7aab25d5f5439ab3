"""What an audit found, in one line."""

import numpy as np
from numpy.typing import NDArray

from reward.audit.mixture import Interval

MOST_SUSPECTS = 300


def verdict(interval: Interval, wrong: NDArray[np.float64]) -> str:
    """The audit in one line."""
    first = min(MOST_SUSPECTS, max(1, len(wrong) // 10))
    expected = float(np.sort(wrong)[::-1][:first].sum())
    doubt = "; the interval holds 0: there may be none" if interval.low == 0 < interval.share else ""
    return (
        f"about {interval.share:.0%} ({interval.low:.0%} to {interval.high:.0%}) of the labels look wrong; of the "
        f"{first} most suspect about {expected:.0f} are{doubt}"
    )
