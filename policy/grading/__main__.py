"""``python -m policy.grading --config RECIPE.yaml``: grades as a stage, in one process."""

from typing import TYPE_CHECKING

from policy.grading.config import GradingConfig
from rlhf.core.leaving import leave
from rlhf.train.single import on_all_ranks, single_main
from rlhf.train.status import report_metrics

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Have every answer graded by a judge, as MT-Bench does."


def run(config: GradingConfig) -> None:
    """Grade in the process that a launcher has started."""
    on_all_ranks("policy.grading.run", config, evaluate)


def evaluate(config: GradingConfig, ranks: "Ranks") -> None:
    """Grade, and print the table."""
    from rich.console import Console

    from policy.grading.results import grades_table
    from policy.grading.run import grade_answers

    console = Console()
    found = grade_answers(config, console)
    report_metrics({f"grade/{each.name}": each.score.value for each in found.models})
    console.print(grades_table(found))
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    return single_main(GradingConfig, run, argv, program="policy.grading", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
