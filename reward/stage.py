"""The reward stage from recipe to ``final/``."""

from dataclasses import asdict

from rich.console import Console

from reward.config import RewardConfig
from reward.evaluate import Evaluation, evaluation_table
from reward.losses import LOSSES
from reward.manifest import reward_manifest
from reward.model import build_reward_model
from reward.publish import Publication, publish
from reward.task import RewardTask
from rlhf.data.portable import portable_tokenizer
from rlhf.data.preferences import load_preferences
from rlhf.engine.build import DTYPES, precision_of
from rlhf.engine.ranks import Ranks
from rlhf.models.tokenizer import required_embedding_rows
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
    chat = open_chat(config, config.data.template, ranks)
    tokenizer = chat.tokenizer
    data = load_data(lambda folder: load_preferences(config.data, tokenizer, run_folder=folder), config, ranks)
    steps = total_steps(config.train, len(data.train))
    dtype = DTYPES[precision_of(config.engine)]
    model = ranks.together(
        lambda: build_reward_model(
            config.model,
            dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
            vocabulary=required_embedding_rows(tokenizer),
            seed=config.train.seed,
            with_lm_head="chosen_logprobs" in LOSSES[config.loss.kind].inputs,
        )
    )
    engine = start_engine(model, config, ranks, steps=steps, hidden_size=model.hf.config.hidden_size)
    task = RewardTask(engine, config, data.train, data.evals, steps)
    identity = run_identity(config, data.train, steps)
    step = train(
        config, engine, task, identity | {"margin": asdict(config.margin), "loss": asdict(config.loss)}, steps
    )
    evaluation = task.evaluation
    report(config, ranks, evaluation, step, lambda found: Console().print(evaluation_table(found)))
    if config.train.publish == "none":
        return evaluation
    publication = Publication(
        config=config,
        dtype=dtype,
        tokenizer=portable_tokenizer(chat),
        manifest=reward_manifest(config, data, chat, evaluation),
    )
    differences = publish(engine, sample_of(data), publication, config.output / "final")
    worst = max(differences.values())
    reloaded = f"reloaded in a fresh process, largest score difference {worst:.1e}"
    say(ranks, f"published {config.output / 'final'}: {reloaded}")
    return evaluation
