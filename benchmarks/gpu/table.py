"""One table of everything that was measured."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.cells import Result
from benchmarks.gpu.parity import LIMITS

HEADS = ("part", "case", "rate", "useful TFLOP/s", "of the limit", "padding", "peak GiB", "times TRL", "remarks")
SAME_LOSS = 0.02
"""Largest difference of the losses of the first two steps between two sides in bfloat16."""


def table(results: Sequence[Result]) -> list[str]:
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    for cells in rows(results):
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    for result in results:
        if result.skipped or result.failed:
            said = f"skipped: {result.skipped}" if result.skipped else f"FAILED: {result.failed}"
            yield _row(result, remarks=said)
        elif result.figures is not None:
            yield from ROWS[result.part](result, results)


def _row(
    result: Result,
    *,
    case: str | None = None,
    rate: str = "",
    tflops: str = "",
    share: str = "",
    padding: str = "",
    peak: str = "",
    times: str = "",
    remarks: str = "",
) -> tuple[str, ...]:
    return result.part, case or result.name, rate, tflops, share, padding, peak, times, remarks


def _found(results: Sequence[Result], part: str, **arguments: Any) -> dict[str, Any] | None:
    """The figures of the first cell of ``part`` with these arguments."""
    for result in results:
        if result.part == part and result.figures and arguments.items() <= dict(result.arguments).items():
            return result.figures
    return None


def _material(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    assert result.figures is not None
    models = {name: result.figures[name] for name in ("policy", "small")}
    yield _row(result, remarks=", ".join(f"{name}: {count / 1e6:.4g} M parameters" for name, count in models.items()))


def _parity(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    first = _found(results, "parity")
    assert result.figures is not None and first is not None
    if result.figures is first:
        yield _row(result, remarks="; ".join(f"{name} {value:.5g}" for name, value in first.items()))
        return
    limit = LIMITS[result.arguments["precision"]]
    shares = {name: abs(value - first[name]) / max(abs(first[name]), 1e-3) for name, value in result.figures.items()}
    worst = max(shares, key=lambda name: shares[name])
    verdict = "same" if shares[worst] <= limit else f"DIFFERS (limit {limit:g})"
    yield _row(
        result, remarks=f"{verdict}; " + "; ".join(f"{name} off by {share:.1e}" for name, share in shares.items())
    )


def _families(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """A line for each precision."""
    assert result.figures is not None
    for precision, found in result.figures.items():
        said = [f"packed rows by {found['kernel']}"]
        if "off" in found:
            said.append("log-probabilities off by {:.1e}, gradients by {:.1e}".format(*found["off"]))
        said.append(f"{found['recordings']} CUDA graphs: {found['same']:.0%} of responses the same")
        said.append(f"log-probabilities off by {found['gap']:.1e} nats before they differ")
        yield _row(result, case=f"{result.name}, {precision}", remarks=", ".join(said))


def _profile(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    figures = result.figures
    assert figures is not None
    kinds = ", ".join(f"{kind} {seconds / figures['seconds']:.0%}" for kind, seconds in figures["kinds"].items())
    said = f"a step of {figures['seconds']:.2f} s, the GPU busy for {figures['busy'] / figures['seconds']:.0%}: {kinds}"
    yield _row(result, remarks=said)


def _limit(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    assert result.figures is not None
    parts = ", ".join(f"{name} {result.figures[f'{name}_tflops']:.4g}" for name in ("square", "up", "down"))
    yield _row(result, tflops=f"{result.figures['tflops']:.4g}", share="100 %", remarks=parts)


def _training(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    figures, asked = result.figures, dict(result.arguments)
    assert figures is not None
    limit = _found(results, "limit")
    case = {name: value for name, value in asked.items() if name not in ("kernels", "attention")} | {"side": "trl"}
    theirs = _found(results, "training", **case) if asked["side"] == "ours" else None
    remarks = [f"{figures['computed_tokens']:.0%} of the rows' tokens computed"]
    remarks.append(f"steps of {min(figures['step_seconds']):.2f} to {max(figures['step_seconds']):.2f} s")
    if asked["side"] == "trl":
        remarks.append(f"{figures['at_once']} pairs at once")
    else:
        remarks.append(_planned(figures["planned_gib"], figures["peak_gib"]))
    times = ""
    if theirs is not None:
        off = max(abs(a - b) for a, b in zip(figures["losses"][:2], theirs["losses"][:2], strict=False))
        remarks.append(f"losses differ by {off:.1e}" + ("" if off <= SAME_LOSS else ": NOT THE SAME WORK"))
        times = f"{figures['pairs_per_second'] / theirs['pairs_per_second']:.2f}"
        times += f", memory {figures['peak_gib'] / theirs['peak_gib']:.2f}"
    yield _row(
        result,
        rate=f"{figures['pairs_per_second']:.4g} pairs/s",
        tflops=f"{figures['useful_tflops']:.4g}",
        share="" if limit is None else f"{figures['useful_tflops'] / limit['tflops']:.0%}",
        padding=f"{figures['padding']:.1%}",
        peak=f"{figures['peak_gib']:.2f}",
        times=times,
        remarks=", ".join(remarks),
    )


def _rollouts(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    figures, asked = result.figures, dict(result.arguments)
    assert figures is not None
    theirs = _found(results, "rollouts", **(asked | {"side": "trl"})) if asked["side"] == "ours" else None
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in figures["phase_seconds"].items())
    tokens = f"{figures['response_tokens']:.0f} tokens a response, "
    tokens += f"{figures['rollout_tokens_per_second']:.4g} tokens/s sampled"
    yield _row(
        result,
        rate=f"{figures['samples_per_second']:.4g} samples/s",
        peak=f"{figures['peak_gib']:.2f}",
        times="" if theirs is None else f"{figures['samples_per_second'] / theirs['samples_per_second']:.2f}",
        remarks=f"{tokens}; {phases}" + (f"; {recorded} CUDA graphs" if (recorded := figures["recordings"]) else ""),
    )


def _margin(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """A line for each number of pairs, beside the reward step of as many if that was measured."""
    assert result.figures is not None
    step = _found(results, "training", stage="reward", side="ours", checkpointing=False)
    for name, seconds in result.figures.items():
        pairs = int(name.removeprefix("seconds_"))
        share = "" if step is None else f"{seconds * step['pairs_per_second'] / pairs:.2%} of a reward step"
        yield _row(result, case=f"{pairs} pairs", rate=f"{1000 * seconds:.2f} ms", remarks=share)


def _syncs(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    figures = result.figures
    assert figures is not None
    rate = f"{figures['syncs']} {figures['counted']} a step"
    yield _row(result, rate=rate, remarks=f"at {figures['places']} places; most: {', '.join(figures['most'])}")


def _start(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    assert result.figures is not None
    yield _row(result, rate=f"{result.figures['seconds']:.1f} s", remarks="from the command to the first step")


def _peaks(result: Result, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    figures = result.figures
    assert figures is not None
    remarks = _planned(figures["planned_gib"], figures["measured_gib"])
    yield _row(result, peak=f"{figures['measured_gib']:.3g}", remarks=remarks)


def _planned(planned: float, measured: float) -> str:
    return f"planned {planned:.3g} GiB, {planned / measured:.2f} of the peak"


ROWS = {
    "material": _material,
    "parity": _parity,
    "families": _families,
    "limit": _limit,
    "training": _training,
    "rollouts": _rollouts,
    "margin": _margin,
    "syncs": _syncs,
    "profile": _profile,
    "start": _start,
    "peaks": _peaks,
}
