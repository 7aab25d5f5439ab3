"""The reward stage from recipe to ``final/``."""

import json
import math
from dataclasses import asdict

from rich.console import Console

from reward.config import RewardConfig
from reward.evaluate import Evaluation, evaluation_table
from reward.losses import LOSSES
from reward.manifest import reward_manifest
from reward.model import build_reward_model
from reward.publish import Publication, publish
from reward.task import RewardTask
from rlhf.config import to_yaml
from rlhf.core.errors import ConfigError
from rlhf.core.files import write_json
from rlhf.data.batching import steps_per_epoch
from rlhf.data.portable import portable_tokenizer
from rlhf.data.preferences import LoadedPreferences, load_preferences
from rlhf.data.templates import chat_format
from rlhf.engine.build import DTYPES, build_engine, precision_of
from rlhf.engine.checkpoint import CheckpointStore
from rlhf.engine.ranks import Ranks
from rlhf.models.backbones import hide_loading_bars
from rlhf.models.tokenizer import load_tokenizer, required_embedding_rows
from rlhf.train.loop import LoopState, Run, fit, load_checkpoint


def run(config: RewardConfig, ranks: Ranks) -> Evaluation | None:
    """Train, evaluate and publish; every rank calls it.

    Returns:
        The held-out evaluation of what was published; ``None`` without held-out data.
    """
    hide_loading_bars()
    ranks.on_main(lambda: config.output.mkdir(parents=True, exist_ok=True))
    tokenizer = ranks.main_first(
        lambda: load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    )
    chat = ranks.together(lambda: chat_format(tokenizer, config.data.template))
    data = ranks.main_first(lambda: _load_data(config, tokenizer, ranks))
    total_steps = _total_steps(config, len(data.train))
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
    _describe(ranks, f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable parameters")
    engine = build_engine(
        model,
        ranks=ranks,
        config=config.engine,
        optimizer=config.optim,
        total_steps=total_steps,
        hidden_size=model.hf.config.hidden_size,
    )
    _describe(ranks, engine.description)
    task = RewardTask(engine, config, data.train, data.evals, total_steps)
    store = CheckpointStore(config.output / "checkpoints", ranks, config.train.keep_checkpoints)
    loop = Run(
        folder=config.output,
        store=store,
        identity=_identity(config, data, total_steps, ranks),
        max_skipped_steps=config.engine.max_skipped_steps,
        documents={"config.yaml": to_yaml(config), "deepspeed.json": json.dumps(engine.settings, indent=2)},
    )
    state = fit(engine, task, config.train, loop, total_steps)
    _take_best(config, engine, task, loop, state)
    if task.evaluation is None:  # other weights than those evaluated last, or nothing left to train
        task.evaluate()
    evaluation = task.evaluation
    _report(config, ranks, evaluation, state)
    publication = Publication(
        config=config,
        dtype=dtype,
        tokenizer=portable_tokenizer(chat),
        manifest=reward_manifest(config, data, chat, evaluation),
    )
    sample = data.evals if len(data.evals) else data.train
    differences = publish(engine, sample, publication, config.output / "final")
    worst = max(differences.values())
    reloaded = f"reloaded in a fresh process, largest score difference {worst:.1e}"
    _describe(ranks, f"published {config.output / 'final'}: {reloaded}")
    return evaluation


def _load_data(config: RewardConfig, tokenizer, ranks: Ranks) -> LoadedPreferences:
    data = load_preferences(config.data, tokenizer, run_folder=config.output if ranks.is_main else None)
    if ranks.is_main:
        for line in data.report.lines():
            print(line, flush=True)
    if not len(data.train):
        raise ConfigError("data.train: no usable pair is left; see quarantine.jsonl in the run folder")
    return data


def _total_steps(config: RewardConfig, pairs: int) -> int:
    train = config.train
    per_epoch = steps_per_epoch(pairs, train.global_batch_size)
    steps = math.ceil(train.epochs * per_epoch)
    return steps if train.max_steps is None else min(steps, train.max_steps)


def _identity(config: RewardConfig, data: LoadedPreferences, total_steps: int, ranks: Ranks) -> dict:
    """What must be the same for a checkpoint to be continued."""
    train = config.train
    return {
        "data": data.train.fingerprint,
        "model": asdict(config.model),
        "margin": asdict(config.margin),
        "loss": asdict(config.loss),
        "optim": asdict(config.optim),
        "train.global_batch_size": train.global_batch_size,
        "train.seed": train.seed,
        "total steps": total_steps,
        "ranks": ranks.world_size,
        "engine.deepspeed": config.engine.deepspeed if config.engine.kind == "deepspeed" else "local",
        "engine.precision": precision_of(config.engine),
    }


def _take_best(config: RewardConfig, engine, task: RewardTask, loop: Run, state: LoopState) -> None:
    best = state.best_step
    if config.train.publish == "best" and best is not None and best != state.step:
        load_checkpoint(engine, task, loop, loop.store.path(best))
        task.evaluation = None
        _describe(engine.ranks, f"publishing step {best}, the best by {config.train.best_metric}")


def _report(config: RewardConfig, ranks: Ranks, evaluation: Evaluation | None, state: LoopState) -> None:
    if not ranks.is_main:
        return
    if evaluation is None:
        print("no held-out data (data.eval is empty and data.eval_share = 0): nothing to evaluate", flush=True)
        return
    Console().print(evaluation_table(evaluation))
    write_json(config.output / "evaluation.json", {"step": state.step, **evaluation.to_dict()})


def _describe(ranks: Ranks, text: str) -> None:
    if ranks.is_main:
        print(text, flush=True)
