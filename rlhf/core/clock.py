"""Time: spans as people read them, and when this process began."""

import psutil


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def process_started() -> float:
    """When this process was started, in seconds since the epoch: imports and loading count, too."""
    return psutil.Process().create_time()
