"""Roles that several stages of a policy have."""

from dataclasses import replace

from policy.options import PolicyConfig
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.models.roles import REPLICATED, ModelRole


def policy_role(model: PolicyConfig, section: str, optimizer: OptimizerConfig, engine: EngineConfig) -> ModelRole:
    """The policy under training.

    Args:
        model, section: of the recipe, and its name.
        optimizer, engine: sections of the recipe.
    """
    return ModelRole(
        name="policy",
        section=section,
        setting=f"{section}.path",
        backbone=model,
        kind="language model",
        optimizer=optimizer,
        placement=engine.deepspeed,
        placed_by="engine.deepspeed",
        published=True,
    )


def reference_role(
    policy: ModelRole, path: str | None, placement: str, *, inside: bool = False, stays: bool = True
) -> ModelRole:
    """What the policy is compared with: itself as the run starts from it, or another model.

    Args:
        policy: its role.
        path: of another model, or ``None``.
        placement: of a second model.
        inside: whether the policy itself is asked, with its adapters off or before it has changed.
        stays: whether it is asked during training.
    """
    backbone = replace(policy.backbone, path=path or policy.backbone.path, lora=None, freeze_layers=0)
    return ModelRole(
        name="reference",
        section="reference",
        setting="reference.path" if path else policy.setting,
        backbone=backbone,
        kind="language model",
        placement=REPLICATED if inside else placement,
        placed_by="" if inside else "reference.placement",
        inside=policy.name if inside else "",
        stays=stays,
    )
