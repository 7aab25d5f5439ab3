"""``python -m policy.win_rate --config RECIPE.yaml``: a win rate as a stage, in one process."""

from typing import TYPE_CHECKING

from policy.win_rate.config import WinRateConfig
from rlhf.core.leaving import leave
from rlhf.train.single import on_all_ranks, single_main
from rlhf.train.status import report_metrics

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Ask a judge which of two models' answers is better, question by question."


def run(config: WinRateConfig) -> None:
    """Compare in the process that a launcher has started."""
    on_all_ranks("policy.win_rate.run", config, evaluate)


def evaluate(config: WinRateConfig, ranks: "Ranks") -> None:
    """Compare, and print the table."""
    from rich.console import Console

    from policy.win_rate.run import compare, win_rate_table

    console = Console()
    found = compare(config, console)
    report_metrics({f"win_rate/{found.name}": found.rate.value})
    console.print(win_rate_table(found))
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    return single_main(WinRateConfig, run, argv, program="policy.win_rate", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
