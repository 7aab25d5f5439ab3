"""How far the reward rises for how much KL, and where the scorer that only watches stops to follow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.report.contents import Advice
from launch.report.figures import Figure, Line, smoothed
from launch.report.reading import Run

FALL = 0.5
"""The second scorer has left when it fell this far below its peak, in its standard deviations at the start."""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Gains over the first step, in standard deviations of its scores; one entry a step."""

    steps: Sequence[float]
    kl: Sequence[float]
    proxy: Sequence[float]
    gold: Sequence[float] | None
    """Gains by the second scorer; ``None`` without one."""

    @property
    def parted(self) -> int | None:
        """The entry where the second scorer was best, if it has fallen since while the proxy rose."""
        return None if self.gold is None else parting(self.proxy, self.gold)


def parting(proxy: Sequence[float], gold: Sequence[float]) -> int | None:
    """Where two curves part: the peak of ``gold``, if it ends at least FALL below and ``proxy`` ends higher."""
    peak = max(range(len(gold)), key=lambda place: gold[place])
    return peak if gold[peak] - gold[-1] >= FALL and proxy[-1] > proxy[peak] else None


def frontier_of(run: Run) -> Frontier | None:
    """Smoothed over a few steps; ``None`` for a run that says nothing of it."""
    rows = [row for row in run.metrics if row.get("kl") is not None and row.get("score") is not None]
    if not rows:
        return None
    window = max(1, len(rows) // 15)

    def gain(name: str, deviation: str) -> list[float]:
        scale = rows[0].get(deviation) or 1.0
        return smoothed([(row[name] - rows[0][name]) / scale for row in rows], window)

    has_second = all(row.get("second") is not None for row in rows)
    return Frontier(
        steps=[row["step"] for row in rows],
        kl=smoothed([row["kl"] for row in rows], window),
        proxy=gain("score", "score_deviation"),
        gold=gain("second", "second_deviation") if has_second else None,
    )


def figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Gain against KL."""
    lines, marks = [], []
    for place, run in enumerate(runs):
        found = frontier_of(run)
        if found is None:
            continue
        order = sorted(range(len(found.kl)), key=lambda entry: found.kl[entry])
        tone = place if len(runs) > 1 else 0
        name = "score (trained on)" if len(runs) == 1 else f"{run.name}: score"
        lines.append(_along(name, found.kl, found.proxy, order, tone))
        if found.gold is not None:
            second = "second scorer" if len(runs) == 1 else f"{run.name}: second scorer"
            color = 1 if len(runs) == 1 else tone
            lines.append(_along(second, found.kl, found.gold, order, color, dashed=len(runs) > 1))
        if found.parted is not None:
            marks.append((found.kl[found.parted], "they part" if len(runs) == 1 else f"{run.name} parts"))
    yield Figure(
        key="frontier",
        title="Gain against KL",
        x="KL from the reference, nats per response",
        y="gain, standard deviations",
        lines=tuple(lines),
        marks=tuple(marks),
        levels=(0.0,),
        note="Gain over the first step, in standard deviations of its scores. The two scorers part where the second "
        f"one is best and then falls by {FALL:g} while the score goes on rising.",
    )


def _along(
    name: str, kl: Sequence[float], gain: Sequence[float], order: Sequence[int], color: int, *, dashed: bool = False
) -> Line:
    return Line(name=name, x=[kl[at] for at in order], y=[gain[at] for at in order], color=color, dashed=dashed)


def sentences(run: Run) -> Iterator[str]:
    """Whether reward and second scorer went together."""
    found = frontier_of(run)
    if found is None or found.gold is None:
        return
    ends = (
        f"over the run the score changed by {found.proxy[-1]:+.2f} standard deviations, the second scorer, which only "
        f"watches, by {found.gold[-1]:+.2f}"
    )
    if found.parted is None:
        yield f"{ends}: they have not parted."
        return
    at = found.parted
    yield f"{ends}: they parted at step {found.steps[at]:.0f}, at a KL of {found.kl[at]:.1f} nats."


def advice(run: Run) -> Iterator[Advice]:
    """What a parting says of the run."""
    found = frontier_of(run)
    if found is not None and found.parted is not None:
        step = found.steps[found.parted]
        yield Advice(
            run=run.name,
            step=int(step),
            text=f"After step {step:.0f} the score rises and the second scorer falls: the policy exploits the reward "
            "model. Take a checkpoint near that step, raise kl.coefficient, or set an ensemble and reward.combine=min.",
        )
