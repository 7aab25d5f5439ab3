"""The models of a recipe, counted and placed: bytes of each on one rank."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.plan.cluster import Cluster
from launch.plan.models import EmptyModel, Sources, empty_model, without_training
from launch.plan.shapes import Attention
from launch.plan.states import States, ZeroSettings, frozen_states, trained_states, zero_settings
from rlhf.core.errors import ModelError
from rlhf.engine.options import Precision
from rlhf.models.roles import REPLICATED, ModelRole, published_role
from rlhf.train.workload import TrainingRecipe

SIZES: dict[Precision, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
SOME_FOLDER = "/nvme"
"""Where a plan takes NVMe to be, if the recipe does not say: nothing is written."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of a run."""

    recipe: ModelRole
    model: EmptyModel
    placement: str
    """Placement in words: ZeRO-2, whole on every rank, the policy's own weights."""
    zero: ZeroSettings | None
    """``None``: whole on every rank, or without weights of its own."""

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def trained(self) -> bool:
        return self.recipe.trained

    @property
    def stays(self) -> bool:
        """False for a reference that only fills a cache."""
        return self.recipe.stays

    @property
    def loaded(self) -> bool:
        """Whether its weights are loaded; false for what lives in another role's weights."""
        return not self.recipe.inside

    @property
    def shared_out(self) -> bool:
        """Whether no rank ever holds all of its weights."""
        return self.loaded and self.zero is not None and self.zero.stage == 3

    @property
    def attention(self) -> Attention:
        """auto takes SDPA or flash attention; both keep the same."""
        wanted = self.recipe.backbone.attention
        return "eager" if wanted == "eager" else "flash" if wanted == "flash_attention_2" else "sdpa"

    @property
    def checkpointing(self) -> bool:
        return self.trained and self.recipe.backbone.gradient_checkpointing

    def states(self, *, size: int, ranks: int, micro_batches: int, on_cpu: bool) -> States:
        """Bytes on one rank."""
        numbers = self.model.numbers(0 if self.zero is None else self.zero.persistent)
        if self.trained and self.zero is not None:
            return trained_states(
                self.zero, numbers, size=size, ranks=ranks, micro_batches=micro_batches, on_cpu=on_cpu
            )
        if not self.loaded:
            return States(device={})
        return frozen_states(self.zero, numbers, size=size, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The models of a run."""

    loading: tuple[Role, ...]
    """The roles in the order in which they are loaded."""
    main: Role
    """The one that is published."""
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[Role, ...]:
        """The main one first."""
        return tuple(sorted((role for role in self.loading if role.trained), key=lambda role: role is not self.main))

    @property
    def asked(self) -> tuple[Role, ...]:
        """Those that are only asked."""
        return tuple(role for role in self.loading if not role.trained)

    @property
    def all(self) -> tuple[Role, ...]:
        return (*self.trained, *self.asked)


def precision_of_plan(config: TrainingRecipe, cluster: Cluster) -> Precision:
    """What ``engine.precision = auto`` becomes on the cluster."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "float32" if cluster.on_cpu or config.engine.kind == "local" else "bfloat16"


def roles_of(config: TrainingRecipe, cluster: Cluster, sources: Sources) -> Roles:
    """The models that the stage of a recipe builds.

    Args:
        config: the recipe.
        cluster: how many ranks share.
        sources: for models that are not on disk.
    Raises:
        ModelError: if the shape of the model that is published is not known.
        ConfigError: if the recipe asks for what the stage refuses.
    """
    main = published_role(config.models)
    assert main is not None, "a stage that trains publishes one of its models"
    found: dict[str, Role] = {}
    notes: list[str] = []
    for role in sorted(config.models, key=lambda role: role is not main):  # others may live in it, or be like it
        found[role.name] = _placed(role, _counted(role, main, found, sources, notes), config, cluster)
    return Roles(loading=tuple(found[role.name] for role in config.models), main=found[main.name], notes=tuple(notes))


def _counted(
    role: ModelRole, main: ModelRole, others: Mapping[str, Role], sources: Sources, notes: list[str]
) -> EmptyModel:
    if role.inside:
        return _inside(role, others[role.inside].model)
    try:
        found = empty_model(role.backbone, role.kind, sources=sources, setting=role.setting)
    except ModelError:
        if role is main or Path(role.backbone.path).expanduser().exists():
            raise
        notes.append(f"{role.name}: {role.backbone.path} is not there yet; taken to be of the {main.name}'s shape")
        like = replace(role.backbone, path=main.backbone.path, layers=main.backbone.layers)
        found = empty_model(like, role.kind, sources=sources, setting=main.setting)
    if role.with_lm_head:
        projection = found.shape.vocabulary * found.shape.hidden
        found = replace(found, kind="language model", sizes=(*found.sizes, projection))
    return found if role.trained else without_training(found)


def _inside(role: ModelRole, host: EmptyModel) -> EmptyModel:
    """What is trained inside another model has adapters and a head, and the activations of the whole."""
    if not role.trained:
        return without_training(host)
    own = (*host.trained_sizes, host.shape.hidden)
    return replace(host, kind=role.kind, sizes=own, trained_sizes=own)


def _placed(role: ModelRole, model: EmptyModel, config: TrainingRecipe, cluster: Cluster) -> Role:
    if not role.trained and (role.inside or role.placement == REPLICATED):
        words = f"the {role.inside}'s own weights" if role.inside else "whole on every rank"
        return Role(recipe=role, model=model, placement=words, zero=None)
    zero = zero_settings(_deepspeed(role, config, cluster, model.shape.hidden))
    if not role.trained:
        words = f"sharded by ZeRO-3{_offloaded(zero)}"
    else:
        words = "plain torch" if zero.local else f"ZeRO-{zero.stage}{_offloaded(zero)}"
    if role.inside:
        words = f"adapters on the {role.inside}, {words}"
    return Role(recipe=role, model=model, placement=words, zero=zero)


def _deepspeed(role: ModelRole, config: TrainingRecipe, cluster: Cluster, hidden: int) -> dict[str, Any]:
    from rlhf.train.roles import deepspeed_settings

    engine = replace(
        config.engine,
        precision=precision_of_plan(config, cluster),
        nvme_path=config.engine.nvme_path or SOME_FOLDER,
    )
    sizes = {"world_size": cluster.ranks, "local_size": cluster.devices_per_node, "hidden_size": hidden}
    return deepspeed_settings(role, config.models, engine, **sizes)


def _offloaded(zero: ZeroSettings) -> str:
    words = {"host": "host memory", "nvme": "NVMe"}
    places = {"optimizer": zero.optimizer_place, "weights": zero.weights_place}
    moved = [f"{what} in {words[where]}" for what, where in places.items() if where != "device"]
    return f" ({', '.join(moved)})" if moved else ""
