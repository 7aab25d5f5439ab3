"""What an evaluation of policies found: numbers with intervals, as a table, and back from its file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from rich.table import Table

from rlhf.core.intervals import Estimate

_HEADINGS = ("policy", "reward", "gain", "KL", "KL (k3)", "tokens", "ended")


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluation:
    """Measurements of one policy on fresh samples."""

    name: str
    reward: Estimate
    """Mean over prompts of the mean reward of their samples."""
    gain: Estimate | None
    """Reward minus that of the reference for the same prompts; ``None`` for the reference itself."""
    kl: float
    """KL(policy || reference) of a response in nats: mean log-ratio of the policy's own samples (k1)."""
    kl_k3: float
    """KL by the estimator ``exp(-l) - 1 + l`` of the log-ratio l, which is never negative (k3)."""
    tokens: float
    """Mean tokens of a response."""
    ended_share: float
    """Responses that the model ended itself."""
    prompts: int
    samples: int


def evaluation_table(evaluations: Sequence[PolicyEvaluation]) -> Table:
    """One line a policy; "gain" is over the reference, for the same prompts."""
    table = Table(title="Fresh samples for held-out prompts (95 % intervals over prompts)", title_justify="left")
    for column in _HEADINGS:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for each in evaluations:
        table.add_row(*_cells(each))
    return table


def read_evaluations(folder: Path) -> list[PolicyEvaluation]:
    """What :func:`policy.evaluation.compare.evaluate_policies` wrote into ``folder``."""
    rows = json.loads((folder / "evaluations.json").read_text())
    return TypeAdapter(list[PolicyEvaluation]).validate_python(rows)


def report_of(folder: Path) -> Table:
    """The table of an evaluation that is finished, from its run folder."""
    return evaluation_table(read_evaluations(folder))


def markdown(evaluations: Sequence[PolicyEvaluation]) -> str:
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---" * len(_HEADINGS) + "|"]
    lines += ["| " + " | ".join(_cells(each)) + " |" for each in evaluations]
    return "\n".join(lines) + "\n"


def _cells(each: PolicyEvaluation) -> list[str]:
    def shown(estimate: Estimate | None) -> str:
        return "" if estimate is None else f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"

    numbers = (f"{each.kl:.2f}", f"{each.kl_k3:.2f}", f"{each.tokens:.1f}", f"{each.ended_share:.0%}")
    return [each.name, shown(each.reward), shown(each.gain), *numbers]
