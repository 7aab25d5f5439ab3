"""The reward stage from recipe to ``final/``."""

from dataclasses import asdict, replace

from rich.console import Console

from reward.audit.training import with_own_audit
from reward.config import RewardConfig
from reward.evaluate import Evaluation, evaluation_table
from reward.held_out import pair_rows
from reward.publish import PublishableRewardModel, new_model
from reward.tables import MARGINS
from reward.task import RewardTask
from rlhf.data.preferences import load_preferences
from rlhf.engine.build import DTYPES, precision_of
from rlhf.engine.ranks import Ranks
from rlhf.train.publishing import publish_run
from rlhf.train.rehearsal import rehearsed
from rlhf.train.stage import (
    load_data,
    open_chat,
    report,
    run_identity,
    sample_of,
    say,
    start_engine,
    total_steps,
    train,
)


def run(config: RewardConfig, ranks: Ranks) -> Evaluation | None:
    """Train, evaluate and publish; every rank calls it.

    Returns:
        The held-out evaluation of what was published; ``None`` without held-out data.
    """
    chat = open_chat(config, config.data.template_choice, ranks)
    data = load_data(
        lambda folder: load_preferences(config.data, chat, labels=config.labels, run_folder=folder),
        config,
        ranks,
        readers=config.models,
    )
    data = with_own_audit(data, config.labels, config.model, chat, ranks, cache=config.data.cache_dir)
    if "data_margins" in MARGINS[config.margin.kind].inputs:
        data.train.refuse_missing_margins()
    published = PublishableRewardModel(
        config=config, chat=chat, evaluation=None, margins={}, training_data=data.train.fingerprint
    )
    steps = total_steps(config.train, len(data.train))
    (role,) = config.models
    dtype = DTYPES[precision_of(config.engine)]
    with rehearsed(config, ranks, published):
        model = ranks.together(lambda: new_model(config, chat, dtype, checked=ranks.is_main))
        say(ranks, f"reward head: {model.head_origin}")
        engine = start_engine(model, role, config, ranks, steps=steps, hidden_size=model.hf.config.hidden_size)
    task = RewardTask(engine, config, data.train, data.evals, steps)
    identity = run_identity(config, data.train, steps)
    identity |= {
        "margin": config.margin.to_dict(),
        "loss": config.loss.to_dict(),
        "weights": config.weights.to_dict(),
        "labels": asdict(config.labels),
    }
    step = train(config, engine, task, identity, steps)
    report(
        config,
        ranks,
        task.evaluation,
        step,
        lambda found: Console().print(evaluation_table(found)),
        lambda: pair_rows(data.evals, task.held_out_rewards, chat.tokenizer),
    )
    measured = replace(published, evaluation=task.evaluation, margins=task.margin_statistics)
    publish_run(config, engine, sample_of(data), measured)
    return task.evaluation
