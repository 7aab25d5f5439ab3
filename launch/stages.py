"""The one table of stages: all that the commands around them know of each."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.core.errors import ConfigError

FILE, FOLDER = "file", "folder"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage. What is written ``module:name`` is imported on demand: it may bring torch along."""

    name: str
    """Name of the stage in recipes and on command lines."""
    module: str
    """What a launcher starts."""
    config: str
    """The dataclass of its recipe, as ``module:name``."""
    trains: bool = True
    """Takes steps and saves them: it can be stopped and goes on from a checkpoint."""
    alone: bool = False
    """A single process does its work; else all ranks share it."""
    published: str = "final"
    """What later stages use, below the run folder; empty for the folder itself."""
    metric: str = ""
    """The metric that tells most about a result: of this name, or all below it (``NAME/...``). Higher is better, or
    lower with a leading minus."""
    item: str = ""
    """What a line of its held_out.jsonl has as ``value``, in words with a unit; higher or lower is better as by
    :attr:`metric`. Empty if it writes none."""
    reads: Mapping[str, str] = field(default_factory=dict)
    """What a stage that does not train reads: ``file`` or ``folder`` by setting (a mapping: each of its values)."""
    code: tuple[str, ...] = ("rlhf", "reward", "policy", "ds_configs")
    """Packages whose source decides on its result."""
    report: str = ""
    """``module:name`` of a function of the run folder: what a pipeline shows of it at its end."""
    page: str = ""
    """``module:name`` of what a report says of its runs: a function as in launch.report.kinds. Without one, all that it
    logged is drawn."""
    comparison: str = ""
    """``module:name`` of a :class:`rlhf.train.comparison.Comparison`, where its metrics alone do not say how runs
    compare."""

    @property
    def key_metric(self) -> str:
        """The name in :attr:`metric`."""
        return self.metric.removeprefix("-")

    def config_class(self) -> type[Any]:
        return load(self.config)

    def key_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those of ``metrics`` that tell most, by their names without the part that all share."""
        wanted = self.key_metric
        if wanted in metrics:
            return {wanted.rpartition("/")[2]: metrics[wanted]}
        below = f"{wanted}/"
        return {name.removeprefix(below): value for name, value in metrics.items() if name.startswith(below)}


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="import",
            module="launch.importing",
            config="launch.importing:ImportConfig",
            trains=False,
            alone=True,
            published="",
            reads={"source": FILE},
            code=("rlhf",),
        ),
        Stage(
            name="sft",
            module="policy.sft",
            config="policy.sft.config:SftConfig",
            metric="-eval/perplexity",
            item="loss, nats per token",
            page="launch.report.kinds:sft",
        ),
        Stage(
            name="reward",
            module="reward",
            config="reward.config:RewardConfig",
            metric="eval/accuracy",
            item="accuracy",
            code=("rlhf", "reward", "ds_configs"),
            page="launch.report.kinds:reward",
        ),
        Stage(
            name="score",
            module="reward.scoring",
            config="reward.scoring.config:ScoringConfig",
            trains=False,
            alone=True,
            published="",
            reads={"model": FOLDER, "data": FILE},
            code=("rlhf", "reward"),
        ),
        Stage(
            name="preference",
            module="policy.preference",
            config="policy.preference.config:PreferenceConfig",
            metric="eval/accuracy",
            item="accuracy",
            page="launch.report.kinds:preference",
            comparison="policy.preference.comparison:COMPARISON",
        ),
        Stage(
            name="ppo",
            module="policy.ppo",
            config="policy.ppo.config:PpoConfig",
            metric="eval/reward",
            item="reward",
            page="launch.report.kinds:ppo",
        ),
        Stage(
            name="evaluate",
            module="policy.evaluation",
            config="policy.evaluation.config:EvaluationConfig",
            trains=False,
            published="",
            metric="reward",
            reads={"prompts": FILE, "reference": FOLDER, "policies": FOLDER, "reward": FOLDER},
            report="policy.evaluation.results:report_of",
            page="launch.report.policies:evaluate",
        ),
        Stage(
            name="generate",
            module="policy.answers",
            config="policy.answers.config:GenerateConfig",
            trains=False,
            published="",
            reads={"prompts": FILE, "model": FOLDER},
        ),
        Stage(
            name="benchmark",
            module="policy.benchmark",
            config="policy.benchmark.config:BenchmarkConfig",
            trains=False,
            published="",
            metric="benchmark",
            reads={"model": FOLDER, "reference": FOLDER, "data": FILE},
            report="reward.benchmarks.results:report_of",
            page="launch.report.policies:benchmark",
        ),
        Stage(
            name="win-rate",
            module="policy.win_rate",
            config="policy.win_rate.config:WinRateConfig",
            trains=False,
            alone=True,
            published="",
            metric="win_rate",
            reads={"outputs": FILE, "reference": FILE, "reward": FOLDER},
            report="policy.win_rate.run:report_of",
            page="launch.report.judged:win_rate",
        ),
        Stage(
            name="grade",
            module="policy.grading",
            config="policy.grading.config:GradingConfig",
            trains=False,
            alone=True,
            published="",
            metric="grade",
            reads={"answers": FILE, "questions": FILE, "references": FILE},
            report="policy.grading.results:report_of",
            page="launch.report.judged:grading",
        ),
        Stage(
            name="best-of-n",
            module="policy.best_of_n",
            config="policy.best_of_n.config:BestOfNConfig",
            trains=False,
            alone=True,
            published="",
            metric="gold",
            reads={"responses": FILE, "proxy": FOLDER, "gold": FOLDER},
            report="policy.best_of_n.run:report_of",
            page="launch.report.judged:best_of_n",
        ),
        Stage(
            name="tax",
            module="policy.tax",
            config="policy.tax.config:TaxConfig",
            trains=False,
            alone=True,
            published="",
            metric="change",
            reads={"before": FOLDER, "after": FOLDER, "include": FOLDER},
            report="policy.tax.results:report_of",
            page="launch.report.policies:tax",
        ),
    )
}


def by_program(name: str) -> Stage | None:
    """The stage whose module ends in ``name``, as status.json and done.json call it; ``None`` if there is none."""
    return next((stage for stage in STAGES.values() if stage.module.rpartition(".")[2] == name), None)


def training() -> dict[str, Stage]:
    """The stages that train, by name."""
    return {name: stage for name, stage in STAGES.items() if stage.trains}


def load(reference: str) -> Any:
    """The object behind ``module:name``."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def read_stage(
    recipes: Sequence[Path], overrides: Sequence[str], name: str | None, *, program: str
) -> tuple[Stage, Any]:
    """The stage and its validated config: that of ``name``, else the one stage that takes the recipe.

    Args:
        recipes: as for :func:`rlhf.config.load_config`.
        overrides: ``key=value``.
        name: of a stage that trains, or ``None`` to find it out.
        program: start of messages.
    Raises:
        ConfigError: if the recipe is faulty, or no stage or several take it.
    """
    from rlhf.config import load_config

    fitting: list[tuple[Stage, Any]] = []
    faults: dict[str, ConfigError] = {}
    for stage in [STAGES[name]] if name is not None else training().values():
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
