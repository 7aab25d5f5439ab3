"""``python -m policy.evaluation --config RECIPE.yaml``: an evaluation as a stage, on any number of ranks."""

from typing import TYPE_CHECKING

from policy.evaluation.config import EvaluationConfig
from rlhf.core.leaving import leave
from rlhf.train.single import on_all_ranks, single_main
from rlhf.train.status import report_metrics

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Compare policies by a reward function on fresh samples for held-out prompts."


def run(config: EvaluationConfig) -> None:
    """Evaluate on the ranks that a launcher has started."""
    on_all_ranks("policy.evaluation.compare", config, evaluate)


def evaluate(config: EvaluationConfig, ranks: "Ranks") -> None:
    """Every rank must call it; the main one prints."""
    from rich.console import Console

    from policy.evaluation.compare import evaluate_policies, read_prompts
    from policy.evaluation.results import evaluation_table
    from reward.function import load_reward
    from rlhf.data.options import TemplateChoice

    prompts, columns = read_prompts(config.prompts)
    found = evaluate_policies(
        config.policies,
        config.reference,
        prompts,
        ranks.together(lambda: load_reward(config.reward).reading(prompts, columns)),
        template=TemplateChoice(text=config.template, options=config.template_options, fold_system=config.fold_system),
        settings=config.sampling,
        output=config.output,
        precision=config.precision,
        ranks=ranks,
        columns=columns,
    )
    if ranks.is_main:
        report_metrics({f"reward/{each.name}": each.reward.value for each in found})
        Console().print(evaluation_table(found))


def main(argv: list[str] | None = None) -> int:
    return single_main(EvaluationConfig, run, argv, program="policy.evaluation", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
