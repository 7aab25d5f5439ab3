"""What a run writes for people: rollouts to read, and the held-out evaluation."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from policy.ppo.experience import Experience
from policy.ppo.rollouts import Rollouts
from policy.ppo.scoring import Scored
from policy.ppo.telemetry import response_kl
from rlhf.core.intervals import Estimate, mean_with_interval
from rlhf.engine.ranks import Ranks
from rlhf.train.held_out import shortened
from rlhf.train.metrics import drop_rows_after

ROLLOUTS, SKIPPED = "rollouts.jsonl", "skipped_rollouts.jsonl"

OVER_BUDGET = -1e6
"""Selection value of a policy beyond the KL budget, minus its KL: any policy within it is better."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Fresh responses to held-out prompts."""

    reward: Estimate
    """Mean reward as the model gives it, in logits."""
    score: Estimate
    """Mean reward, standardized and combined: what the policy is trained on."""
    second: Estimate | None
    """Mean score by the second scorer; ``None`` without one."""
    kl: float
    """KL from the reference in nats per response (k1)."""
    kl_k3: float
    """The same by another estimate; see :func:`policy.ppo.telemetry.response_kl`."""
    tokens: float
    """Mean tokens of a response."""
    ended_share: float
    prompts: int
    selection: float
    """What decides on the best checkpoint: the score; far below all scores where the KL is over the budget."""

    def metrics(self) -> dict[str, float]:
        found = {
            "eval/reward": self.reward.value,
            "eval/score": self.score.value,
            "eval/kl": self.kl,
            "eval/tokens": self.tokens,
            "eval/ended_share": self.ended_share,
            "eval/selection": self.selection,
        }
        return found if self.second is None else found | {"eval/second": self.second.value}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def held_out(
    rollouts: Rollouts, scored: Scored, second: Scored | None, logprobs: Tensor, reference: Tensor, *, kl_budget: float
) -> HeldOut:
    """Sum up responses to held-out prompts.

    Args:
        rollouts: one response to each prompt.
        scored: their rewards; those without one are left out.
        second: those of the second scorer, if there is one.
        logprobs: ``(N, W)`` of the policy; 0 behind a response.
        reference: the same of the reference.
        kl_budget: nats per response.
    """
    kls = response_kl(logprobs, reference)
    kl = kls["kl"]
    score = _estimate(scored.scores[scored.known])
    selection = score.value if kl <= kl_budget else OVER_BUDGET - kl
    return HeldOut(
        reward=_estimate(scored.raw[scored.known]),
        score=score,
        second=None if second is None else _estimate(second.raw[second.known]),
        kl=kl,
        kl_k3=kls["kl_k3"],
        tokens=float(rollouts.response_lengths.float().mean()),
        ended_share=float(rollouts.ended.float().mean()),
        prompts=len(rollouts),
        selection=selection,
    )


def held_out_rows(
    rollouts: Rollouts, scored: Scored, second: Scored | None, log_ratios: Tensor, prompt_keys: np.ndarray
) -> list[dict[str, Any]]:
    """A row for ``held_out.jsonl`` of each response to a held-out prompt that has a reward, its ``value``.

    Args:
        rollouts: N responses, one to each prompt.
        scored: their rewards.
        second: those of the second scorer, if there is one.
        log_ratios: ``(N,)`` of policy and reference, in nats.
        prompt_keys: ``(N,)`` uint64.
    """
    rows = []
    for place in scored.known.nonzero().flatten().tolist():
        row = _row(0, rollouts, scored, place)
        row.pop("step")
        row |= {"prompt": shortened(row["prompt"]), "response": shortened(row["response"])}
        row |= {"group": f"{int(prompt_keys[place]):016x}", "value": row["reward"], "kl": float(log_ratios[place])}
        rows.append(row | ({} if second is None else {"second": _score(second.raw, second, place)}))
    return rows


def print_held_out(found: HeldOut) -> None:
    """A table on the terminal."""
    table = Table(title=f"fresh responses to {found.prompts} held-out prompts", title_justify="left")
    for name in ("measure", "value", "95 % interval"):
        table.add_column(name)
    for name, estimate in (("reward", found.reward), ("score", found.score), ("second scorer", found.second)):
        if estimate is not None:
            table.add_row(name, f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}")
    table.add_row("KL from the reference, nats per response", f"{found.kl:.3f} (k3: {found.kl_k3:.3f})", "")
    table.add_row("tokens per response", f"{found.tokens:.1f}", "")
    table.add_row("responses that end by themselves", f"{found.ended_share:.0%}", "")
    Console().print(table)


class RolloutLog:
    """``rollouts.jsonl``: some responses of each step; ``skipped_rollouts.jsonl``: those that were not finite."""

    def __init__(self, folder: Path, ranks: Ranks, count: int) -> None:
        self._folder, self._ranks, self._count = folder, ranks, count
        self._begun = False

    def write(self, step: int, experience: Experience, second: Scored | None) -> None:
        """Evenly spread ones of ``step``; the main rank writes, every rank must call it.

        Rows of a killed run are dropped first.
        """
        if self._count:
            self._ranks.on_main(lambda: self._write(step, experience, second))

    def _write(self, step: int, experience: Experience, second: Scored | None) -> None:
        rollouts, measured = experience.rollouts, experience.measured
        places = np.unique(np.linspace(0, len(rollouts) - 1, self._count).astype(int)).tolist()
        kl = (measured.logprobs - measured.reference).sum(dim=1)
        rows = []
        for place in places:
            row = _row(step, rollouts, experience.scored, place)
            row |= {"rewarded": float(experience.rewards[place]), "kl": float(kl[place])}
            row |= {} if second is None else {"second": _score(second.raw, second, place)}
            rows.append(row)
        self._append(ROLLOUTS, step, rows)

    def write_skipped(self, step: int, rollouts: Rollouts, scored: Scored, row_ids: Iterable[str]) -> None:
        """All of ``row_ids``; the main rank writes, every rank must call it."""
        places = [rollouts.row_ids.index(name) for name in row_ids]
        rows = [_row(step, rollouts, scored, place) for place in places]
        self._ranks.on_main(lambda: self._append(SKIPPED, step, rows))

    def _append(self, name: str, step: int, rows: list[dict]) -> None:
        if not self._begun:
            for each in (ROLLOUTS, SKIPPED):
                drop_rows_after(self._folder / each, step - 1)
        self._begun = True
        with (self._folder / name).open("a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _row(step: int, rollouts: Rollouts, scored: Scored, place: int) -> dict[str, Any]:
    return {
        "step": step,
        "row": rollouts.row_ids[place],
        "prompt": rollouts.prompts[place].text,
        "response": rollouts.texts[place],
        "reward": _score(scored.raw, scored, place),
        "score": _score(scored.scores, scored, place),
        **{f"reward/{name}": _score(term.scores, term, place) for name, term in scored.terms.items()},
        "tokens": len(rollouts.responses[place].tokens),
        "ended": rollouts.responses[place].ended,
    }


def _score(values: Tensor, scored: Scored, place: int) -> float | str | None:
    """Null where there is none; a text where it is not finite, which JSON has no word for."""
    if not bool(scored.known[place]):
        return None
    number = float(values[place])
    return number if np.isfinite(number) else str(number)


def _estimate(values: torch.Tensor) -> Estimate:
    return mean_with_interval(values.double().numpy())
