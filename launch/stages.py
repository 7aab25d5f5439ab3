"""The stages, as the commands around them know them."""

import importlib
from dataclasses import dataclass


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
