"""Methods by name: settings as their papers have them, below what a recipe says. Known without torch.

What makes a method is here: estimator, KL, loss, updates, samples to a prompt. How large a run is (prompts, tokens,
learning rates) is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A row of :data:`PRESETS`."""

    source: str
    settings: Settings
    """Values by dotted key."""
    updates: int
    """Optimizer steps of one pass over the rollouts of a step: what train.global_batch_size comes from."""

    def values(self, prompts: int, samples: int) -> dict[str, Any]:
        """All settings of the method, for so many prompts with so many responses each."""
        return {**self.settings, "train.global_batch_size": max(1, prompts * samples // self.updates)}


PLAIN_LOSS = {
    "loss.epochs": 1,
    "loss.objective": "clip",
    "loss.ratio": "token",
    "loss.clip_low": 0.2,
    "loss.clip_high": None,
    "loss.dual_clip": None,
    "loss.entropy": 0.0,
    "loss.stop_epoch_kl": None,
}
PLAIN_SAMPLING = {
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "rollout.extra_rounds": 0,
}
PLAIN_REWARD = {"reward.length_penalty": 0.0, "reward.missing_end_penalty": 0.0}
WITHOUT_KL = {"kl.place": "reward", "kl.estimator": None, "kl.coefficient": 0.0}
PLAIN = {**PLAIN_LOSS, **PLAIN_SAMPLING, **PLAIN_REWARD, "kl.controller": "fixed"}

PRESETS: Mapping[str, Preset] = {
    "grpo": Preset(
        source="Shao et al., arXiv:2402.03300, sec. 4.1 and 4.2, outcome supervision",
        settings={
            **PLAIN,
            "advantage.estimator": "grpo",
            "advantage.whiten": False,
            "rollout.samples": 64,  # sec. 4.2
            "kl.place": "loss",  # eq. 3
            "kl.estimator": "k3",  # eq. 4
            "kl.coefficient": 0.04,  # sec. 4.2
            "loss.normalize": "sequence",  # eq. 3
        },
        updates=1,  # sec. 4.2: a single update after each exploration
    ),
    "dr_grpo": Preset(
        source="Liu et al., arXiv:2503.20783; numbers: examples/qwen2.5-math-7b.sh of sail-sg/understand-r1-zero",
        settings={
            **PLAIN,
            "advantage.estimator": "grpo_unscaled",
            "advantage.whiten": False,
            "rollout.samples": 8,  # --num_samples
            **WITHOUT_KL,  # --beta
            "loss.normalize": "constant",
        },
        updates=8,  # 128 prompts with 8 responses each (--rollout_batch_size), 128 to an update (--train_batch_size)
    ),
    "dapo": Preset(
        source="Yu et al., arXiv:2503.14476, without soft punishment of length; rounds of sampling have a limit here",
        settings={
            **PLAIN,
            "advantage.estimator": "grpo",  # eq. 9
            "advantage.whiten": False,
            "rollout.samples": 16,  # sec. 4.1
            "rollout.extra_rounds": 3,  # sec. 3.2, eq. 11
            **WITHOUT_KL,  # sec. 2.3
            "loss.clip_low": 0.2,  # sec. 4.1
            "loss.clip_high": 0.28,  # sec. 4.1
            "loss.normalize": "token",  # eq. 12
        },
        updates=16,  # sec. 4.1: 512 prompts with 16 responses each, 512 to an update
    ),
    "cispo": Preset(
        source="MiniMax-M1, arXiv:2506.13585; upper bound of ScaleRL, arXiv:2510.13786; the samples are ours",
        settings={
            **PLAIN,
            "advantage.estimator": "grpo",  # eq. 2
            "advantage.whiten": False,
            "rollout.samples": 16,
            **WITHOUT_KL,
            "loss.objective": "cispo",  # eq. 4 and 5
            "loss.clip_low": 1.0,  # no lower bound
            "loss.clip_high": 4.0,  # weights up to 5
            "loss.normalize": "token",  # eq. 4
        },
        updates=16,
    ),
    "gspo": Preset(
        source="Zheng et al., arXiv:2507.18071v2, sec. 5.1, without KL; the samples to a prompt are ours",
        settings={
            **PLAIN,
            "advantage.estimator": "grpo",  # eq. 6
            "advantage.whiten": False,
            "rollout.samples": 8,
            **WITHOUT_KL,
            "loss.ratio": "sequence",  # eq. 7
            "loss.clip_low": 3e-4,  # sec. 5.1
            "loss.clip_high": 4e-4,  # sec. 5.1
            "loss.normalize": "sequence",  # eq. 5
        },
        updates=4,  # sec. 5.1: four minibatches of a batch of rollouts
    ),
    "rloo": Preset(
        source="Ahmadian et al., arXiv:2402.14740; a constant factor in the loss, which Adam does not see, is ours",
        settings={
            **PLAIN,
            "advantage.estimator": "rloo",
            "advantage.whiten": False,
            "rollout.samples": 4,  # the larger of the two k that they try
            "kl.place": "reward",
            "kl.estimator": "k1",  # the log-ratio of the whole response
            "kl.coefficient": 0.03,  # app. C, for TL;DR
            "loss.normalize": "constant",
        },
        updates=2,  # app. C: two gradient steps to a batch
    ),
    "reinforce_pp": Preset(
        source="Hu et al., arXiv:2501.03262, one response to a prompt; numbers: the commands of their OpenRLHF",
        settings={
            **PLAIN,
            "advantage.estimator": "reinforce_pp",
            "advantage.gamma": 1.0,
            "advantage.whiten": True,  # v9, eq. 10
            "rollout.samples": 1,
            "kl.place": "reward",  # v9, eq. 8
            "kl.estimator": "k1",  # v9, eq. 9
            "kl.coefficient": 0.01,  # --init_kl_coef; 0.001 in the paper's runs for reasoning
            "loss.normalize": "token",  # as their code; eq. 1 of v9 is the mean of each response
        },
        updates=8,  # 1,024 responses (--rollout_batch_size), 128 to an update (--train_batch_size)
    ),
}
"""GRPO's paper states no number for its clip, and takes one update, which meets none: 0.2 is PPO's. RLOO's paper has
neither ratio nor clip: in the second of its two updates, they are ours. GSPO's paper leaves KL out of its formulas for
brevity, and gives no number for it."""


def preset_values(values: Settings) -> dict[str, Any]:
    """The settings of the preset that a recipe names, by dotted key; none where it names none that is there.

    Args:
        values: of the recipe, as nested mappings, not validated yet.
    """
    name, rollout = values.get("preset"), values.get("rollout")
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        return {}
    prompts, samples = (rollout.get(key) if isinstance(rollout, Mapping) else None for key in ("prompts", "samples"))
    if not isinstance(prompts, int) or not isinstance(samples, int):  # it will be refused
        return dict(preset.settings)
    return preset.values(prompts, samples)


def differences(name: str, config: Any) -> Iterator[str]:
    """Where ``config`` is not the method of the preset, in words."""
    expected = PRESETS[name].values(config.rollout.prompts, config.rollout.samples)
    for key, value in expected.items():
        section, _, setting = key.partition(".")
        found = getattr(getattr(config, section), setting)
        if found != value:
            yield f"{key} = {'null' if found is None else found} ({name}: {'null' if value is None else value})"
