"""The preference stage from recipe to ``final/``."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from policy.building import policy_of_role
from policy.preference.config import PreferenceConfig
from policy.preference.held_out import held_out_rows
from policy.preference.reference import CacheJob, LiveReference, Reference, cache_folder, open_cache
from policy.preference.task import PreferenceTask
from policy.preference.telemetry import HeldOut, print_evaluation
from policy.publish import PublishablePolicy
from reward.audit.training import with_own_audit
from rlhf.data.batching import ItemSource
from rlhf.data.examples import load_examples
from rlhf.data.loading import default_cache_dir
from rlhf.data.preferences import LoadedPreferences, PreferenceDataset, load_preferences
from rlhf.data.templates import ChatFormat
from rlhf.engine.api import Engine
from rlhf.engine.build import precision_of
from rlhf.engine.frozen import Frozen
from rlhf.engine.ranks import Ranks
from rlhf.models.backbones import weights_digest
from rlhf.models.roles import ModelRole
from rlhf.train.batches import BatchMaker
from rlhf.train.chat import check_same_tokens
from rlhf.train.publishing import publish_run
from rlhf.train.rehearsal import rehearsed
from rlhf.train.roles import frozen_of
from rlhf.train.stage import (
    LoadedData,
    load_data,
    open_chat,
    report,
    run_identity,
    sample_of,
    start_engine,
    stop_requests,
    total_steps,
    train,
)


def run(config: PreferenceConfig, ranks: Ranks) -> HeldOut | None:
    """Train, evaluate and publish; every rank calls it.

    Returns:
        The held-out evaluation of the weights that were taken; ``None`` without held-out data.
    """
    chat = open_chat(config, config.rows.template_choice, ranks)
    data = load_data(lambda folder: _load(config, chat, folder), config, ranks, readers=config.models)
    if isinstance(data, LoadedPreferences):
        data = with_own_audit(data, config.labels, config.model, chat, ranks, cache=config.rows.cache_dir)
    if config.reads_margins:
        assert isinstance(data.train, PreferenceDataset)
        data.train.refuse_missing_margins(config.reads_margins)
    published = PublishablePolicy.of(
        config,
        chat,
        stage="preference",
        objective={"loss": asdict(config.loss)},
        training_data=data.train.fingerprint,
    )
    steps = total_steps(config.train, len(data.train))
    policy, *others = config.models
    with rehearsed(config, ranks, published):
        model = ranks.together(lambda: policy_of_role(policy, config, chat, ranks))
        engine = start_engine(model, policy, config, ranks, steps=steps, hidden_size=model.hf.config.hidden_size)
    references = _References(config, next(iter(others), None), engine, chat, data)
    task = PreferenceTask(engine, config, data.train, data.evals, references.open(), steps)
    step = train(config, engine, task, _identity(config, data, references, steps), steps)
    report(
        config,
        ranks,
        task.evaluation,
        step,
        print_evaluation,
        lambda: held_out_rows(data.evals, task.held_out, config.loss, chat.tokenizer),
    )
    publish_run(config, engine, sample_of(data), published)
    return task.evaluation


def _load(config: PreferenceConfig, chat: ChatFormat, folder: Path | None) -> LoadedData:
    if config.data is not None:
        return load_preferences(config.data, chat, labels=config.labels, run_folder=folder)
    assert config.unpaired is not None
    return load_examples(config.unpaired, chat, kind="unpaired", run_folder=folder)


class _References:
    """Gives the training and the held-out data their reference, whatever its kind."""

    def __init__(
        self, config: PreferenceConfig, role: ModelRole | None, engine: Engine, chat: ChatFormat, data: LoadedData
    ) -> None:
        self._config, self._role, self._engine, self._chat, self._data = config, role, engine, chat, data
        self._other: Frozen | None = None
        self.weights: str | None = None
        """A name for the reference's weights; ``None`` without a reference."""

    def open(self) -> tuple[Reference | None, Reference | None]:
        """Every rank must call it before a checkpoint is loaded: the policy is then still the one it starts from."""
        role, ranks = self._role, self._engine.ranks
        if role is None:
            return None, None
        self.weights = ranks.on_main(lambda: weights_digest(role.backbone))
        if role.stays:
            live = self._live(role)
            return live, live
        caches = self._cached(role, self._data.train, "train"), self._cached(role, self._data.evals, "eval")
        self._other = None  # its memory is free again
        return caches

    def _live(self, role: ModelRole) -> Reference:
        if role.inside:
            return LiveReference(self._engine, adapters_off=True)
        return LiveReference(self._frozen(role), moves=bool(self._config.reference.sync_every))

    def _frozen(self, role: ModelRole) -> Frozen:
        """A second model: another one, or the start of this one."""
        config, ranks = self._config, self._engine.ranks
        if self._other is None:
            owner = f"model.path = {config.model.path}"
            remote = config.model.trust_remote_code
            path = config.reference.path
            ranks.together(
                lambda: check_same_tokens("reference.path", path, self._chat, owner, trust_remote_code=remote)
            )
            module = ranks.together(lambda: policy_of_role(role, config, self._chat, ranks))
            width = module.hf.config.hidden_size
            self._other = frozen_of(role, module, config.engine, ranks, hidden_size=width)
        return self._other

    def _cached(self, role: ModelRole, data: ItemSource, part: str) -> Reference | None:
        if not len(data):
            return None
        config, ranks = self._config, self._engine.ranks
        settings = config.reference
        key = {
            "data": data.fingerprint,
            "tokenizer": self._chat.tokenizer_digest,
            "template": self._chat.digest,
            "max_tokens": config.rows.max_tokens,
            "over_length": config.rows.over_length,
            "reference weights": self.weights,
            "precision": precision_of(config.engine),
        }
        job = CacheJob(
            data=data,
            batches=BatchMaker(ranks, config.train),
            key=key,
            shard_items=settings.shard_pairs,
            verify_items=settings.verify_pairs,
            precision=precision_of(config.engine),
            stop=stop_requests(config, ranks),
        )
        if settings.cache is not None:
            folder = settings.cache / part
        else:
            folder = cache_folder((config.rows.cache_dir or default_cache_dir()) / "reference", key)
        ask: Callable[[], Frozen] = (lambda: self._engine) if role.inside else (lambda: self._frozen(role))
        return open_cache(folder, job, ask)


def _identity(config: PreferenceConfig, data: LoadedData, references: _References, steps: int) -> dict[str, Any]:
    return run_identity(config, data.train, steps) | {
        "loss": asdict(config.loss),
        "labels": asdict(config.labels),
        "margin": config.margins.to_dict() if config.makes_margins else None,
        "weights": config.weights.to_dict(),
        "reference": references.weights,
        "reference.kind": "live" if config.reference.kind == "live" else "cache",
    }
