"""``python -m policy.evaluation --config RECIPE.yaml``: an evaluation as a stage of a pipeline."""

from policy.evaluation.config import EvaluationConfig
from rlhf.core.importing import import_all_of
from rlhf.core.leaving import leave
from rlhf.train.single import single_main
from rlhf.train.status import report_metrics

DESCRIPTION = "Compare policies by a reward function on fresh samples for held-out prompts."


def run(config: EvaluationConfig) -> None:
    import_all_of("policy.evaluation.compare")
    from rich.console import Console

    from policy.evaluation.compare import evaluate_policies, read_prompts
    from policy.evaluation.results import evaluation_table
    from reward.function import load_reward
    from rlhf.data.options import TemplateChoice

    found = evaluate_policies(
        config.policies,
        config.reference,
        read_prompts(config.prompts),
        load_reward(config.reward),
        template=TemplateChoice(text=config.template, options=config.template_options, fold_system=config.fold_system),
        settings=config.sampling,
        output=config.output,
    )
    report_metrics({f"reward/{each.name}": each.reward.value for each in found})
    Console().print(evaluation_table(found))


def main(argv: list[str] | None = None) -> int:
    return single_main(EvaluationConfig, run, argv, program="policy.evaluation", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
