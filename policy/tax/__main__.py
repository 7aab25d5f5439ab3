"""``python -m policy.tax --config RECIPE.yaml``: a tax as a stage, in one process."""

from typing import TYPE_CHECKING

from policy.tax.config import TaxConfig
from rlhf.core.leaving import leave
from rlhf.train.single import on_all_ranks, single_main
from rlhf.train.status import report_metrics

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Do tasks of lm-eval with a model before training and after it, and say what changed."


def run(config: TaxConfig) -> None:
    """Evaluate in the process that a launcher has started."""
    on_all_ranks("policy.tax.run", config, evaluate)


def evaluate(config: TaxConfig, ranks: "Ranks") -> None:
    """Evaluate, and print the table."""
    from rich.console import Console

    from policy.tax.results import tax_table
    from policy.tax.run import evaluate_tax

    found = evaluate_tax(config, config.device or str(ranks.device))
    report_metrics({f"change/{each.task}/{each.measure}": each.after - each.before for each in found.tasks})
    Console().print(tax_table(found))


def main(argv: list[str] | None = None) -> int:
    return single_main(TaxConfig, run, argv, program="policy.tax", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
