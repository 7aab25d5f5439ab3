"""Preference pairs, from the sources of a recipe to tokens: checked, tokenised, split by prompt, mixed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf.core.errors import DataError
from rlhf.core.files import digest
from rlhf.data.batching import Item, Row
from rlhf.data.options import DataConfig, SourceConfig
from rlhf.data.report import (
    QUARANTINE,
    DataReport,
    LeftOut,
    SourceReport,
    refuse_bad_sources,
    write_quarantine,
)
from rlhf.data.sources import Source, open_source, row_names
from rlhf.data.store import PAIR
from rlhf.data.templates import ChatFormat, chat_format
from rlhf.data.tokenising import TokenisedSource, Tokenising, tokenise_source

_SAMPLE_TRAIN, _SAMPLE_EVAL, _FLIP, _MIX = range(4)  # each purpose has random numbers of its own


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair; both rows are prompt and response, and end with an end token."""

    row_id: str
    prompt_key: int
    chosen: np.ndarray  # (Lc,) int32
    rejected: np.ndarray  # (Lr,) int32
    chosen_response_start: int
    rejected_response_start: int
    margin: float | None
    chosen_score: float | None
    rejected_score: float | None


class PreferenceDataset:
    """N tokenised pairs in a fixed order; the tokens stay on disk.

    Attributes:
        lengths: ``(N, 2)`` int32, tokens of the chosen and of the rejected row.
        prompt_keys: ``(N,)`` uint64; equal for equal prompts.
        margins: ``(N,)`` float64, the data's own margins, nan where there is none.
        scores: ``(N, 2)`` float64, of chosen and rejected, nan where there are none.
        flipped: ``(N,)`` bool, True where the answers have been swapped on purpose.
        source_index: ``(N,)`` int32, into ``source_names``.
        fingerprint: a name for the tokens, their order and the flips.
    """

    def __init__(
        self,
        parts: Sequence[TokenisedSource],
        entries: np.ndarray,
        flipped: np.ndarray,
        names: Mapping[str, str],
    ) -> None:
        """``entries`` is ``(N, 2)``: which part, and which of its pairs; ``names``: short names of files."""
        self._parts = tuple(parts)
        self._names = names
        self._pairs = np.empty(len(entries), PAIR)
        for number, part in enumerate(parts):
            here = entries[:, 0] == number
            self._pairs[here] = part.store.pairs[entries[here, 1]]
        self.flipped = flipped
        self.source_index = entries[:, 0].astype(np.int32)
        self.source_names = tuple(part.source.name for part in parts)
        lengths = self._pairs["length"]
        self.lengths = np.where(flipped[:, None], lengths[:, ::-1], lengths)
        self.prompt_keys = self._pairs["prompt_key"]
        self.margins = self._pairs["number"][:, 0]
        self.scores = self._pairs["number"][:, 1:]
        contents = (part.store.content for part in parts)
        self.fingerprint = digest(*contents, entries.astype("<i8").tobytes(), flipped.tobytes())

    def __len__(self) -> int:
        return len(self._pairs)

    def source(self, index: int) -> str:
        return self.source_names[self.source_index[index]]

    def row_id(self, index: int) -> str:
        """File and line, such as pairs.jsonl:12."""
        pair = self._pairs[index]
        file = self._parts[self.source_index[index]].source.files[pair["file"]]
        return f"{self._names[file]}:{pair['line']}"

    def item(self, index: int) -> Item:
        pair = self.pair(index)
        sides = ((pair.chosen, pair.chosen_response_start), (pair.rejected, pair.rejected_response_start))
        gap = None if pair.chosen_score is None else pair.chosen_score - pair.rejected_score
        rows = tuple(Row(tokens, np.arange(len(tokens)) >= start) for tokens, start in sides)
        return Item(pair.row_id, rows, margin=pair.margin, score_gap=gap)

    def pair(self, index: int) -> TokenizedPair:
        pair = self._pairs[index]
        sides = self._parts[self.source_index[index]].store.sides(pair)
        chosen, rejected = sides[::-1] if self.flipped[index] else sides
        margin, *scores = (None if np.isnan(number) else float(number) for number in pair["number"])
        return TokenizedPair(
            self.row_id(index),
            int(pair["prompt_key"]),
            chosen[0],
            rejected[0],
            chosen[1],
            rejected[1],
            margin,
            *scores,
        )


@dataclass(frozen=True)
class LoadedPreferences:
    """What a run trains on, what it is measured on, and how these came about."""

    train: PreferenceDataset
    evals: PreferenceDataset
    report: DataReport


def load_preferences(
    config: DataConfig, tokenizer: Any, *, run_folder: Path | None = None, cache_dir: Path | None = None
) -> LoadedPreferences:
    """Read, check, tokenise (or take from the cache), split and mix the sources of ``config``.

    Every process that calls this with the same arguments gets the same data; the first one fills the cache.

    Args:
        config: the data section of a recipe.
        tokenizer: of the model that is to read the pairs.
        run_folder: where ``quarantine.jsonl`` goes; ``None`` writes none.
        cache_dir: where to keep tokens if ``config.cache_dir`` is unset; by default the user's cache folder.
    Raises:
        DataError: if a source cannot be read, or too many of its rows are bad.
        ModelError: if the tokenizer cannot be used.
    """
    chat = chat_format(tokenizer, config.template)
    folder = (config.cache_dir or cache_dir or default_cache_dir()).expanduser()
    opened = _open_all(config)
    names = row_names([file for _, _, source in opened for file in source.files])
    parts: list[TokenisedSource] = []
    reports: list[SourceReport] = []
    for role, entry, source in opened:
        parts.append(tokenise_source(source, Tokenising.of(config, entry.columns, chat), folder))
        reports.append(_source_report(role, entry, parts[-1], names))
    quarantine = run_folder / QUARANTINE if run_folder else None
    if quarantine:
        write_quarantine(quarantine, reports)
    refuse_bad_sources(reports, config.quarantine_max_share, quarantine)
    report = DataReport(
        template=chat.origin,
        sources=reports,
        quarantine=str(quarantine) if quarantine else None,
        notes=[*_notes(chat), *(part.note for part in parts if part.note), f"tokens are kept in {folder}"],
    )
    return _assemble(config, parts, names, report)


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "margin-rlhf" / "tokens"


# ------------------------------------------------------------------------------------------------- reading


def _open_all(config: DataConfig) -> list[tuple[Literal["train", "eval"], SourceConfig, Source]]:
    opened, faults = [], []
    for role, entries in (("train", config.train_sources), ("eval", config.eval_sources)):
        for entry in entries:
            try:
                opened.append((role, entry, open_source(entry)))
            except DataError as error:
                faults.append(f"data.{role}: {error}")
    if faults:
        raise DataError("\n".join(faults))
    return opened


def _source_report(
    role: Literal["train", "eval"], entry: SourceConfig, part: TokenisedSource, names: dict[str, str]
) -> SourceReport:
    left_out = []
    for row in part.store.bad:
        file = part.source.files[row.file]
        row_id = f"{names[file]}:{row.line}"
        left_out.append(
            LeftOut(file=file, line=row.line, row_id=row_id, reason=row.reason, detail=row.detail)
        )
    counts = part.store.counts
    return SourceReport(
        role=role,
        name=part.source.name,
        weight=entry.weight,
        rows=counts.rows,
        pairs=len(part.store.pairs),
        shapes=dict(counts.shapes),
        truncated=counts.truncated,
        cached=part.cached,
        left_out=left_out,
    )


def _notes(chat: ChatFormat) -> list[str]:
    if "strftime_now" in chat.template:
        return ["the template writes today's date into prompts; cached tokens keep the day they were made"]
    return []


# -------------------------------------------------------------------------------------- splitting and mixing


def _assemble(
    config: DataConfig, parts: list[TokenisedSource], names: Mapping[str, str], report: DataReport
) -> LoadedPreferences:
    """Whatever is drawn at random here depends on ``config.seed`` and the data alone."""
    train_parts = parts[: len(config.train_sources)]
    eval_parts = parts[len(train_parts) :] or train_parts
    train, evals = _all_entries(train_parts), _all_entries(eval_parts)
    if not config.eval_sources:
        keys = _prompt_keys(train_parts, train)
        held_out = _held_out(keys, config)
        train, evals = train[~held_out], train[held_out]
        report.held_out_prompts = len(np.unique(keys[held_out]))
    train = _weighted(train, config)
    train = _sampled(train, config.max_train_pairs, (config.seed, _SAMPLE_TRAIN))
    evals = _sampled(evals, config.max_eval_pairs, (config.seed, _SAMPLE_EVAL))
    if not len(train):
        raise DataError("no training pair is left: see data.eval_share, data.max_train_pairs and the weights")
    train_set = PreferenceDataset(train_parts, train, _flips(train, config), names)
    eval_set = PreferenceDataset(eval_parts, evals, np.zeros(len(evals), bool), names)
    report.train_pairs, report.eval_pairs = len(train_set), len(eval_set)
    report.flipped = int(train_set.flipped.sum())
    report.shared_prompts = len(np.intersect1d(train_set.prompt_keys, eval_set.prompt_keys))
    quantiles = np.percentile(train_set.lengths, [50, 95, 99, 100], method="higher")
    report.row_tokens = dict(zip(("median", "95 %", "99 %", "longest"), map(int, quantiles), strict=True))
    return LoadedPreferences(train_set, eval_set, report)


def _all_entries(parts: Sequence[TokenisedSource]) -> np.ndarray:
    counts = [len(part.store.pairs) for part in parts]
    blocks = [np.stack([np.full(count, part), np.arange(count)], axis=1) for part, count in enumerate(counts)]
    return np.concatenate(blocks)


def _prompt_keys(parts: Sequence[TokenisedSource], entries: np.ndarray) -> np.ndarray:
    keys = np.empty(len(entries), np.uint64)
    for number, part in enumerate(parts):
        here = entries[:, 0] == number
        keys[here] = part.store.pairs["prompt_key"][entries[here, 1]]
    return keys


def _held_out(keys: np.ndarray, config: DataConfig) -> np.ndarray:
    """Which pairs to hold out: all pairs of the prompts that come first in a seeded hash order.

    The order of two prompts does not depend on the others, so more data of the same kind moves few prompts.
    """
    target = config.eval_share * len(keys)
    if config.max_eval_pairs is not None:
        target = min(target, config.max_eval_pairs)
    if target == 0:
        return np.zeros(len(keys), bool)
    prompts, prompt_of, counts = np.unique(keys, return_inverse=True, return_counts=True)
    if len(prompts) < 2:
        raise DataError("all training pairs share one prompt: set data.eval, or data.eval_share=0")
    order = np.argsort(_mixed(prompts, config.seed), kind="stable")
    enough = int(np.searchsorted(np.cumsum(counts[order]), target)) + 1
    chosen = np.zeros(len(prompts), bool)
    chosen[order[: min(enough, len(prompts) - 1)]] = True
    return chosen[prompt_of]


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """A seeded hash of 64-bit keys (the finaliser of splitmix64)."""
    z = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _weighted(entries: np.ndarray, config: DataConfig) -> np.ndarray:
    """Each source's pairs as often as its weight says; the fraction is a seeded sample of them."""
    blocks = []
    for number, source in enumerate(config.train_sources):
        own = entries[entries[:, 0] == number]
        whole = int(source.weight)
        extra = round((source.weight - whole) * len(own))
        blocks += [own] * whole + [_sampled(own, extra, (config.seed, _MIX, number))]
    return np.concatenate(blocks)


def _sampled(entries: np.ndarray, count: int | None, seed: tuple[int, ...]) -> np.ndarray:
    """``count`` of the entries, in their order; with one seed, a smaller sample is part of a larger one."""
    if count is None or count >= len(entries):
        return entries
    return entries[np.sort(np.random.default_rng(seed).permutation(len(entries))[:count])]


def _flips(entries: np.ndarray, config: DataConfig) -> np.ndarray:
    """Which entries to flip: a share of the distinct pairs, so that repeats of a pair agree."""
    distinct, entry_of = np.unique(entries, axis=0, return_inverse=True)
    flipped = np.zeros(len(distinct), bool)
    order = np.random.default_rng((config.seed, _FLIP)).permutation(len(distinct))
    flipped[order[: round(config.flip_labels * len(distinct))]] = True
    return flipped[entry_of.reshape(-1)]
