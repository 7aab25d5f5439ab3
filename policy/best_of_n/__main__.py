"""``python -m policy.best_of_n --config RECIPE.yaml``: best-of-n as a stage, in one process."""

from typing import TYPE_CHECKING

from policy.best_of_n.config import BestOfNConfig
from rlhf.core.leaving import leave
from rlhf.train.single import on_all_ranks, single_main
from rlhf.train.status import report_metrics

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Choose among several samples of a policy by one reward, and judge the choice by another."


def run(config: BestOfNConfig) -> None:
    """Choose in the process that a launcher has started."""
    on_all_ranks("policy.best_of_n.run", config, evaluate)


def evaluate(config: BestOfNConfig, ranks: "Ranks") -> None:
    """Choose, judge, and print the table."""
    from rich.console import Console

    from policy.best_of_n.run import choice_table, evaluate_choices

    found = evaluate_choices(config)
    report_metrics({f"gold/best_of_{each.n}": each.gold.value for each in found})
    Console().print(choice_table(found))


def main(argv: list[str] | None = None) -> int:
    return single_main(BestOfNConfig, run, argv, program="policy.best_of_n", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
