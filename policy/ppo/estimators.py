"""The advantage estimators by name, and what each takes. Known without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf.core.table import Parameter, Row

if TYPE_CHECKING:
    from torch import Tensor

    from policy.ppo.advantages import Advantages

NEEDS = {"values": "the values of a critic", "groups": "the groups of responses"}


@dataclass(frozen=True)
class Estimator(Row):
    """A row of :data:`ESTIMATORS`."""

    whitened: bool = field(default=False, kw_only=True)
    """Whether its advantages are whitened, unless the recipe says otherwise."""

    @property
    def needs_values(self) -> bool:
        """Whether it reads a critic."""
        return "values" in self.inputs

    @property
    def needs_groups(self) -> bool:
        """Whether it compares responses to one prompt."""
        return "groups" in self.inputs

    def __call__(
        self,
        rewards: "Tensor",
        values: "Tensor | None",
        mask: "Tensor",
        groups: "Tensor | None",
        **options: float,
    ) -> "Advantages":
        """Estimate; without gradient.

        Args:
            rewards: ``(B, T)`` of :func:`policy.ppo.advantages.token_rewards`, score and KL in them.
            values: ``(B, T)`` of the critic; ``None`` if there is none.
            mask: ``(B, T)`` bool, True on response tokens, right-padded.
            groups: ``(B,)`` int64, equal for responses to one prompt; ``None`` if nothing needs it.
            options: ``gamma`` and ``lam``, read by those that have such a parameter.
        Raises:
            ValueError: if the shapes differ, something needed is missing, or a number is out of range.
        """
        from rlhf.core.checks import check_same_shape

        check_same_shape(rewards=rewards, values=values, mask=mask)
        given: dict[str, Any] = {"rewards": rewards, "values": values, "mask": mask, "groups": groups}
        for name in self.inputs:
            if given[name] is None:
                raise ValueError(f"this estimator needs {NEEDS[name]}")
        read = {name: value for name, value in options.items() if name in self.parameters}
        return self.implementation(**{name: given[name] for name in self.inputs}, **read)


GAMMA = {"gamma": Parameter(float, 1.0)}
GROUPED = ("rewards", "mask", "groups")

ESTIMATORS: Mapping[str, Estimator] = {
    "gae": Estimator(
        "policy.ppo.advantages:gae_advantages",
        inputs=("rewards", "values", "mask"),
        parameters=GAMMA | {"lam": Parameter(float, 1.0)},
        whitened=True,
    ),
    "rloo": Estimator("policy.ppo.advantages:rloo_advantages", inputs=GROUPED),
    "grpo": Estimator("policy.ppo.advantages:grpo_advantages", inputs=GROUPED),
    "grpo_unscaled": Estimator("policy.ppo.advantages:centered_advantages", inputs=GROUPED),
    "reinforce_pp": Estimator(
        "policy.ppo.advantages:reward_to_go_advantages",
        inputs=("rewards", "mask"),
        parameters=GAMMA,
        whitened=True,
    ),
    "reinforce_pp_baseline": Estimator("policy.ppo.advantages:baseline_advantages", inputs=GROUPED, whitened=True),
}
"""REINFORCE++ is Hu et al., arXiv:2501.03262: rewards to go, whitened over all tokens of the step; with baseline, the
returns of whole responses less their group's mean."""
