"""``rlhf data audit``: pairs in, pairs with what their labels look like out."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reward.audit.estimate import Audited, OutOfFold, audited, from_margins
from reward.audit.features import Extraction, Reading, default_layer
from reward.audit.margins import Differences
from reward.audit.mixture import share_interval
from reward.audit.runs import margins_by_runs, start_stage
from reward.audit.verdict import verdict
from rlhf.core.errors import DataError
from rlhf.core.files import digest, write_json, write_text
from rlhf.data.labels import SWAP_ABOVE, pair_digest
from rlhf.data.loading import default_cache_dir
from rlhf.data.messages import BadRow
from rlhf.data.options import ColumnConfig, SourceConfig
from rlhf.data.records import PreferenceRecord, prompt_key, to_records
from rlhf.data.rows import AUDIT_COLUMNS, json_cell
from rlhf.data.sources import open_source, row_names
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.build import has_bfloat16
from rlhf.models.backbones import hide_loading_bars
from rlhf.models.options import BackboneConfig
from rlhf.train.chat import load_chat

PAIRS, SUSPECTS, SUMMARY = "pairs.jsonl", "suspects.jsonl", "summary.json"
LEAST_OF_A_GROUP = 50
"""Pairs of a source or annotator below which its share is not estimated."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What to audit, with what."""

    data: str
    model: str | None
    """The backbone whose states are read; ``None`` with :attr:`judge`."""
    output: Path
    columns: ColumnConfig
    split: str | None = None
    template: str | None = None
    layer: int | None = None
    """State that is read, counted in layers from the embedding; ``None`` for :func:`default_layer`."""
    unseen: Literal["pairs", "prompts"] = "pairs"
    """Whether heads judge pairs that they did not see, or prompts of which they saw no pair."""
    folds: int = 5
    repeats: int = 4
    max_tokens: int = 1024
    batch_tokens: int = 8192
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU that has it, else float32."""
    group_columns: tuple[str, ...] = ("source", "annotator")
    """Columns by whose values shares are estimated as well, where rows have them."""
    cache_dir: Path | None = None
    judge: Path | None = None
    """A recipe of the reward stage whose runs judge, in the place of heads on frozen states."""
    settings: tuple[str, ...] = ()
    """Settings on top of that recipe, ``key=value``."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair with the row that it stands in."""

    row: Mapping[str, Any]
    alone: bool
    """Whether it is the only pair of its row."""
    record: PreferenceRecord


def audit_file(options: AuditOptions, start: Callable[[Sequence[str], Path], int] = start_stage) -> str:
    """Audit the pairs of ``options.data`` and write what was found to ``options.output``.

    Args:
        options: what to audit.
        start: see :func:`reward.audit.runs.margins_by_runs`.
    Returns:
        What was found, in one line.
    Raises:
        DataError: if there are no pairs, fewer prompts than folds, or features that are not finite.
        ModelError: if the model cannot be loaded.
    """
    pairs, left_out = _read(options)
    prompts, groups = _prompts_and_groups(pairs, options)
    with _progress() as progress:
        if options.judge is None:
            out_of_fold = pairs_as_features(pairs, options, progress)
            advance = _task(progress, "heads", out_of_fold.heads(options.repeats))
            found = audited(out_of_fold, repeats=options.repeats, advance=advance)
        else:
            each = margins_by_runs(
                [pair.record for pair in pairs],
                groups,
                options.judge,
                options.settings,
                options.output,
                folds=options.folds,
                repeats=options.repeats,
                seed=options.seed,
                advance=_task(progress, "runs", options.folds * options.repeats),
                start=start,
            )
            found = from_margins(each.mean(0), each.std(0), prompts, options.seed)
    rows = [_audited_row(pair, found, place) for place, pair in enumerate(pairs)]
    write_text(options.output / PAIRS, _lines(rows))
    order = np.argsort(found.margins, kind="stable")  # as the posterior orders them, where that is not 0 for all
    write_text(options.output / SUSPECTS, _lines(_suspect(pairs[place], found, place) for place in order))
    summary = _summary(options, pairs, prompts, found) | {"rows_left_out": left_out}
    write_json(options.output / SUMMARY, summary)
    return verdict(found.interval, found.wrong)


def read_features(options: AuditOptions) -> OutOfFold:
    """The pairs of ``options.data`` as features, with their folds: what an audit is made of.

    Raises:
        DataError: as :func:`audit_file`.
    """
    pairs, _ = _read(options)
    with _progress() as progress:
        return pairs_as_features(pairs, options, progress)


def pairs_as_features(pairs: Sequence[Pair], options: AuditOptions, progress: Progress) -> OutOfFold:
    """Features of both answers of all pairs, from the cache where it has them.

    Raises:
        DataError: if there are fewer prompts than folds, or features that are not finite.
    """
    hide_loading_bars()
    prompts, groups = _prompts_and_groups(pairs, options)
    assert options.model is not None
    chat = load_chat(options.model, options.template)
    chosen, rejected = _features(pairs, chat, options, _task(progress, "features", 2 * len(pairs)))
    return OutOfFold(
        differences=Differences.of(chosen, rejected, _answers(pairs, prompts)),
        prompts=prompts,
        groups=groups,
        folds=options.folds,
        seed=options.seed,
    )


def _prompts_and_groups(
    pairs: Sequence[Pair], options: AuditOptions
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """``(N,)`` each: equal for equal prompts, and for pairs that are in the same fold.

    Raises:
        DataError: if there are fewer of these than folds.
    """
    prompts = np.array([prompt_key(pair.record.prompt) for pair in pairs], np.uint64)
    groups = prompts if options.unseen == "prompts" else np.array([_both_answers(pair) for pair in pairs], np.uint64)
    if len(np.unique(groups)) < options.folds:
        raise DataError(
            f"{options.data}: {len(np.unique(groups))} different {options.unseen} make no {options.folds} folds; "
            f"an audit needs more {options.unseen}, or fewer --folds"
        )
    return prompts, groups


def _read(options: AuditOptions) -> tuple[list[Pair], int]:
    """All usable pairs, and how many rows have none."""
    source = open_source(SourceConfig(path=options.data, split=options.split))
    names = row_names(source.files)
    pairs: list[Pair] = []
    faults: list[str] = []
    for row in source.rows():
        row_id = f"{names[source.files[row.file]]}:{row.line}"
        try:
            if row.fault is not None:
                raise BadRow("unreadable row", row.fault)
            records, _ = to_records(row.value, options.columns, row_id=row_id, source=source.name)
        except BadRow as fault:
            faults.append(f"{row_id}: {fault}")
            continue
        pairs += [Pair(row=row.value, alone=len(records) == 1, record=record) for record in records]
    if not pairs:
        shown = f", such as {faults[0]}" if faults else ""
        raise DataError(f"{options.data}: no usable pairs in {len(faults)} rows{shown}")
    if faults:
        said = f"{len(faults)} rows are left out, such as {faults[0]}; `rlhf data check` shows more"
        Console(stderr=True).print(said, markup=False, soft_wrap=True)
    return pairs, len(faults)


def _both_answers(pair: Pair) -> int:
    """A name for the prompt with both answers, whichever is the chosen one."""
    sides = sorted(json.dumps(side, sort_keys=True) for side in (pair.record.chosen, pair.record.rejected))
    return int(digest(str(prompt_key(pair.record.prompt)), *sides), 16)


def _answers(pairs: Sequence[Pair], prompts: NDArray[np.uint64]) -> NDArray[np.int64]:
    """``(N, 2)`` numbers of chosen and rejected answers, equal for equal answers to one prompt."""
    numbers: dict[tuple[int, str], int] = {}
    return np.array(
        [
            [
                numbers.setdefault((int(prompt), json.dumps(side, sort_keys=True)), len(numbers))
                for side in (pair.record.chosen, pair.record.rejected)
            ]
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]
    )


def _features(
    pairs: Sequence[Pair], chat: ChatFormat, options: AuditOptions, advance: Callable[[int], None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``(N, D)`` of chosen and of rejected answers."""
    assert options.model is not None
    backbone = BackboneConfig(path=options.model)
    layer = options.layer or default_layer(backbone)
    bfloat16 = options.dtype == "bfloat16" or (options.dtype == "auto" and has_bfloat16())
    extraction = Extraction(
        model=BackboneConfig(path=options.model, layers=layer), dtype=torch.bfloat16 if bfloat16 else torch.float32
    )
    tokens = [
        _tokens(pair.record, side, chat)[-options.max_tokens :]
        for pair in pairs
        for side in (pair.record.chosen, pair.record.rejected)
    ]
    cache = (options.cache_dir or default_cache_dir().parent) / "features"
    reading = Reading(
        rows=tokens, extraction=extraction, chat=chat, cache=cache, batch_tokens=options.batch_tokens
    )
    states = reading.states(advance)
    return states[::2].astype(np.float64), states[1::2].astype(np.float64)


def _tokens(record: PreferenceRecord, side: Sequence[Any], chat: ChatFormat) -> NDArray[np.int32]:
    try:
        return chat.encode(record.prompt, side)[0]
    except (TemplateFault, BadRow) as fault:
        raise DataError(f"{record.row_id}: {fault}") from fault


def _audited_row(pair: Pair, found: Audited, place: int) -> dict[str, Any]:
    record, wrong = pair.record, float(found.wrong[place])
    own = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
    added = {
        "audit_margin": float(found.margins[place]),
        "audit_margin_sd": float(found.spread[place]),
        "audit_wrong": wrong,
        "audit_weight": 1 - wrong,
        "audit_label": "swap" if wrong > SWAP_ABOVE else "as_given",
        "audit_pair": pair_digest(record),
    }
    kept = {name: value for name, value in pair.row.items() if name not in AUDIT_COLUMNS}
    return (kept if pair.alone else own) | {name: _rounded(value) for name, value in added.items()}


def _suspect(pair: Pair, found: Audited, place: int) -> dict[str, Any]:
    record = pair.record
    return {
        "row": record.row_id,
        "wrong": _rounded(float(found.wrong[place])),
        "margin": _rounded(float(found.margins[place])),
        "margin_sd": _rounded(float(found.spread[place])),
        "prompt": _text(record.prompt),
        "chosen": _text(record.chosen),
        "rejected": _text(record.rejected),
    }


def _text(messages: Sequence[Any]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _summary(
    options: AuditOptions, pairs: Sequence[Pair], prompts: NDArray[np.uint64], found: Audited
) -> dict[str, Any]:
    interval = found.interval
    votes = _votes(pairs)
    return {
        "verdict": verdict(interval, found.wrong),
        "pairs": len(pairs),
        "prompts": len(np.unique(prompts)),
        "share_wrong": {"estimate": interval.share, "low": interval.low, "high": interval.high},
        "temperature": found.temperature,
        "unseen": options.unseen,
        "penalty": found.strength,
        "answer_effect": found.effect,
        "layer": None if options.model is None else options.layer or default_layer(BackboneConfig(path=options.model)),
        "folds": options.folds,
        "repeats": options.repeats,
        "model": options.model,
        "judge": None if options.judge is None else str(options.judge),
        "data": open_source(SourceConfig(path=options.data, split=options.split)).digest(),
        "contradictory_pairs": _contradictory(pairs, prompts),
        "judged_again": judged_again(votes),
        "longer_answer_chosen": _longer_chosen(pairs, np.ones(len(pairs), bool)),
        "longer_answer_chosen_among_suspects": _longer_chosen(pairs, found.wrong > SWAP_ABOVE),
        "by": {name: _by_group(name, pairs, prompts, found, votes) for name in options.group_columns},
    }


def _by_group(
    name: str,
    pairs: Sequence[Pair],
    prompts: NDArray[np.uint64],
    found: Audited,
    votes: Mapping[int, Sequence[tuple[int, bool]]],
) -> dict[str, dict[str, Any]] | str:
    """The share of every value of a column, at the temperature of all; or in words why there is none.

    ``against_others``: of the labels on answers that other values judged, too, the share that more of them contradict
    than share it.
    """
    values = np.array([str(pair.row.get(name, "")) for pair in pairs])
    if not any(name in pair.row for pair in pairs):
        return "no row has this column"
    if len(set(values)) == 1:
        return f"all rows have {values[0]}: nothing to compare"
    groups = {}
    for value, count in Counter(values.tolist()).most_common():
        here = values == value
        groups[value] = {"pairs": count, "mean_wrong": float(found.wrong[here].mean())}
        if (against := _against_others(values, value, votes)) is not None:
            groups[value]["against_others"] = against
        if count >= LEAST_OF_A_GROUP:
            share = share_interval(found.margins[here], prompts[here], temperature=found.temperature)
            groups[value] |= {"estimate": share.share, "low": share.low, "high": share.high}
    return groups


def _votes(pairs: Sequence[Pair]) -> dict[int, list[tuple[int, bool]]]:
    """Places of the pairs of the same two answers, each with which of the two it calls the better one."""
    votes: dict[int, list[tuple[int, bool]]] = {}
    for place, pair in enumerate(pairs):
        sides = [json.dumps(side, sort_keys=True) for side in (pair.record.chosen, pair.record.rejected)]
        votes.setdefault(_both_answers(pair), []).append((place, sides[0] < sides[1]))
    return {key: each for key, each in votes.items() if len(each) > 1}


def judged_again(votes: Mapping[int, Sequence[tuple[int, bool]]]) -> dict[str, int]:
    """How many two answers were judged more than once, and how many of these not alike."""
    unlike = sum(len({first for _, first in each}) > 1 for each in votes.values())
    return {"pairs": len(votes), "disagree": unlike}


def _against_others(
    values: NDArray[np.str_], value: str, votes: Mapping[int, Sequence[tuple[int, bool]]]
) -> float | None:
    against = total = 0
    for each in votes.values():
        others = [first for place, first in each if values[place] != value]
        for place, first in each:
            if values[place] == value and others:
                total += 1
                against += others.count(first) < others.count(not first)
    return against / total if total else None


def _contradictory(pairs: Sequence[Pair], prompts: NDArray[np.uint64]) -> int:
    """Pairs whose answers also stand the other way round."""
    sides = [
        (int(prompt), _text(pair.record.chosen), _text(pair.record.rejected))
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    there = set(sides)
    return sum((prompt, rejected, chosen) in there for prompt, chosen, rejected in sides)


def _longer_chosen(pairs: Sequence[Pair], among: NDArray[np.bool_]) -> float | None:
    """Share of pairs whose longer answer, in characters, is the chosen one; ``None`` without a pair of unequal ones."""
    lengths = [
        (len(_text(pair.record.chosen)), len(_text(pair.record.rejected)))
        for pair, counts in zip(pairs, among, strict=True)
        if counts
    ]
    unequal = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    return sum(unequal) / len(unequal) if unequal else None


def _lines(rows: Sequence[Any] | Iterator[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=json_cell) + "\n" for row in rows)


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _task(progress: Progress, description: str, total: int) -> Callable[[int], None]:
    task = progress.add_task(description, total=total)
    return lambda count: progress.advance(task, count)
