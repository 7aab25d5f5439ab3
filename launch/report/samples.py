"""Responses to read: those of several policies to one prompt, and those that a run of PPO wrote along its way."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.report.contents import Passage, Reading, Text, named
from launch.report.diff import marked
from launch.report.reading import Run
from rlhf.train.held_out import shortened

SHOWN = 4
"""Passages of each kind."""
Rows = Sequence[Mapping[str, Any]]


def compared(samples: Mapping[str, Rows]) -> tuple[Reading, ...]:
    """Prompts with what every policy says, the first one's words as what was there before.

    Args:
        samples: rows by policy, in the same order of prompts; the first is what the others started from.
    """
    (before, base), *others = samples.items()
    if not others:
        return ()
    last = others[-1][1]
    count = min(map(len, samples.values()))
    gains = [_number(last[place]["reward"]) - _number(base[place]["reward"]) for place in range(count)]
    order = sorted((place for place in range(count) if not math.isnan(gains[place])), key=lambda place: gains[place])
    spread = sorted({round(place * (count - 1) / max(1, SHOWN - 1)) for place in range(min(SHOWN, count))})
    name = others[-1][0]
    kinds = {
        "Evenly spread prompts": (spread, "Not chosen by their rewards."),
        "Largest gains": (order[::-1][:SHOWN], f"Where {name} has the most over {before}."),
        "Largest losses": (order[:SHOWN], f"Where {name} has the least over {before}."),
    }
    readings = []
    for title, (places, note) in kinds.items():
        if not places:
            continue
        passages = tuple(_compared_at(samples, before, place) for place in places)
        note += " Marked words are not in the first response."
        readings.append(Reading(title=title, passages=passages, note=note))
    return tuple(readings)


def _compared_at(samples: Mapping[str, Rows], before: str, place: int) -> Passage:
    base = samples[before][place]
    texts = []
    for name, rows in samples.items():
        row = rows[place]
        response = shortened(str(row["response"]))
        parts = ((response, False),) if name == before else marked(shortened(str(base["response"])), response)
        ended = "" if row.get("ended", True) else ", cut off"
        texts.append(Text(title=f"{name}: {_reward(row)}{ended}", parts=parts))
    return Passage(title=f"prompt {place + 1}", prompt=prompt_text(base["prompt"]), texts=tuple(texts))


def rollout_readings(runs: Sequence[Run]) -> Iterator[Reading]:
    """Responses to held-out prompts of the published policy, and rollouts of the first and of the last step."""
    for run in runs:
        rows = [row for row in run.held_out if "response" in row]
        if rows:
            ordered = sorted(rows, key=lambda row: _number(row["reward"]))
            chosen = [*ordered[:SHOWN], *ordered[-SHOWN:]] if len(rows) > 2 * SHOWN else ordered
            yield Reading(
                title=named(run, runs, "Responses to held-out prompts"),
                passages=tuple(map(_rollout, chosen)),
                note="The lowest rewards first, then the highest.",
            )
        rollouts = run.rows("rollouts.jsonl")
        if rollouts:
            first, last = rollouts[0]["step"], rollouts[-1]["step"]
            chosen = [row for row in rollouts if row["step"] == first][:SHOWN]
            chosen += [row for row in rollouts if row["step"] == last][:SHOWN] if last != first else []
            yield Reading(
                title=named(run, runs, "Rollouts of the first and of the last step"),
                passages=tuple(map(_rollout, chosen)),
                note="Some responses of each; KL: of this response from the reference, in nats.",
            )


def _rollout(row: Mapping[str, Any]) -> Passage:
    step = f"step {row['step']}, " if "step" in row else ""
    kl = round(_number(row.get("kl", 0.0)), 1) + 0.0  # no -0.0
    title = f"{step}{row['row']}: reward {_reward(row)}, KL {kl:.1f}"
    if row.get("second") is not None:
        title += f", second scorer {_number(row['second']):.3f}"
    ended = "ended" if row.get("ended") else "cut off"
    text = Text(title=f"{row['tokens']} tokens, {ended}", parts=((shortened(str(row["response"])), False),))
    return Passage(title=title, prompt=prompt_text(row["prompt"]), texts=(text,))


def prompt_text(prompt: Any) -> str:
    """A prompt as text: it may be messages."""
    if isinstance(prompt, str):
        return shortened(prompt)
    return shortened("\n".join(f"{each.get('role')}: {each.get('content')}" for each in prompt))


def _number(value: Any) -> float:
    """Not a number where there is none: a response that nothing can be said of has no reward."""
    return math.nan if value is None else float(value)


def _reward(row: Mapping[str, Any]) -> str:
    return "none" if row["reward"] is None else f"{_number(row['reward']):.3f}"
