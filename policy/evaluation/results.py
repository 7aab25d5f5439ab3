"""What an evaluation of policies found: numbers with intervals, as a table, and back from its file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from rich.table import Table

from rlhf.core.findings import read_findings
from rlhf.core.intervals import Estimate

_HEADINGS = ("policy", "reward", "gain", "KL", "KL (k3)", "log-ratio", "tokens", "ended")


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluation:
    """Measurements of one policy on fresh samples."""

    name: str
    reward: Estimate
    """Mean over prompts of the mean reward of their samples."""
    gain: Estimate | None
    """Reward minus that of the reference for the same prompts; ``None`` for the reference itself."""
    kl: float | None
    """KL(policy || reference) of a response in nats (k1); ``None`` where samples were drawn at another temperature than
    1, from some of the tokens only, or with a repetition penalty: from another distribution than the policy."""
    kl_k3: float | None
    """The same by another estimate (k3); see :func:`policy.ppo.telemetry.response_kl`."""
    log_ratio: float
    """Mean log-probability of a sample under the policy, less that under the reference, in nats: what ``kl`` is where
    it may be called so."""
    tokens: float
    """Mean tokens of a response."""
    ended_share: float
    """Responses that the model ended itself."""
    prompts: int
    samples: int


def evaluation_table(evaluations: Sequence[PolicyEvaluation]) -> Table:
    """One line a policy; "gain" is over the reference, for the same prompts."""
    table = Table(title="Fresh samples for held-out prompts (95 % intervals over prompts)", title_justify="left")
    headings, rows = _columns(evaluations)
    for column in headings:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def read_evaluations(folder: Path) -> list[PolicyEvaluation]:
    """What :func:`policy.evaluation.compare.evaluate_policies` wrote into ``folder``."""
    return TypeAdapter(list[PolicyEvaluation]).validate_python(read_findings(folder)["policies"])


def report_of(folder: Path) -> Table:
    """The table of an evaluation that is finished, from its run folder."""
    return evaluation_table(read_evaluations(folder))


def markdown(evaluations: Sequence[PolicyEvaluation]) -> str:
    headings, rows = _columns(evaluations)
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _columns(evaluations: Sequence[PolicyEvaluation]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: the KL where the samples have one, else the log-ratio."""
    unfit = {"log-ratio"} if all(each.kl is not None for each in evaluations) else {"KL", "KL (k3)"}
    shown = [place for place, heading in enumerate(_HEADINGS) if heading not in unfit]
    rows = [_cells(each) for each in evaluations]
    return [_HEADINGS[place] for place in shown], [[row[place] for place in shown] for row in rows]


def _cells(each: PolicyEvaluation) -> list[str]:
    def shown(estimate: Estimate | None) -> str:
        return "" if estimate is None else f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"

    nats = ["" if value is None else f"{value:.2f}" for value in (each.kl, each.kl_k3, each.log_ratio)]
    return [each.name, shown(each.reward), shown(each.gain), *nats, f"{each.tokens:.1f}", f"{each.ended_share:.0%}"]
