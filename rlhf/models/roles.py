"""Which models a run is made of, as its recipe says.

The recipe of every stage lists them as ``models``, in the order in which the stage loads them. The stage builds from
that list; plans, checks and commands read it, and know no stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.models.options import BackboneConfig

Kind = Literal["language model", "reward model"]
REPLICATED = "replicated"
"""The placement of a model that every rank holds whole."""


@dataclass(frozen=True, kw_only=True)
class ModelRole:
    """One model of a run."""

    name: str
    """What it is to the run: policy, critic, reference, reward model."""
    section: str
    """The section of the recipe with its settings."""
    setting: str
    """The key of the recipe that it comes from; usually the path of its section."""
    backbone: BackboneConfig
    """Where it starts, and what of it is trained."""
    kind: Kind
    """Which head it has."""
    optimizer: Any = None
    """The recipe's section of its optimizer; None for a model that is only asked."""
    placement: str = REPLICATED
    """A DeepSpeed configuration; or replicated, for a model that is only asked."""
    placed_by: str = ""
    """The key of the recipe that decides on the placement; empty where nothing is to be placed."""
    inside: str = ""
    """The role in whose weights it lives, with adapters of its own or with none; empty if it has own weights."""
    stays: bool = True
    """Whether it is there during training; else it fills a cache before the first step, and goes."""
    published: bool = False
    """Whether it is what the run leaves behind for others."""
    hub: bool = True
    """Whether a name on the hub will do; else it is the folder that another run has published."""
    with_lm_head: bool = False
    """Whether a reward model keeps a frozen output projection beside its head, for log-probabilities."""

    @property
    def trained(self) -> bool:
        return self.optimizer is not None


def published_role(models: Sequence[ModelRole]) -> ModelRole | None:
    """The one that the run leaves behind."""
    return next((role for role in models if role.published), None)


def role_named(models: Sequence[ModelRole], name: str) -> ModelRole | None:
    return next((role for role in models if role.name == name), None)


def roles_of_section(models: Sequence[ModelRole], section: str) -> tuple[ModelRole, ...]:
    """All that one section of the recipe asks for: an ensemble is several."""
    return tuple(role for role in models if role.section == section)
