"""``python -m policy.benchmark --config RECIPE.yaml``: a benchmark as a stage, on any number of ranks."""

from typing import TYPE_CHECKING

from policy.benchmark.config import BenchmarkConfig
from rlhf.core.leaving import leave
from rlhf.train.single import on_all_ranks, single_main
from rlhf.train.status import report_metrics

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Judge a reward model, or the reward that a policy implies, by labeled answers."


def run(config: BenchmarkConfig) -> None:
    """Evaluate on the ranks that a launcher has started."""
    on_all_ranks("policy.benchmark.run", config, evaluate)


def evaluate(config: BenchmarkConfig, ranks: "Ranks") -> None:
    """Every rank must call it; the main one prints."""
    from rich.console import Console

    from policy.benchmark.run import run_benchmark
    from reward.benchmarks.results import benchmark_table
    from reward.evaluate import evaluation_table

    found = run_benchmark(config, ranks)
    if ranks.is_main:
        report_metrics({f"benchmark/{each.name}": each.value for each in found.measures})
        console = Console()
        console.print(benchmark_table(found))
        console.print(evaluation_table(found.pairs, title="All pairs of a right and a wrong answer"))
        for note in found.notes:
            console.print(f"note: {note}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    return single_main(BenchmarkConfig, run, argv, program="policy.benchmark", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
