"""What is trained on and what is held out: split by prompt, mixed by weight, sampled.

Whatever is drawn at random depends on ``data.seed`` and the data alone.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum

import numpy as np

from rlhf.core.errors import DataError
from rlhf.core.files import digest
from rlhf.data.loading import LoadedSources
from rlhf.data.options import RowsConfig, RowSource
from rlhf.data.report import HIDDEN_QUESTION
from rlhf.data.tokenizing import TokenizedSource


class Draw(IntEnum):
    """Purposes of random numbers; each has numbers of its own."""

    SAMPLE_TRAIN = 0
    SAMPLE_EVAL = 1
    FLIP = 2
    MIX = 3
    PARTNER = 4


class StoredRows:
    """N tokenized rows of several sources in a fixed order; the tokens stay on disk.

    Attributes:
        entries: ``(N, 2)``: which source, and which of its rows.
        records: ``(N,)`` records, of the kind that the stores hold.
        source_index: ``(N,)`` int32, into ``source_names``.
    """

    def __init__(self, parts: Sequence[TokenizedSource], entries: np.ndarray, names: Mapping[str, str]) -> None:
        """``names``: short names of files."""
        self.entries = entries
        self.records = np.empty(len(entries), parts[0].store.rows.dtype)
        for number, part in enumerate(parts):
            here = entries[:, 0] == number
            self.records[here] = part.store.rows[entries[here, 1]]
        self.source_index = entries[:, 0].astype(np.int32)
        self.source_names = tuple(part.source.name for part in parts)
        self._parts = tuple(parts)
        self._names = names

    def __len__(self) -> int:
        return len(self.records)

    def only(self, kept: np.ndarray) -> "StoredRows":
        """The rows of a ``(N,)`` mask."""
        fewer = copy.copy(self)
        fewer.entries, fewer.records, fewer.source_index = (
            values[kept] for values in (self.entries, self.records, self.source_index)
        )
        return fewer

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The two arrays that the store has of a row."""
        return self._parts[self.source_index[index]].store.arrays(self.records[index])

    def row_id(self, index: int) -> str:
        """File and line, such as pairs.jsonl:12."""
        row = self.records[index]
        file = self._parts[self.source_index[index]].source.files[row["file"]]
        return f"{self._names[file]}:{row['line']}"

    def fingerprint(self, *more: np.ndarray) -> str:
        """A name for the tokens, their order, and whatever else decides on what the rows are used as."""
        contents = (part.store.content for part in self._parts)
        return digest(*contents, self.entries.astype("<i8").tobytes(), *(array.tobytes() for array in more))


def split(
    config: RowsConfig,
    sources: LoadedSources,
    *,
    max_train: int | None,
    max_eval: int | None,
    trainable: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[StoredRows, StoredRows]:
    """The rows to train on, and those to evaluate on; what was held out goes into the report.

    Args:
        config: the data section of a recipe.
        sources: what it names.
        max_train: rows to train on, at most.
        max_eval: rows to evaluate on, at most.
        trainable: from records to a mask of those to train on; ``None`` for all. Nothing else is held out for it.
    Raises:
        DataError: if nothing is left to train on.
    """
    unit = sources.report.unit
    eval_parts = sources.evals or sources.train
    train, evals = _all_entries(sources.train), _all_entries(eval_parts)
    if not sources.evals:
        keys = _prompt_keys(sources.train, train)
        target = min(config.eval_share * len(keys), len(keys) if max_eval is None else max_eval)
        held_out = _held_out(keys, target, config.seed, unit)
        train, evals = train[~held_out], train[held_out]
        sources.report.held_out_prompts = len(np.unique(keys[held_out]))
    if trainable is not None:
        kept = trainable(StoredRows(sources.train, train, sources.names).records)
        sources.report.not_wanted = int((~kept).sum())
        train = train[kept]
    train = _weighted(train, config.train_sources, config.seed)
    train = _sampled(train, max_train, (config.seed, Draw.SAMPLE_TRAIN))
    evals = _sampled(evals, max_eval, (config.seed, Draw.SAMPLE_EVAL))
    if not len(train):
        raise DataError(f"no training {unit} are left: see data.eval_share and the weights of the sources")
    return StoredRows(sources.train, train, sources.names), StoredRows(eval_parts, evals, sources.names)


def seeded_hash(keys: np.ndarray, seed: int) -> np.ndarray:
    """A seeded hash of 64-bit keys (the finalizer of splitmix64)."""
    z = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _all_entries(parts: Sequence[TokenizedSource]) -> np.ndarray:
    counts = [len(part.store.rows) for part in parts]
    blocks = [np.stack([np.full(count, part), np.arange(count)], axis=1) for part, count in enumerate(counts)]
    return np.concatenate(blocks)


def _prompt_keys(parts: Sequence[TokenizedSource], entries: np.ndarray) -> np.ndarray:
    keys = np.empty(len(entries), np.uint64)
    for number, part in enumerate(parts):
        here = entries[:, 0] == number
        keys[here] = part.store.rows["prompt_key"][entries[here, 1]]
    return keys


def _held_out(keys: np.ndarray, target: float, seed: int, unit: str) -> np.ndarray:
    """Which rows to hold out, ``target`` or a few more: all rows of the prompts that come first in a seeded hash order.

    The order of two prompts does not depend on the others, so more data of the same kind moves few prompts.
    """
    if target == 0:
        return np.zeros(len(keys), bool)
    prompts, prompt_of, counts = np.unique(keys, return_inverse=True, return_counts=True)
    if len(prompts) < 2:
        raise DataError(
            f"all training {unit} share one prompt, so that none can be held out; {HIDDEN_QUESTION} If it is right so, "
            "set data.eval, or data.eval_share=0"
        )
    order = np.argsort(seeded_hash(prompts, seed), kind="stable")
    enough = int(np.searchsorted(np.cumsum(counts[order]), target)) + 1
    chosen = np.zeros(len(prompts), bool)
    chosen[order[: min(enough, len(prompts) - 1)]] = True
    return chosen[prompt_of]


def _weighted(entries: np.ndarray, sources: Sequence[RowSource], seed: int) -> np.ndarray:
    """Each source's rows as often as its weight says; the fraction is a seeded sample of them."""
    blocks = []
    for number, source in enumerate(sources):
        own = entries[entries[:, 0] == number]
        whole = int(source.weight)
        extra = round((source.weight - whole) * len(own))
        blocks += [own] * whole + [_sampled(own, extra, (seed, Draw.MIX, number))]
    return np.concatenate(blocks)


def _sampled(entries: np.ndarray, count: int | None, seed: tuple[int, ...]) -> np.ndarray:
    """``count`` of the entries, in their order; with one seed, a smaller sample is part of a larger one."""
    if count is None or count >= len(entries):
        return entries
    return entries[np.sort(np.random.default_rng(seed).permutation(len(entries))[:count])]
