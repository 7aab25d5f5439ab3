"""Supervised fine-tuning from recipe to ``final/``."""

from policy.building import policy_of_role
from policy.publish import PublishablePolicy
from policy.sft.config import SftConfig
from policy.sft.evaluation import SftEvaluation, held_out_rows, print_evaluation
from policy.sft.task import SftTask
from rlhf.data.examples import load_examples
from rlhf.engine.ranks import Ranks
from rlhf.train.publishing import publish_run
from rlhf.train.rehearsal import rehearsed
from rlhf.train.stage import load_data, open_chat, report, run_identity, sample_of, start_engine, total_steps, train


def run(config: SftConfig, ranks: Ranks) -> SftEvaluation | None:
    """Train, evaluate and publish; every rank calls it.

    Returns:
        The held-out evaluation of the weights that were taken; ``None`` without held-out data.
    """
    chat = open_chat(config, config.data.template_choice, ranks)
    data = load_data(
        lambda folder: load_examples(config.data, chat, kind="conversation", run_folder=folder),
        config,
        ranks,
        readers=config.models,
    )
    published = PublishablePolicy.of(
        config, chat, stage="sft", objective={"kind": "negative log-likelihood"}, training_data=data.train.fingerprint
    )
    steps = total_steps(config.train, len(data.train))
    (role,) = config.models
    with rehearsed(config, ranks, published):
        model = ranks.together(lambda: policy_of_role(role, config, chat, ranks))
        engine = start_engine(model, role, config, ranks, steps=steps, hidden_size=model.hf.config.hidden_size)
    task = SftTask(engine, config, data.train, data.evals)
    step = train(config, engine, task, run_identity(config, data.train, steps), steps)
    report(
        config, ranks, task.evaluation, step, print_evaluation, lambda: held_out_rows(data.evals, *task.held_out_sums)
    )
    publish_run(config, engine, sample_of(data), published)
    return task.evaluation
