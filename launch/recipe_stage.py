"""Which stage a recipe is for, where the command line leaves that open."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.stages import STAGES, Stage
from rlhf.core.errors import ConfigError


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
