"""A stage that takes no time: it throws coins for held-out items, and its skill says how often they fall right."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf.core.errors import ConfigError
from rlhf.core.files import write_text
from rlhf.train.held_out import write_held_out
from rlhf.train.single import single_main
from rlhf.train.status import report_metrics

ITEMS = 300


@dataclass(frozen=True, kw_only=True)
class CoinConfig:
    output: Path
    skill: float = 0.5
    seed: int = 0
    fails: bool = False
    items: int = ITEMS
    """Those that are judged."""
    per_line: int = 1
    """Items that a line of the data holds."""


def run(config: CoinConfig) -> None:
    if config.fails:
        raise ConfigError("coin: this cannot work")
    items, luck = random.Random(99), random.Random(config.seed)
    hard = [items.uniform(-0.2, 0.2) for _ in range(ITEMS)]
    right = [luck.random() < config.skill + each for each in hard]
    rows = [
        {"row": f"rows:{n // config.per_line}", "group": str(n // 2), "value": float(each), "second": -float(each)}
        for n, each in enumerate(right[: config.items])
    ]
    write_held_out(config.output, rows)
    accuracy = sum(right) / ITEMS
    steps = [{"step": step, "eval/accuracy": accuracy * step / 3, "accuracy": 0.5} for step in (1, 2, 3)]
    write_text(config.output / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in steps))
    (config.output / "final").mkdir()
    report_metrics({"eval/accuracy": accuracy})


if __name__ == "__main__":
    sys.exit(single_main(CoinConfig, run, None, program="coin", description="a coin"))
