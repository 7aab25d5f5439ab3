"""How runs of the preference stage are compared: objectives with and without a reference side by side."""

import json
from collections.abc import Sequence

from policy.preference.config import PreferenceConfig
from policy.preference.losses import LOSSES
from rlhf.config import to_dict
from rlhf.train.comparison import Column, Comparison, Metrics

SIDES = ("chosen", "rejected")
DRIFTS = ("eval/chosen_drift_per_token", "eval/rejected_drift_per_token")


def paired_objectives() -> tuple[str, ...]:
    """What ``loss.kind=all`` stands for: no likelihood alone, and nothing that reads single responses, or margins that
    few data have."""
    return tuple(
        name
        for name, objective in LOSSES.items()
        if name != "sft" and not objective.unpaired and "data_margins" not in objective.inputs
    )


def with_drifts(runs: Sequence[tuple[PreferenceConfig, Metrics]]) -> list[Metrics]:
    """The metrics of each run. One without a reference gets its drift from the start that the others tell."""
    starts: dict[str, Metrics] = {}
    for config, metrics in runs:
        start = _start(config, metrics)
        if start is not None:
            starts[_start_key(config)] = start
    return [metrics | _drifts(config, metrics, starts.get(_start_key(config))) for config, metrics in runs]


def _start_key(config: PreferenceConfig) -> str:
    """The log-probabilities of runs with the same key had the same start, on the same held-out data."""
    model = [config.model.path, config.model.revision, config.model.layers]
    return json.dumps([model, to_dict(config.rows), config.engine.precision, config.loss.tail_weight])


def _start(config: PreferenceConfig, metrics: Metrics) -> Metrics | None:
    """Log-probabilities of the model that training started from by side, in nats per token, where that is known."""
    reference = config.reference
    if reference.path is not None or reference.sync_every or config.loss.tail_weight != 1:
        return None
    now, drifts = _logprobs(metrics), dict(zip(SIDES, DRIFTS, strict=True))
    if now is None or any(metrics.get(name) is None for name in drifts.values()):
        return None
    return {side: now[side] - metrics[name] for side, name in drifts.items()}


def _drifts(config: PreferenceConfig, metrics: Metrics, start: Metrics | None) -> Metrics:
    now = _logprobs(metrics)
    if start is None or config.loss.needs_reference or now is None:
        return {}
    return {name: now[side] - start[side] for side, name in zip(SIDES, DRIFTS, strict=True)}


def _logprobs(metrics: Metrics) -> dict[str, float] | None:
    names = {side: f"eval/{side}_logprob_per_token" for side in SIDES}
    if any(metrics.get(name) is None for name in names.values()):
        return None
    return {side: metrics[name] for side, name in names.items()}


COMPARISON = Comparison(
    columns=(
        Column(metric="eval/accuracy", label="accuracy", layout=".1%"),
        Column(metric="eval/loss", label="loss", layout=".3f"),
        Column(metric="eval/gap", label="gap", layout=".3f"),
        Column(metric=DRIFTS[0], label="chosen drift", layout="+.3f"),
        Column(metric=DRIFTS[1], label="rejected drift", layout="+.3f"),
        Column(metric="zero_gradient_share", label="zero gradient", layout=".0%"),
    ),
    notes=(
        "Drift: log-probability of the responses against the model that training started from (or the reference), in "
        "nats per token. Zero gradient: share of the pairs of the last step that move nothing any more.",
        "Each run is measured by its own implicit reward. Loss and gap compare only where objective and beta agree. "
        "Accuracy without a reference is that of the log-probabilities themselves, which order pairs before any "
        "training; with one, that of their change.",
    ),
    all_of={"loss.kind": paired_objectives()},
    span=DRIFTS,
    span_label="drift of log-probabilities, nats per token",
    chance=0.5,
    complete=with_drifts,
)
