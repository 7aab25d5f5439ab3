"""What the stages share around the loop: tokenizer and data, the engine, and the weights to publish."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import nn

from rlhf.config import to_yaml
from rlhf.core.epochs import steps_per_epoch
from rlhf.core.errors import ConfigError
from rlhf.core.files import CONFIG, DATA, write_json
from rlhf.data.batching import ItemSource
from rlhf.data.options import TemplateChoice
from rlhf.data.report import DataReport
from rlhf.data.templates import ChatFormat
from rlhf.engine.api import Engine
from rlhf.engine.build import precision_of
from rlhf.engine.checkpoint import CheckpointStore, checkpoint_folder
from rlhf.engine.deepspeed_ops import optimizer_is_on_nvme
from rlhf.engine.ranks import Ranks
from rlhf.engine.stop import StopRequests
from rlhf.models.backbones import hide_loading_bars
from rlhf.models.positions import check_places
from rlhf.models.roles import ModelRole
from rlhf.train.chat import load_chat
from rlhf.train.fresh import start_fresh_process
from rlhf.train.held_out import write_held_out
from rlhf.train.loop import TOTAL_STEPS, LoopState, Run, Stateful, Task, Watched, fit, load_checkpoint
from rlhf.train.options import TrainConfig
from rlhf.train.recipe import StageConfig
from rlhf.train.roles import engine_of
from rlhf.train.status import report_metrics, report_phase, report_status

log = logging.getLogger(__name__)


class Dataset(Protocol):
    """Rows of any kind, in a fixed order."""

    @property
    def fingerprint(self) -> str:
        """A name for the contents: equal rows in equal order have equal names."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the rows, one number or several for each."""

    def __len__(self) -> int: ...


class LoadedRows(Protocol):
    """Rows to train on, with the story of how they came about."""

    @property
    def train(self) -> Dataset: ...

    @property
    def evals(self) -> Dataset: ...

    @property
    def report(self) -> DataReport: ...


class LoadedData(Protocol):
    """Training and held-out items, with the story of how they came about."""

    @property
    def train(self) -> ItemSource: ...

    @property
    def evals(self) -> ItemSource: ...

    @property
    def report(self) -> DataReport: ...


def sample_of(data: LoadedData) -> ItemSource:
    """Held-out rows where there are any, else training rows."""
    return data.evals if len(data.evals) else data.train


class EvaluationRecord(Protocol):
    """What a stage measured on held-out data."""

    def to_dict(self) -> dict[str, Any]: ...


DataT = TypeVar("DataT", bound=LoadedRows)


def open_chat(
    config: StageConfig, template: TemplateChoice, ranks: Ranks, stop_token_ids: Sequence[int] = ()
) -> ChatFormat:
    """Make the run folder, and open the tokenizer of the run's model with the template of its data."""
    hide_loading_bars()
    ranks.on_main(lambda: config.output.mkdir(parents=True, exist_ok=True))
    if ranks.is_main and config.train.publish != "none":
        start_fresh_process()

    model = config.model
    return ranks.main_first(
        lambda: load_chat(
            model.path,
            template,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            stop_token_ids=stop_token_ids,
        )
    )


def load_data(
    load: Callable[[Path | None], DataT],
    config: StageConfig,
    ranks: Ranks,
    *,
    readers: Sequence[ModelRole],
    new_tokens: int = 0,
) -> DataT:
    """Let every rank ``load(run_folder)``, the first of each node first, and print the report.

    Args:
        load: reads the rows.
        config: the recipe.
        ranks: every rank must call this.
        readers: the models that are shown the tokens of the rows.
        new_tokens: how many may be written behind each row.
    Raises:
        ConfigError: if nothing to train on is left, or a row is longer than a model can read.
        RunStopped: if the run was asked to stop in the meantime.
    """

    def action() -> DataT:
        data = load(config.output if ranks.is_main else None)
        if ranks.is_main:
            lines = data.report.lines()
            for line in lines:
                print(line, flush=True)
            write_json(config.output / DATA, _data_summary(data, lines))
        if not len(data.train):
            raise ConfigError("data.train: no usable row is left; see quarantine.jsonl in the run folder")
        longest = max(int(part.lengths.max()) for part in (data.train, data.evals) if len(part))
        check_places(readers, longest + new_tokens)
        return data

    report_phase("reading data")
    data = ranks.main_first(action)
    report_phase("loading models")
    stop_requests(config, ranks).check("before training")
    return data


def _data_summary(data: LoadedRows, lines: Iterable[str]) -> dict[str, Any]:
    """What a run reads: how many items, under which names for their contents, and what was said of them."""
    parts = {"train": data.train, "eval": data.evals}
    found = {name: {"items": len(part), "fingerprint": part.fingerprint} for name, part in parts.items()}
    return {**found, "report": [*lines]}


def total_steps(train: TrainConfig, items: int) -> int:
    """Optimizer steps of the run."""
    steps = math.ceil(train.epochs * steps_per_epoch(items, train.global_batch_size, train.last_batch))
    return steps if train.max_steps is None else min(steps, train.max_steps)


def run_identity(config: StageConfig, data: Dataset, steps: int) -> dict[str, Any]:
    """What every stage needs to be the same for a checkpoint to be continued; a stage adds its own."""
    return {
        "data": data.fingerprint,
        "model": asdict(config.model),
        "optim": asdict(config.optim),
        "train.global_batch_size": config.train.global_batch_size,
        "train.last_batch": config.train.last_batch,
        "train.seed": config.train.seed,
        TOTAL_STEPS: steps,
        "engine.deepspeed": config.engine.deepspeed if config.engine.kind == "deepspeed" else "local",
        "engine.precision": precision_of(config.engine),
    }


def start_engine(
    model: nn.Module, role: ModelRole, config: StageConfig, ranks: Ranks, *, steps: int, hidden_size: int
) -> Engine:
    """Wrap the ``model`` of ``role`` as the recipe says, and say what came out."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(ranks, f"{count:,} trainable parameters")
    engine = engine_of(role, model, config.engine, ranks, steps=steps, hidden_size=hidden_size)
    say(ranks, engine.description)
    if optimizer_is_on_nvme(engine.settings) and config.train.publish == "best":
        raise ConfigError(
            "train.publish = best: DeepSpeed does not read optimizer states back from NVMe, so the best checkpoint "
            "could not be taken in the end; set train.publish=last"
        )
    return engine


def train(config: StageConfig, engine: Engine, task: Task, identity: dict[str, Any], steps: int) -> int:
    """Run :func:`rlhf.train.loop.fit` and leave in ``engine`` the weights to publish, evaluated by ``task``.

    Returns:
        The step that they are of.
    """

    def loop(run: Run) -> LoopState:
        return fit(engine, task, config.train, run, steps)

    settings = {"deepspeed.json": json.dumps(engine.settings, indent=2)}
    return run_and_take(config, engine, task, identity, settings, loop)


def run_and_take(
    config: StageConfig,
    engine: Stateful,
    task: Watched,
    identity: dict[str, Any],
    documents: dict[str, str],
    loop: Callable[[Run], LoopState],
) -> int:
    """Let ``loop`` train, then take the weights that the recipe asks for; the step that they are of."""
    ranks = engine.ranks
    run = Run(
        folder=config.output,
        store=CheckpointStore(checkpoint_folder(config.output), ranks, config.train.keep_checkpoints),
        identity=identity,
        max_skipped_steps=config.engine.max_skipped_steps,
        extend=config.train.extend,
        documents={CONFIG: to_yaml(config), **documents},
    )
    state = loop(run)
    report_phase("finishing")
    best = state.best_step
    if config.train.publish == "best" and best is not None and best != state.step:
        load_checkpoint(engine, task, run, run.store.path(best))
        say(ranks, f"taking step {best}, the best by {config.train.best_metric}")
        if best == 0 and ranks.is_main:
            log.warning(
                "no step was as good as the start of the run by %s: what is taken is the model as it was before "
                "training (train.publish=last takes the last step)",
                config.train.best_metric,
            )
        report_metrics(task.evaluate())
        return best
    if task.evaluation is None:  # a finished run that was started again
        report_metrics(task.evaluate())
    return state.step


def stop_requests(config: StageConfig, ranks: Ranks) -> StopRequests:
    """What may ask this run to stop."""
    return StopRequests(config.output, ranks, config.train.max_minutes)


def report(
    config: StageConfig,
    ranks: Ranks,
    evaluation: EvaluationRecord | None,
    step: int,
    show: Callable[[Any], None],
    rows: Callable[[], Iterable[Mapping[str, Any]]],
) -> None:
    """Let the main rank ``show`` the held-out evaluation and write it to ``evaluation.json``, item by item too.

    Args:
        config: the recipe.
        ranks: every rank must call this.
        evaluation: of the weights that were taken; ``None`` without held-out data.
        step: that it is of.
        show: prints it.
        rows: what :mod:`rlhf.train.held_out` keeps; called by the main rank alone.
    """
    if evaluation is None:
        say(ranks, "no held-out data: nothing to evaluate")
        return
    record = {"step": step, **evaluation.to_dict()}
    ranks.on_main(lambda: write_json(config.output / "evaluation.json", record))
    ranks.on_main(lambda: write_held_out(config.output, rows()))
    if ranks.is_main:
        show(evaluation)
        report_status(evaluation=record)


def say(ranks: Ranks, text: str) -> None:
    """One line from the main rank."""
    if ranks.is_main:
        print(text, flush=True)
