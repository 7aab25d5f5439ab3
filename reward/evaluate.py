"""What a reward model is worth on held-out pairs: accuracy with an interval, a length baseline, calibration.

Plain arrays in, a frozen record out: no ranks, no files. Rewards are plain rewards, without any margin.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

from rlhf.core.intervals import Accuracy, preference_accuracy

CALIBRATION_BINS = 10
QUARTILES = 4

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The accuracy of the pairs whose measured quantity lies between two of its observed values."""

    smallest: float
    """Smallest value of the quantity in this bucket."""
    largest: float
    """Largest value of the quantity in this bucket."""
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """The pairs that are ranked with about the same confidence."""

    confidence: float
    """Their mean ``sigmoid(|chosen - rejected|)``, in [0.5, 1]."""
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What :func:`evaluate_pairs` measured."""

    accuracy: Accuracy
    length_baseline: Accuracy
    """The same pairs decided by length alone: the longer answer wins."""
    mean_loss: float
    """Plain Bradley-Terry loss in nats, without margin; log 2 = 0.693 is what no knowledge costs."""
    calibration_error: float
    """Expected calibration error of ``sigmoid(chosen - rejected)``, in [0, 1]."""
    reward_mean: float
    """Mean reward over both answers of all pairs, in logits."""
    reward_sd: float
    """Population standard deviation over both answers of all pairs, in logits."""
    mean_gap: float
    """Mean of chosen minus rejected, in logits."""
    by_length_difference: tuple[Bucket, ...]
    """Quartiles of chosen length minus rejected length, ascending; fewer where values repeat."""
    by_score_gap: tuple[Bucket, ...] | None
    """Quartiles of ``|chosen_score - rejected_score|``, ascending; ``None`` when no scores were given."""
    reliability: tuple[Confidence, ...] = ()
    """See :func:`reliability_curve`; empty in files of earlier versions."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists and numbers, ready for JSON."""
        record = asdict(self)
        for name in ("by_length_difference", "by_score_gap", "reliability"):
            record[name] = None if record[name] is None else list(record[name])
        return record


def evaluate_pairs(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    chosen_scores: ArrayLike | None = None,
    rejected_scores: ArrayLike | None = None,
) -> Evaluation:
    """Measure how well rewards order N pairs, and how well length alone would have done.

    Args:
        chosen_rewards: ``(N,)`` rewards of the preferred answers, in logits.
        rejected_rewards: ``(N,)`` rewards of the other answers, in logits.
        chosen_lengths: ``(N,)`` lengths of the preferred answers, in any one unit (tokens, characters).
        rejected_lengths: ``(N,)`` in the same unit.
        chosen_scores: ``(N,)`` scores of the annotator, or ``None``; given for both sides or neither.
        rejected_scores: ``(N,)`` likewise.
    Raises:
        ValueError: shapes that differ or are not ``(N,)``, no pairs at all, a non-finite entry, or scores
            for one side only.
    """
    if (chosen_scores is None) != (rejected_scores is None):
        missing = "chosen_scores" if chosen_scores is None else "rejected_scores"
        raise ValueError(f"scores are given for one side only: {missing!r} is missing")
    given: dict[str, ArrayLike] = {
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    if chosen_scores is not None and rejected_scores is not None:
        given |= {"chosen_scores": chosen_scores, "rejected_scores": rejected_scores}
    columns = _checked_columns(given)
    gap = columns["chosen_rewards"] - columns["rejected_rewards"]
    length_difference = columns["chosen_lengths"] - columns["rejected_lengths"]
    by_score_gap = None
    if chosen_scores is not None:
        by_score_gap = _quartile_buckets(np.abs(columns["chosen_scores"] - columns["rejected_scores"]), gap)
    rewards = np.concatenate([columns["chosen_rewards"], columns["rejected_rewards"]])
    reliability = reliability_curve(gap)
    return Evaluation(
        accuracy=preference_accuracy(gap),
        length_baseline=preference_accuracy(length_difference),
        mean_loss=float(np.logaddexp(0.0, -gap).mean()),
        calibration_error=expected_calibration_error(reliability),
        reward_mean=float(rewards.mean()),
        reward_sd=float(rewards.std()),
        mean_gap=float(gap.mean()),
        by_length_difference=_quartile_buckets(length_difference, gap),
        by_score_gap=by_score_gap,
        reliability=reliability,
    )


def evaluate_held_out(
    chosen_rewards: ArrayLike, rejected_rewards: ArrayLike, *, lengths: Array, scores: Array
) -> Evaluation:
    """:func:`evaluate_pairs` on the columns of a data set.

    Args:
        chosen_rewards, rejected_rewards: ``(N,)``.
        lengths: ``(N, 2)`` of chosen and rejected.
        scores: ``(N, 2)`` likewise, NaN where a pair has none; its buckets are of the pairs that have both.
    """
    found = evaluate_pairs(
        chosen_rewards, rejected_rewards, chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, 1]
    )
    known = ~np.isnan(scores).any(axis=1)
    if not known.any():
        return found
    gap = np.asarray(chosen_rewards, np.float64) - np.asarray(rejected_rewards, np.float64)
    apart = np.abs(scores[:, 0] - scores[:, 1])
    return replace(found, by_score_gap=_quartile_buckets(apart[known], gap[known]))


def reliability_curve(gap: ArrayLike) -> tuple[Confidence, ...]:
    """How often rewards are right, by how sure they are.

    The side with the larger reward is the prediction and ``sigmoid(|gap|)``, in [0.5, 1], its confidence. That range is
    cut into ten bins of equal width (upper edge included in the last); bins without pairs are left out. A tie is half
    right.

    Args:
        gap: ``(N,)`` of chosen minus rejected, in logits.
    """
    gap = np.asarray(gap, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    places = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return tuple(
        Confidence(
            confidence=float(confidence[places == place].mean()), accuracy=preference_accuracy(gap[places == place])
        )
        for place in np.unique(places)
    )


def expected_calibration_error(curve: Sequence[Confidence]) -> float:
    """How far stated confidence is from the share of right decisions, averaged over pairs.

    Each bin of :func:`reliability_curve` contributes ``|share right - mean confidence|``, weighted by its share of the
    pairs.

    References:
        Naeini, Cooper and Hauskrecht (2015), Obtaining well calibrated probabilities.
    """
    pairs = sum(each.accuracy.pairs for each in curve)
    return sum(each.accuracy.pairs * abs(each.accuracy.value - each.confidence) for each in curve) / pairs


def _checked_columns(given: dict[str, ArrayLike]) -> dict[str, Array]:
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in given.items()}
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name!r}: {shape}" for name, shape in shapes.items()))
    shape = columns["chosen_rewards"].shape
    if len(shape) != 1:
        raise ValueError(f"expected one number for each pair, shape (N,); got {shape}")
    if shape[0] == 0:
        raise ValueError("there are no pairs to evaluate")
    for name, column in columns.items():
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad):
            raise ValueError(f"{name!r} has {len(bad)} non-finite entries of {len(column)}, the first at {bad[0]}")
    return columns


def _quartile_buckets(quantity: Array, gap: Array) -> tuple[Bucket, ...]:
    """Pairs with the same value share a bucket, so repeated values can leave fewer than four."""
    cuts = np.quantile(quantity, np.arange(1, QUARTILES) / QUARTILES)
    places = np.searchsorted(cuts, quantity, side="left")
    buckets = []
    for place in np.unique(places):
        inside = quantity[places == place]
        buckets.append(
            Bucket(
                smallest=float(inside.min()),
                largest=float(inside.max()),
                accuracy=preference_accuracy(gap[places == place]),
            )
        )
    return tuple(buckets)


def evaluation_table(evaluation: Evaluation, *, title: str = "Held-out evaluation") -> Table:
    """The record as a table that fits 80 columns; "length difference" is chosen minus rejected."""
    table = Table(title=title, title_justify="left")
    table.add_column("measure", overflow="fold")
    for name in ("value", "95 % interval", "pairs", "ties"):
        table.add_column(name, justify="right", no_wrap=True)
    _add_accuracy(table, "accuracy", evaluation.accuracy)
    _add_accuracy(table, "length only: the longer wins", evaluation.length_baseline)
    table.add_section()
    _add_buckets(table, "length difference", evaluation.by_length_difference, digits=0)
    if evaluation.by_score_gap is not None:
        table.add_section()
        _add_buckets(table, "score gap", evaluation.by_score_gap, digits=2)
    table.add_section()
    table.add_row("loss, nats (knowing nothing: 0.693)", f"{evaluation.mean_loss:.3f}")
    table.add_row("calibration error", f"{evaluation.calibration_error:.1%}")
    table.add_row("mean reward gap, logits", f"{evaluation.mean_gap:.3f}")
    table.add_row("reward mean, logits", f"{evaluation.reward_mean:.3f}")
    table.add_row("reward sd, logits", f"{evaluation.reward_sd:.3f}")
    return table


def _add_buckets(table: Table, name: str, buckets: Sequence[Bucket], *, digits: int) -> None:
    for bucket in buckets:
        label = f"{name} {bucket.smallest:.{digits}f} to {bucket.largest:.{digits}f}"
        _add_accuracy(table, label, bucket.accuracy)


def _add_accuracy(table: Table, name: str, accuracy: Accuracy) -> None:
    interval = f"{accuracy.low:.1%} to {accuracy.high:.1%}"
    table.add_row(name, f"{accuracy.value:.1%}", interval, str(accuracy.pairs), str(accuracy.ties))
