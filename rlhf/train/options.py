"""What a recipe says about the optimizer loop, for every stage that uses it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import BeforeValidator

from rlhf.core.annotations import Formerly, NoResult
from rlhf.core.epochs import LastBatch


def _as_written(value: Any) -> Any:
    """YAML 1.1 reads ``off`` as false."""
    return "off" if value is False else value


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run, batches, evaluation, checkpoints and logs."""

    global_batch_size: Annotated[int, Gt(0)] = 64
    """Pairs (conversations in SFT, rollouts in PPO) per optimizer step, over all ranks; of the last batch of an epoch,
    see last_batch."""
    last_batch: LastBatch = "keep"
    """What is left at the end of an epoch, be it one row, which would take a whole optimizer step. keep: a batch like
    any other. merge: joined to the batch before, if it is less than half of one. drop: left out of this epoch."""
    micro_batch_tokens: Annotated[int, Gt(0)] = 8192
    """Padded tokens that one rank computes at once. Lower it when memory runs out: results do not change."""
    length_buckets: Annotated[int, Gt(0), Formerly("row_groups")] = 4
    """Blocks of own padded length in a micro-batch: more blocks, less padding, more kernel launches."""
    packing: Annotated[Literal["auto", "off"], BeforeValidator(_as_written)] = "auto"
    """auto: a micro-batch is one sequence without padding, and what its rows begin alike with (the prompt of a pair) is
    computed once, with every model that computes the same that way. off: length buckets for every model."""
    epochs: Annotated[float, Gt(0)] = 1.0
    """Passes over the training data."""
    max_steps: Annotated[int, Gt(0)] | None = None
    """Stop after this many steps, even if epochs says more."""
    max_minutes: Annotated[Annotated[float, Gt(0)] | None, NoResult()] = None
    """Save at the first step that ends this many minutes after the start of the process, and exit with code 75: started
    again, the run goes on. Leave time for one more step and the checkpoint."""
    seed: int = 0
    """Seed of the data order, of new weights and of dropout."""
    evaluate_every: Annotated[int, Ge(0)] = 50
    """Steps between held-out evaluations; 0 evaluates at the end only."""
    evaluate_first: bool = False
    """Evaluate before the first step as well: what training starts from. It is a candidate for the best, and saved."""
    checkpoint_every: Annotated[int, Ge(0), NoResult()] = 100
    """Steps between full-state checkpoints; 0 writes one at the end only."""
    keep_checkpoints: Annotated[int, Gt(0), NoResult()] = 2
    """How many of the latest checkpoints stay; the best one stays as well."""
    resume: Annotated[Literal["auto", "never", "required", "publish"], NoResult()] = "auto"
    """auto: go on from the newest intact checkpoint if there is one. never: refuse a run folder with checkpoints.
    required: refuse one without. publish: refuse one without, and publish what they hold without training on (rlhf
    publish)."""
    extend: Annotated[bool, NoResult()] = False
    """Train on in a run folder beyond the steps that its checkpoint was planned for: epochs or max_steps may be larger
    than they were. The learning rate goes on where the schedule of the larger number of steps is, and that is said."""
    best_metric: str = "eval/accuracy"
    """Held-out metric that decides which checkpoint is the best; higher is better, or lower with a leading minus
    (-eval/loss)."""
    publish: Literal["best", "last", "none"] = "best"
    """Which weights become final/; none publishes nothing (for sweeps)."""
    patience: Annotated[int, Gt(0)] | None = None
    """Stop after this many evaluations without a better best_metric."""
    log_every: Annotated[int, Gt(0), NoResult()] = 1
    """Steps between lines of metrics.jsonl and TensorBoard."""
    tensorboard: Annotated[bool, NoResult()] = True
    """Write TensorBoard event files into the run folder."""
    wandb_project: Annotated[str | None, NoResult()] = None
    """Weights & Biases project to log to as well (pip install 'margin-rlhf[wandb]')."""
    mlflow_experiment: Annotated[str | None, NoResult()] = None
    """MLflow experiment to log to as well, at MLFLOW_TRACKING_URI (pip install 'margin-rlhf[mlflow]')."""
    trackio_project: Annotated[str | None, NoResult()] = None
    """Trackio project to log to as well (pip install 'margin-rlhf[trackio]')."""
    prometheus_file: Annotated[Path | None, NoResult()] = None
    """File for the latest metrics in the text format of Prometheus, replaced at each line of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("wandb_project", "mlflow_experiment", "trackio_project", "prometheus_file"):
            given = getattr(self, name)
            if given == Path() or (isinstance(given, str) and not given.strip()):
                raise ValueError(f"{name} is empty; give it a name, or {name}=null to do without")
