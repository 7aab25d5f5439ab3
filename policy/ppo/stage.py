"""The PPO stage from recipe to ``final/``."""

import contextlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from policy.building import build_policy, policy_of_role
from policy.generation.api import Sampler
from policy.generation.training import TrainingSampler
from policy.generation.vllm.process import check_vllm
from policy.generation.vllm.training import VllmTrainingSampler
from policy.model import PolicyModel, policy_of
from policy.ppo.config import PpoConfig
from policy.ppo.critic import ValueModel, build_critic, critic_start
from policy.ppo.presets import PRESETS, differences
from policy.ppo.reference import ReferenceModel
from policy.ppo.replay import Replay
from policy.ppo.reports import HeldOut, print_held_out
from policy.ppo.scoring import ScorerParts, build_scorer
from policy.ppo.shared_trunk import SharedTrunkCritic
from policy.ppo.task import Engines, PpoTask, Roles
from policy.publish import PublishablePolicy
from rlhf.config import to_dict
from rlhf.core.errors import ConfigError, ModelError
from rlhf.core.files import digest
from rlhf.data.examples import ExampleDataset, LoadedExamples, load_examples
from rlhf.data.options import TemplateChoice
from rlhf.data.prompts import PromptData, load_prompts
from rlhf.data.templates import ChatFormat, chat_format
from rlhf.engine.api import Engine
from rlhf.engine.build import DTYPES, precision_of
from rlhf.engine.ranks import Ranks
from rlhf.models.backbones import weights_digest
from rlhf.models.manifest import MANIFEST_NAME, read_manifest
from rlhf.models.roles import ModelRole, role_named, roles_of_section
from rlhf.models.tokenizer import required_embedding_rows
from rlhf.train.batches import BatchMaker
from rlhf.train.chat import check_same_tokens
from rlhf.train.loop import LoopState, Run, iterate
from rlhf.train.publishing import publish_run
from rlhf.train.rehearsal import rehearsed
from rlhf.train.roles import engine_of, frozen_of, is_shared_out, not_inside_shares
from rlhf.train.stage import load_data, open_chat, report, run_and_take, run_identity, say, start_engine, total_steps

PUBLISHED_ROWS = 12

log = logging.getLogger(__name__)


def run(config: PpoConfig, ranks: Ranks) -> HeldOut | None:
    """Train, evaluate and publish; every rank calls it.

    Returns:
        The held-out evaluation of the weights that were taken; ``None`` without held-out prompts.
    """
    for line in preset_lines(config):
        say(ranks, line)
    if config.rollout.backend == "vllm":
        ranks.on_main(lambda: check_vllm(config.rollout.vllm, "rollout"))
    chat = open_chat(config, config.data.template_choice, ranks, config.rollout.stop_token_ids)
    data = load_data(
        lambda folder: load_prompts(config.data, chat, run_folder=folder),
        config,
        ranks,
        readers=_readers(config),
        new_tokens=config.rollout.max_new_tokens,
    )
    if config.watch.action == "best" and not len(data.evals):
        raise ConfigError(
            "watch.action = best: there are no held-out prompts to find the best step by; give data.eval or "
            "data.eval_share, or set watch.action=stop"
        )
    objective = {name: asdict(getattr(config, name)) for name in ("reward", "advantage", "kl", "loss")}
    published = PublishablePolicy.of(
        config, chat, stage="ppo", objective=objective, training_data=data.train.fingerprint
    )
    steps = total_steps(replace(config.train, global_batch_size=config.rollout.prompts), len(data.train))
    builder = _Builder(config, ranks, chat, data, steps)
    with contextlib.closing(builder):
        with rehearsed(config, ranks, published):
            roles = builder.roles()
        identity = builder.identity()
        replay = Replay(config.output / "replay", ranks, digest(json.dumps(identity, sort_keys=True)))
        task = PpoTask(config, roles, data, chat, replay, steps, builder.pretraining())
        engines = roles.engines

        def loop(run: Run) -> LoopState:
            return iterate(engines, task, config.train, run, steps, task.step)

        documents = {
            f"deepspeed_{name}.json": json.dumps(engine.settings, indent=2) for name, engine in engines.by_name.items()
        }
        step = run_and_take(config, engines, task, identity, documents, loop)
        task.take_average()
        report(config, ranks, task.evaluation, step, print_held_out, lambda: task.held_out_rows)
        _warn_of_drift(config, ranks, task.evaluation)
        if config.train.publish != "none":
            _publish(config, engines, task, published)
        return task.evaluation


def preset_lines(config: PpoConfig) -> list[str]:
    """What the log says of the preset: where the recipe differs from the paper, or that it does not."""
    if config.preset is None:
        return []
    found = list(differences(config.preset, config))
    told = f"preset {config.preset} ({PRESETS[config.preset].source})"
    if not found:
        return [f"{told}: the paper's settings in all that makes the method"]
    return [f"{told}: this run differs from it in", *(f"  {line}" for line in found)]


def _warn_of_drift(config: PpoConfig, ranks: Ranks, taken: HeldOut | None) -> None:
    """Say so where the policy that is taken has left the texts that the reward model knows."""
    budget = config.watch.kl_budget
    if taken is not None and taken.kl > budget and ranks.is_main:
        log.warning(
            "the policy that is taken is %.3g nats per response from the reference, beyond watch.kl_budget = %g: its "
            "rewards are not to be relied on. %s",
            taken.kl,
            budget,
            "No evaluated step was within it: set train.evaluate_first=true, or lower train.evaluate_every"
            if config.train.publish == "best" and config.train.best_metric == "eval/selection"
            else "train.publish=best with train.best_metric=eval/selection takes one within it",
        )


def _readers(config: PpoConfig) -> list[ModelRole]:
    """All models but those that get texts in tokens of their own."""
    sources = {"reward": config.reward, "watch.second": config.watch.second}
    own_tokens = {name for name, source in sources.items() if source is not None and source.retokenize}
    return [role for role in config.models if role.section not in own_tokens]


def _publish(config: PpoConfig, engines: Engines, task: PpoTask, published: PublishablePolicy) -> None:
    engine, rollouts = engines.policy, task.sample(PUBLISHED_ROWS)
    if config.critic.share_trunk and engines.critic is not None:
        critic = engines.critic.module
        assert isinstance(critic, SharedTrunkCritic)
        critic.remove()
    publish_run(config, engine, rollouts, published)


def _reward_identity(section: dict[str, Any]) -> dict[str, Any]:
    """What decides on the scores: neither where models are, nor how long a judge that is asked may take or fail."""
    without = ("failures", "timeout_seconds", "concurrency", "patience_seconds", "url")
    terms = [{name: term[name] for name in term if name not in without} for term in section["terms"]]
    kept = {name: section[name] for name in section if name not in without}
    return kept | {"placement": None, "terms": terms}


class _Builder:
    """Builds the roles of a run. Every rank must call each method."""

    def __init__(self, config: PpoConfig, ranks: Ranks, chat: ChatFormat, data: PromptData, steps: int) -> None:
        self._config, self._ranks, self._chat, self._data, self._steps = config, ranks, chat, data, steps
        self._models = config.models
        self._dtype = DTYPES[precision_of(config.engine)]
        self._vocabulary = required_embedding_rows(chat.tokenizer)
        self._maker = BatchMaker(ranks, config.train)
        self._updates = steps * config.updates
        self._scorer_identity: dict[str, str | None] = {}
        self._to_close = contextlib.ExitStack()

    def close(self) -> None:
        """End the processes that were started for the roles."""
        self._to_close.close()

    def roles(self) -> Roles:
        """Those of the recipe's list, in its order."""
        config = self._config
        watched = config.watch.second
        self._ranks.together(lambda: check_template(config, self._chat))
        parts = self._scorer_parts()
        scorer = build_scorer(config.reward, roles_of_section(self._models, "reward"), parts)
        second = None
        if watched is not None:
            second = build_scorer(watched, roles_of_section(self._models, "watch.second"), parts, "watch.second")
        self._scorer_identity = {"reward": scorer.identity, "second": None if second is None else second.identity}
        policy = self._policy_engine()
        return Roles(
            engines=Engines(policy, self._critic_engine(policy)),
            sampler=self._sampler(policy),
            reference=self._reference(policy),
            scorer=scorer,
            second=second,
        )

    def _sampler(self, policy: Engine) -> Sampler:
        config, rollout = self._config, self._config.rollout
        if rollout.backend == "vllm":
            found = VllmTrainingSampler(policy, self._chat, rollout, config.output / "vllm")
            self._to_close.callback(found.close)
            return found
        origin = f"policy.path = {config.policy.path}"
        return TrainingSampler(policy, self._chat, rollout, self._policy_copy, rollout.gather, origin=origin)

    def pretraining(self) -> ExampleDataset | None:
        """Conversations of the language-modeling term."""
        section = self._config.pretraining
        if section is None:
            return None
        folder, chat = self._config.output / "pretraining", self._chat
        if section.data.template_choice != TemplateChoice():
            chat = chat_format(chat.tokenizer, section.data.template_choice)

        def load() -> LoadedExamples:
            return load_examples(
                section.data, chat, kind="conversation", run_folder=folder if self._ranks.is_main else None
            )

        return self._ranks.main_first(load).train

    def identity(self) -> dict[str, Any]:
        """All that must be the same for a checkpoint to be continued."""
        config, plain = self._config, to_dict(self._config)
        names = ("rollout", "advantage", "kl", "loss", "critic", "pretraining", "ema")
        sections = {name: plain[name] for name in names}
        for name in ("written", "gather", "batch_rows", "cuda_graphs", "vllm"):  # of no effect on the numbers
            sections["rollout"].pop(name)
        return {
            **run_identity(config, self._data.train, self._steps),
            **sections,
            "policy weights": self._ranks.on_main(lambda: weights_digest(config.policy)),
            "reward": _reward_identity(plain["reward"]),
            "reference.path": config.reference.path,
            "scorers": self._scorer_identity,
        }

    def _scorer_parts(self) -> ScorerParts:
        return ScorerParts(
            ranks=self._ranks,
            engine=self._config.engine,
            chat=self._chat,
            maker=self._maker,
            prompts=(self._data.train, self._data.evals),
        )

    def _policy_engine(self) -> Engine:
        role, model = self._role("policy"), self._ranks.together(self._new_policy)
        return start_engine(
            model, role, self._config, self._ranks, steps=self._updates, hidden_size=model.hf.config.hidden_size
        )

    def _critic_engine(self, policy: Engine) -> Engine | None:
        role = role_named(self._models, "critic")
        if role is None:
            return None
        model, origin = self._ranks.together(lambda: self._new_critic(role, policy))
        width = policy_of(policy).hf.config.hidden_size
        engine = engine_of(role, model, self._config.engine, self._ranks, steps=self._updates, hidden_size=width)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        say(self._ranks, f"critic from {origin}, {count:,} trainable parameters: {engine.description}")
        return engine

    def _new_critic(self, role: ModelRole, policy: Engine) -> tuple[SharedTrunkCritic | ValueModel, str]:
        """The critic's model, and what it starts from, in words."""
        config, backbone = self._config, role.backbone
        if role.inside:
            if any(hasattr(parameter, "ds_id") for parameter in policy.module.parameters()):
                raise not_inside_shares(role)
            freeze_layers, seed = backbone.freeze_layers, config.train.seed
            return SharedTrunkCritic(policy_of(policy), freeze_layers=freeze_layers, seed=seed), "the policy's own base"
        self._check_tokens("critic.path", config.critic.path)
        critic = build_critic(
            critic_start(backbone, standardized=config.reward.standardize),
            dtype=self._dtype,
            pad_token_id=self._chat.tokenizer.pad_token_id,
            vocabulary=self._vocabulary,
            seed=config.train.seed,
            checked=self._ranks.is_main,
            setting=role.setting,
            shared=is_shared_out(role, config.engine),
        )
        return critic, backbone.path

    def _reference(self, policy: Engine) -> ReferenceModel:
        role, path = self._role("reference"), self._config.reference.path
        if role.inside:
            return ReferenceModel(policy, adapters_off=True)
        self._ranks.together(lambda: self._check_tokens("reference.path", path))
        module = self._ranks.together(lambda: self._new_policy("reference"))
        width = module.hf.config.hidden_size
        return ReferenceModel(frozen_of(role, module, self._config.engine, self._ranks, hidden_size=width))

    def _check_tokens(self, setting: str, path: str | None) -> None:
        policy = self._config.policy
        owner = f"policy.path = {policy.path}"
        check_same_tokens(setting, path, self._chat, owner, trust_remote_code=policy.trust_remote_code)

    def _new_policy(self, name: str = "policy") -> PolicyModel:
        return policy_of_role(self._role(name), self._config, self._chat, self._ranks)

    def _policy_copy(self) -> PolicyModel:
        """Another policy, only to sample from: with the kernels of the trained one, which was checked."""
        backbone = replace(self._role("policy").backbone, gradient_checkpointing=False)
        return build_policy(
            backbone, dtype=self._dtype, vocabulary=self._vocabulary, seed=self._config.train.seed, checked=False
        )

    def _role(self, name: str) -> ModelRole:
        role = role_named(self._models, name)
        assert role is not None, f"a run of PPO has a {name}"
        return role


def check_template(config: PpoConfig, chat: ChatFormat) -> None:
    """Refuse to show a published policy another form of text than it was trained with.

    Raises:
        ModelError: naming the way out.
    """
    folder = Path(config.policy.path)
    if not (folder / MANIFEST_NAME).is_file():
        return
    trained = read_manifest(folder).template_digest
    if trained == chat.digest:
        return
    choice = config.data.template_choice
    if trained == chat_format(chat.tokenizer, replace(choice, system_prompt=None, drop_thoughts=False)).digest:
        log.warning("policy.path = %s was trained without data.system_prompt and data.thoughts of this run", folder)
        return
    if choice != TemplateChoice():
        raise ModelError(
            f"policy.path = {folder} was trained with another chat template ({trained}) than data.template = "
            f"{config.data.template} with its options ({chat.digest}); leave data.template unset for the policy's own"
        )
    raise ModelError(
        f"policy.path = {folder}: its chat template ({chat.digest}) is not the one that it was trained with "
        f"({trained}): it was changed since, or published by an earlier version; copy the folder anew, or give "
        "data.template the template of its training"
    )
