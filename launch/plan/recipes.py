"""From a recipe to the roles of its models: who is trained, who is only asked, and how each is placed."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from launch.plan.cluster import Cluster
from launch.plan.models import EmptyModel, Kind, Sources, empty_model, without_training
from launch.plan.shapes import Attention
from launch.plan.states import States, ZeroSettings, frozen_states, trained_states, zero_settings
from rlhf.core.errors import ConfigError, ModelError
from rlhf.models.options import BackboneConfig

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
SOME_FOLDER = "/nvme"
"""Where a plan takes NVMe to be, if the recipe does not say: nothing is written."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of a run."""

    name: str
    model: EmptyModel
    placement: str
    """In words: ZeRO-2, whole, adapters of the policy."""
    zero: ZeroSettings | None
    """``None``: whole on every rank, or without weights of its own."""
    is_trained: bool
    attention: Attention
    checkpointing: bool = False
    loaded: bool = True
    """Whether its weights are loaded; false for what lives in another role's weights."""
    asked: bool = True
    """Whether it stays for the run; false for a reference that only fills a cache."""

    def states(self, *, size: int, ranks: int, micro_batches: int, on_cpu: bool) -> States:
        """Bytes on one rank."""
        numbers = self.model.numbers(0 if self.zero is None else self.zero.persistent)
        if self.is_trained:
            return trained_states(
                self.zero, numbers, size=size, ranks=ranks, micro_batches=micro_batches, on_cpu=on_cpu
            )
        if not self.loaded:
            return States(device={})
        return frozen_states(self.zero, numbers, size=size, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The models of a run."""

    trained: tuple[Role, ...]
    """The policy or reward model first; then the critic."""
    asked: tuple[Role, ...]
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> Role:
        return self.trained[0]

    @property
    def all(self) -> tuple[Role, ...]:
        return (*self.trained, *self.asked)


def precision_of_plan(config: Any, cluster: Cluster) -> str:
    """What ``engine.precision = auto`` becomes on the cluster."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "float32" if cluster.on_cpu or config.engine.kind == "local" else "bfloat16"


def roles_of(stage: str, config: Any, cluster: Cluster, sources: Sources) -> Roles:
    """The models that the stage builds.

    Args:
        stage: sft, reward, preference or ppo.
        config: its recipe.
        cluster: how many ranks share.
        sources: for models that are not on disk.
    Raises:
        ModelError: if the shape of the trained model is not known.
        ConfigError: if the recipe asks for what the stage refuses.
    """
    build = _Builder(config, cluster, sources)
    if stage == "reward":
        return build.reward_stage()
    if stage == "preference":
        return build.preference_stage()
    if stage == "ppo":
        return build.ppo_stage()
    return Roles(trained=(build.trained("policy", config.model, "language model", "model.path"),), asked=())


class _Builder:
    def __init__(self, config: Any, cluster: Cluster, sources: Sources) -> None:
        self._config, self._cluster, self._sources = config, cluster, sources
        self._notes: list[str] = []

    # Stages

    def reward_stage(self) -> Roles:
        from reward.losses import LOSSES

        config = self._config
        role = self.trained("reward model", config.model, "reward model", "model.path")
        model = role.model
        if config.model.head == "mlp":
            width = config.model.head_hidden
            extra = (model.shape.hidden * width, width, width)
            model = replace(model, sizes=model.sizes + extra, trained_sizes=model.trained_sizes + extra)
        if "chosen_logprobs" in LOSSES[config.loss.kind].inputs:
            head = model.shape.vocabulary * model.shape.hidden
            model = replace(model, kind="language model", sizes=(*model.sizes, head))
        return Roles(trained=(replace(role, model=model),), asked=())

    def preference_stage(self) -> Roles:
        config = self._config
        policy = self.trained("policy", config.model, "language model", "model.path")
        reference = config.reference
        if not config.loss.needs_reference:
            return Roles(trained=(policy,), asked=())
        live = reference.kind == "live"
        if reference.path is None and (not live or config.model.lora is not None):
            return Roles(trained=(policy,), asked=() if not live else (self._in_policy(policy),))
        start = replace(config.model, path=reference.path or config.model.path, lora=None, freeze_layers=0)
        other = self.frozen("reference", start, "language model", "reference.path", reference.placement)
        return Roles(trained=(policy,), asked=(replace(other, asked=live),))

    def ppo_stage(self) -> Roles:
        config = self._config
        policy = self.trained("policy", config.policy, "language model", "policy.path")
        trained, asked = [policy], []
        if config.advantage.needs_values:
            trained.append(self._critic(policy))
        if config.reference.path is None and config.policy.lora is not None:
            asked.append(self._in_policy(policy))
        else:
            path = config.reference.path or config.policy.path
            start = replace(config.policy, path=path, lora=None, freeze_layers=0)
            asked.append(
                self.frozen("reference", start, "language model", "reference.path", config.reference.placement)
            )
        sections = [("reward model", config.reward, "reward.path")]
        if config.watch.second is not None:
            sections.append(("second scorer", config.watch.second, "watch.second.path"))
        for name, section, setting in sections:
            for number, path in enumerate(section.paths):
                called = name if len(section.paths) == 1 else f"{name} {number + 1}"
                asked.append(self._scorer(called, path, setting, section.placement, policy))
        return Roles(trained=tuple(trained), asked=tuple(asked), notes=tuple(self._notes))

    # Roles

    def trained(self, name: str, model: BackboneConfig, kind: Kind, setting: str, deepspeed: str | None = None) -> Role:
        found = empty_model(model, kind, sources=self._sources, setting=setting)
        zero = self._zero(deepspeed or self._config.engine.deepspeed, found.shape.hidden, "train")
        words = "plain torch" if zero.local else f"ZeRO-{zero.stage}{_offloaded(zero)}"
        return Role(
            name=name,
            model=found,
            placement=words,
            zero=zero,
            is_trained=True,
            attention=_attention(model.attention),
            checkpointing=model.gradient_checkpointing,
        )

    def frozen(self, name: str, model: BackboneConfig, kind: Kind, setting: str, placement: str) -> Role:
        found = without_training(empty_model(model, kind, sources=self._sources, setting=setting))
        return self._placed(name, found, placement, _attention(model.attention))

    def _placed(self, name: str, model: EmptyModel, placement: str, attention: Attention) -> Role:
        zero = None
        if placement != "replicated":
            zero = self._zero(placement, model.shape.hidden, "frozen")
        words = "whole on every rank" if zero is None else f"sharded by ZeRO-3{_offloaded(zero)}"
        return Role(name=name, model=model, placement=words, zero=zero, is_trained=False, attention=attention)

    def _in_policy(self, policy: Role) -> Role:
        model = without_training(policy.model)
        words = "the policy with its adapters off"
        return replace(policy, name="reference", model=model, placement=words, is_trained=False, loaded=False)

    def _critic(self, policy: Role) -> Role:
        config, section = self._config, self._config.critic
        if section.share_trunk:
            if policy.zero.stage == 3:
                raise ConfigError("critic.share_trunk does not go with ZeRO-3; take engine.deepspeed=zero2")
            return self._shared_critic(policy)
        readable = config.reward.paths and not config.reward.retokenize
        path = section.path or (config.reward.paths[0] if readable else None) or config.policy.path
        options = BackboneConfig(
            path=path,
            freeze_layers=section.freeze_layers,
            lora=section.lora,
            gradient_checkpointing=section.gradient_checkpointing,
        )
        setting = "critic.path" if section.path else "reward.path"
        try:
            return self.trained("critic", options, "reward model", setting, section.deepspeed)
        except ModelError:
            self._assume("critic", path)
            start = replace(options, path=config.policy.path, layers=config.policy.layers)
            return self.trained("critic", start, "reward model", "policy.path", section.deepspeed)

    def _shared_critic(self, policy: Role) -> Role:
        """Its adapters and head are all that is its own; activations are those of the shared base."""
        own = (*policy.model.trained_sizes, policy.model.shape.hidden)
        model = replace(policy.model, kind="reward model", sizes=own, trained_sizes=own)
        words = f"adapter on the policy, {policy.placement}"
        return replace(policy, name="critic", model=model, placement=words, loaded=False)

    def _scorer(self, name: str, path: str, setting: str, placement: str, policy: Role) -> Role:
        with contextlib.suppress(ModelError):
            return self.frozen(name, BackboneConfig(path=path), "reward model", setting, placement)
        self._assume(name, path)
        start = replace(self._config.policy, lora=None, freeze_layers=0)
        return self.frozen(name, start, "reward model", "policy.path", placement)

    def _assume(self, name: str, path: str) -> None:
        self._notes.append(f"{name}: {path} is not there yet; taken to be of the policy's shape")

    def _zero(self, source: str, hidden: int, role: str) -> ZeroSettings:
        if self._config.engine.kind == "local":
            return zero_settings({})
        from rlhf.engine.build import frozen_values, run_values
        from rlhf.engine.deepspeed_config import resolve

        config, cluster = self._config, self._cluster
        precision = precision_of_plan(config, cluster)
        engine = replace(config.engine, precision=precision, nvme_path=config.engine.nvme_path or SOME_FOLDER)
        sizes = {"world_size": cluster.ranks, "local_size": cluster.devices_per_node, "hidden_size": hidden}
        values = run_values(engine, config.optim, **sizes) if role == "train" else frozen_values(engine, **sizes)
        return zero_settings(resolve(source, values, role=role))


def _offloaded(zero: ZeroSettings) -> str:
    words = {"host": "host memory", "nvme": "NVMe"}
    places = {"optimizer": zero.optimizer_place, "weights": zero.weights_place}
    moved = [f"{what} in {words[where]}" for what, where in places.items() if where != "device"]
    return f" ({', '.join(moved)})" if moved else ""


def _attention(wanted: str) -> Attention:
    """auto takes SDPA or flash attention; both keep the same."""
    return {"eager": "eager", "flash_attention_2": "flash"}.get(wanted, "sdpa")
