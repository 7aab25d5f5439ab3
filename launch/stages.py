"""The stages, as the commands around them know them."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.core.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """One stage: its name in recipes and on command lines, and the module that a launcher starts."""

    name: str
    module: str
    _config: tuple[str, str]
    trains: bool = True
    """Trains under a launcher, on all ranks; else a single process does its work."""
    published: str = "final"
    """What later stages use, below the run folder; empty for the folder itself."""

    def config_class(self) -> type:
        """The dataclass of its recipe. Imported on demand: it brings torch along."""
        module, name = self._config
        return getattr(importlib.import_module(module), name)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("sft", "policy.sft", ("policy.sft.config", "SftConfig")),
        Stage("reward", "reward", ("reward.config", "RewardConfig")),
        Stage("preference", "policy.preference", ("policy.preference.config", "PreferenceConfig")),
        Stage("ppo", "policy.ppo", ("policy.ppo.config", "PpoConfig")),
    )
}
"""Those that train."""

KINDS = {
    "import": Stage("import", "launch.importing", ("launch.importing", "ImportConfig"), trains=False, published=""),
    **STAGES,
    "evaluate": Stage(
        "evaluate", "policy.evaluation", ("policy.evaluation.config", "EvaluationConfig"), trains=False, published=""
    ),
}
"""All that a pipeline can run."""



def read_stage(
    recipes: Sequence[Path], overrides: Sequence[str], name: str | None, *, program: str
) -> tuple[Stage, Any]:
    """The stage and its validated config: that of ``name``, else the one stage that takes the recipe.

    Args:
        recipes: as for :func:`rlhf.config.load_config`.
        overrides: ``key=value``.
        name: of a stage, or ``None`` to find it out.
        program: start of messages.
    Raises:
        ConfigError: if the recipe is faulty, or no stage or several take it.
    """
    from rlhf.config import load_config

    fitting, faults = [], {}
    for stage in [STAGES[name]] if name is not None else STAGES.values():
        try:
            fitting.append((stage, load_config(stage.config_class(), recipes, overrides, program=program)))
        except ConfigError as error:
            faults[stage.name] = error
    if len(fitting) == 1:
        return fitting[0]
    if name is not None:
        raise faults[name]
    files = " + ".join(map(str, recipes)) or "no recipe"
    if fitting:
        names = ", ".join(stage.name for stage, _ in fitting)
        raise ConfigError(f"{program}: {files}: could be a recipe of {names}; say which with --stage")
    nearest = min(faults, key=lambda each: str(faults[each]).count("\n"))
    raise ConfigError(
        f"{program}: {files}: no recipe of any stage ({', '.join(faults)}; --stage names one). As one of {nearest}:\n"
        f"{faults[nearest]}"
    )


def model_of(config: Any) -> tuple[Any, str]:
    """The section of the model that a stage trains first, with its name."""
    name = "policy" if hasattr(config, "policy") else "model"
    return getattr(config, name), name
