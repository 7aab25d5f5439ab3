"""``fit``: the one optimizer loop that the stages share; ``iterate``: the same around steps of another shape.

No algorithm in it.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.core.errors import CheckpointError, ConfigError, RunStopped, TrainingStopped
from rlhf.core.files import CONFIG, write_json, write_text
from rlhf.engine.api import Engine
from rlhf.engine.checkpoint import CheckpointStore
from rlhf.engine.ranks import Ranks
from rlhf.engine.stop import StopRequests
from rlhf.train.done import remove_completion
from rlhf.train.metrics import MetricLog, SkipLog
from rlhf.train.options import TrainConfig
from rlhf.train.progress import Progress
from rlhf.train.status import MINUTES, report_phase, take_over_metrics
from rlhf.train.throughput import flops_per_token, throughput

TOTAL_STEPS = "total steps"
"""The planned length of a run, in what makes two runs the same."""


class Watched(Protocol):
    """What the loop asks of any stage. Metrics must be equal on all ranks."""

    @property
    def evaluation(self) -> Any:
        """The latest held-out evaluation; ``None`` before the first, and without held-out data."""

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics, their names starting with ``eval/``; empty without held-out data."""

    def state_dict(self) -> dict[str, Any]:
        """What is not in the engine. Every rank calls it, the main rank's is saved."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    @property
    def portions(self) -> Mapping[str, "Portioned"]:
        """What is too large for one rank, by name: each has a part, and saves it."""


class Portioned(Protocol):
    """What is saved and loaded by all ranks; on another number of them, too."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Task(Watched, Protocol):
    """What a stage hands to :func:`fit`."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """This rank's micro-batches of the step; every rank has equally many."""

    def loss(self, batch: Any) -> Tensor:
        """This micro-batch's share of the global mean loss."""

    def step_metrics(self) -> dict[str, float]:
        """Metrics over all ranks and micro-batches of the step just finished."""

    def row_ids(self, batch: Any) -> Sequence[str]:
        """Which rows of the data are in ``batch``, for messages."""


class Stateful(Portioned, Protocol):
    """One engine, or several that are saved and loaded together."""

    @property
    def ranks(self) -> Ranks: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one step came to, the same on all ranks."""

    metrics: dict[str, float]
    applied: bool
    """Whether the weights were updated; false if something in the step was not finite."""
    scaler_overflow: bool = False
    """Whether it was skipped for a float16 overflow alone, which is no fault."""
    end: bool = False
    """End the run after this step, as if it were the last."""


@dataclass
class LoopState:
    """Where a run stands. Saved in every checkpoint."""

    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped_in_a_row: int = 0
    stopped_early: bool = False
    last_evaluation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """How long the training steps alone took, over all starts of the run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run folder's side of a training run: checkpoints, logs, and what makes two runs the same."""

    folder: Path
    store: CheckpointStore
    identity: dict[str, Any]
    """Settings that a resumed run must share with the checkpoint; compared key by key."""
    max_skipped_steps: int
    extend: bool = False
    """Whether a checkpoint that was planned for fewer steps may be continued."""
    documents: dict[str, str]
    """Texts by file name that describe the run; written once it is clear that the run may start."""


def fit(engine: Engine, task: Task, config: TrainConfig, run: Run, total_steps: int) -> LoopState:
    """Train from the newest intact checkpoint (or from the start) to ``total_steps``.

    Returns:
        The final state. The engine then holds the weights of the last step.
    Raises:
        TrainingStopped: after ``run.max_skipped_steps`` steps in a row that were not finite.
        CheckpointError: if the checkpoint found belongs to another run.
        RunStopped: if any rank was asked to stop; a checkpoint of the step just finished is then there.
    """
    skips = SkipLog(run.folder, engine.ranks)
    flops = flops_per_token(engine.module)

    def take(step: int, _: Progress) -> Outcome:
        return _train_step(engine, task, step, skips)

    return iterate(engine, task, config, run, total_steps, take, token_flops=flops)


def iterate(
    engine: Stateful,
    task: Watched,
    config: TrainConfig,
    run: Run,
    total_steps: int,
    take_step: Callable[[int, Progress], Outcome],
    *,
    token_flops: float | None = None,
) -> LoopState:
    """Around ``take_step(step, progress)``: resume, log, evaluate, save, stop; as :func:`fit`, for any kind of step.

    ``token_flops``: what training takes for a token, where a step is nothing else.
    """
    state = restore(engine, task, config, run)
    if state.step:
        take_over_metrics()
    if config.resume == "publish":
        return state
    finished = state.step >= total_steps or state.stopped_early
    engine.ranks.on_main(lambda: _begin(run, finished))
    requests = StopRequests(run.folder, engine.ranks, config.max_minutes)
    saved = state.step  # of the newest checkpoint; at 0 there is nothing to save
    begun = state.step > 0 or state.best_step is not None  # at step 0, the start has been evaluated
    recipe = run.documents.get(CONFIG, "")
    log = MetricLog(run.folder, engine.ranks, config, recipe=recipe, resume_step=state.step if begun else -1)
    progress = Progress(engine.ranks, total_steps, state.step)
    with log, progress:
        if not begun and config.evaluate_first:
            requests.check(f"at step 0 of {total_steps}")
            if _evaluate(task, config, state, log, progress):  # the start is a candidate like any other
                save(engine, task, run, state)
        while state.step < total_steps and not state.stopped_early:
            reason = requests.agreed()
            if reason is not None:
                if state.step != saved:
                    save(engine, task, run, state)
                raise RunStopped(reason, f"at step {state.step} of {total_steps}", state.step)
            report_phase("training")
            started = time.perf_counter()
            outcome = take_step(state.step, progress)
            state.step += 1
            state.stopped_early = outcome.end
            metrics = outcome.metrics | {"step_skipped": float(not outcome.applied)}
            seconds = time.perf_counter() - started
            state.seconds += seconds
            metrics |= throughput(metrics, seconds, engine.ranks, token_flops=token_flops)
            _count_skips(state, outcome, run.max_skipped_steps)
            last = state.step == total_steps or outcome.end
            if last or state.step % config.log_every == 0:
                log.write(state.step, metrics)
            progress.advance(state.step, metrics | {MINUTES: state.seconds / 60})
            due = config.evaluate_every and state.step % config.evaluate_every == 0
            try:
                improved = (due or last) and _evaluate(task, config, state, log, progress)
            except TrainingStopped:  # what was trained up to here is not lost by it
                if state.step != saved:
                    save(engine, task, run, state)
                raise
            due = config.checkpoint_every and state.step % config.checkpoint_every == 0
            if due or improved or last or state.stopped_early:
                save(engine, task, run, state)
                saved = state.step
    return state


def restore(engine: Stateful, task: Watched, config: TrainConfig, run: Run) -> LoopState:
    """Load the newest intact checkpoint as ``config.resume`` says; a fresh state where there is none."""
    found = run.store.steps()
    if found and config.resume == "never":
        raise ConfigError(
            f"{run.folder} already holds checkpoints (latest: step {found[-1]}) and train.resume = never; "
            "set train.resume=auto to go on from there, or choose another output folder"
        )
    path = run.store.newest_intact()
    if path is None:
        if config.resume in ("required", "publish") or found:
            raise CheckpointError(
                f"{run.store.folder}: no intact checkpoint to resume from"
                + (f" (damaged: steps {found}); remove the folder to start anew" if found else "")
            )
        return LoopState()
    load_checkpoint(engine, task, run, path)
    saved = engine.ranks.on_main(lambda: json.loads((path / "loop.json").read_text()))
    state = LoopState(**saved["state"])
    if engine.ranks.is_main:
        now, then = engine.ranks.world_size, saved["ranks"]
        others = "" if now == then else f", written on {then} rank(s)"
        print(f"resuming from {path} at step {state.step}{others}", flush=True)
    return state


def load_checkpoint(engine: Stateful, task: Watched, run: Run, path: Path) -> None:
    """Put engine, task and random state back to what they were when ``path`` was written."""
    saved = engine.ranks.on_main(lambda: json.loads((path / "loop.json").read_text()))["identity"]
    now = json.loads(json.dumps(run.identity))
    changed = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    longer = changed == [TOTAL_STEPS] and now.get(TOTAL_STEPS, 0) > saved.get(TOTAL_STEPS, 0)
    if longer and run.extend:
        if engine.ranks.is_main:
            print(
                f"train.extend: {path} was planned for {saved[TOTAL_STEPS]} steps, now {now[TOTAL_STEPS]}: the "
                f"learning rate goes on where the schedule of {now[TOTAL_STEPS]} steps is",
                flush=True,
            )
    elif changed:
        way_out = "restore these settings, or choose another output folder"
        way_out += "; train.extend=true trains on to the larger number of steps" if longer else ""
        lines = "".join(f"\n  {key}: {saved.get(key)} in the checkpoint, {now.get(key)} now" for key in changed)
        raise CheckpointError(f"{path} belongs to another run:{lines}\n{way_out}")
    engine.load(path)
    read = engine.ranks.together(lambda: torch.load(path / "task.pt", weights_only=True, map_location="cpu"))
    task.load_state_dict(read)
    for name, portions in task.portions.items():
        portions.load(path / name)
    engine.ranks.together(lambda: run.store.restore_random_state(path))


def save(engine: Stateful, task: Watched, run: Run, state: LoopState) -> None:
    """Write a full-state checkpoint of ``state.step``."""
    report_phase("saving a checkpoint")

    def write(folder: Path) -> None:
        engine.save(folder)
        for name, portions in task.portions.items():
            portions.save(folder / name)
        state_dict = task.state_dict()
        if engine.ranks.is_main:
            torch.save(state_dict, folder / "task.pt")
            ranks = engine.ranks.world_size
            write_json(folder / "loop.json", {"state": asdict(state), "identity": run.identity, "ranks": ranks})

    protected = frozenset() if state.best_step is None else frozenset({state.best_step})
    run.store.save(state.step, write, protected)


def _begin(run: Run, finished: bool) -> None:
    """It is clear now that the run may start: say what it is, and that it is not done."""
    if not finished:
        remove_completion(run.folder)
    for name, text in run.documents.items():
        write_text(run.folder / name, text)


def _train_step(engine: Engine, task: Task, step: int, skips: SkipLog) -> Outcome:
    batches = task.micro_batches(step)
    finite: list[Tensor] = []
    for place, batch in enumerate(batches):
        loss = task.loss(batch)
        engine.backward(loss, last=place == len(batches) - 1)
        finite.append(torch.isfinite(loss.detach()))
    info = engine.step()
    metrics = task.step_metrics()
    if not info.applied and not info.scaler_overflow:
        rows = [row for batch in batches for row in task.row_ids(batch)]
        whole = torch.stack(finite).tolist()
        bad_rows = [row for batch, fine in zip(batches, whole, strict=True) if not fine for row in task.row_ids(batch)]
        skips.record(step + 1, bad_rows, rows)
    metrics |= {"learning_rate": info.learning_rate, "grad_norm": info.grad_norm}
    return Outcome(metrics=metrics, applied=info.applied, scaler_overflow=info.scaler_overflow)


def _count_skips(state: LoopState, outcome: Outcome, limit: int) -> None:
    if outcome.applied:
        state.skipped_in_a_row = 0
    elif not outcome.scaler_overflow:
        state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= limit:
        raise TrainingStopped(
            f"{limit} steps in a row (up to step {state.step}) had a value that was not finite; "
            "skipped.jsonl in the run folder names their rows. Try a lower optim.learning_rate, "
            "or engine.precision=bfloat16 instead of float16; earlier checkpoints are intact"
        )


def _evaluate(task: Watched, config: TrainConfig, state: LoopState, log: MetricLog, progress: Progress) -> bool:
    """Evaluate, log, and note whether the best metric improved."""
    where = f"at step {state.step}" if state.step else "the start"
    report_phase("evaluating" if state.step else "evaluating the start")
    progress.note(f"evaluating {where}")
    metrics = task.evaluate()
    if not metrics:
        return False
    log.write(state.step, metrics)
    progress.evaluation(state.step, metrics)
    state.last_evaluation = metrics
    name = config.best_metric.removeprefix("-")
    if name not in metrics:
        raise ConfigError(f"train.best_metric = {name}: no such metric; there are {', '.join(sorted(metrics))}")
    value = -metrics[name] if config.best_metric.startswith("-") else metrics[name]
    gained = state.best_value is None or value > state.best_value
    state.evaluations_without_gain = 0 if gained else state.evaluations_without_gain + 1
    improved = gained or value == state.best_value  # of equals, the one that has trained longer
    if improved:
        state.best_value, state.best_step = value, state.step
    if config.patience is not None and state.evaluations_without_gain >= config.patience:
        state.stopped_early = True
        progress.note(f"no better {name} in {config.patience} evaluations: stopping at step {state.step}")
    return improved
