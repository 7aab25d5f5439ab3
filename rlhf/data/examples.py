"""Single rows, from the sources of a recipe to tokens: conversations to learn from, and answers with a label."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rlhf.core.errors import DataError
from rlhf.data.batching import Item, Row
from rlhf.data.kinds import Examples
from rlhf.data.loading import load_sources
from rlhf.data.options import ExampleDataConfig
from rlhf.data.report import DataReport
from rlhf.data.splitting import Draw, StoredRows, seeded_hash, split
from rlhf.data.templates import ChatFormat, Turns
from rlhf.data.tokenizing import cut_left


class MismatchedRows:
    """Mismatched rows: every prompt with the response of another row, mostly one to another prompt.

    KTO estimates by them how far the policy has moved from the reference (arXiv:2402.01306).

    Attributes:
        partners: ``(N,)`` the row that brings the response.
        lengths: ``(N,)`` int32, tokens.
    """

    def __init__(self, rows: StoredRows, *, seed: int, max_tokens: int, bos: int | None) -> None:
        """Prompts are cut on the left where needed; ``bos`` stays."""
        self.partners = partners(rows.records["prompt_key"], seed)
        starts = rows.records["start"]
        responses = rows.records["length"][:, 0] - starts
        self.lengths = np.minimum(starts + responses[self.partners], max_tokens).astype(np.int32)
        self._rows, self._bos = rows, bos

    def row(self, index: int) -> Row:
        partner = int(self.partners[index])
        prompt, response = self._split(index)[0], self._split(partner)[1]
        joined = np.concatenate([prompt, response]), np.array([[len(prompt), len(prompt) + len(response)]])
        return _row(cut_left(joined, len(joined[0]) - int(self.lengths[index]), self._bos))

    def _split(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, _ = self._rows.arrays(index)
        start = self._rows.records["start"][index]
        return ids[:start], ids[start:]


class ExampleDataset:
    """N tokenized examples in a fixed order; the tokens stay on disk.

    An item is one row; an answer with a label brings a mismatched row along.

    Attributes:
        lengths: ``(N, 1)`` or, with labels, ``(N, 2)`` int32, tokens of the rows of every item.
        prompt_keys: ``(N,)`` uint64; equal for equal prompts.
        labels: ``(N,)`` bool, True for desirable answers; ``None`` for conversations.
        mismatched: the second rows; ``None`` for conversations.
        source_index: ``(N,)`` int32, into ``source_names``.
        fingerprint: a name for the tokens, their order, and what is paired with what.
    """

    def __init__(self, rows: StoredRows, mismatched: MismatchedRows | None = None) -> None:
        """Read ``rows``; their labels count only where ``mismatched`` rows are given."""
        self._rows = rows
        self.mismatched = mismatched
        self.source_index, self.source_names = rows.source_index, rows.source_names
        self.prompt_keys = rows.records["prompt_key"]
        self.labels = rows.records["label"] if mismatched else None
        lengths = [rows.records["length"][:, 0]] + ([mismatched.lengths] if mismatched else [])
        self.lengths = np.stack(lengths, axis=1)
        pairing = [mismatched.partners.astype("<i8"), mismatched.lengths.astype("<i4")] if mismatched else []
        self.fingerprint = rows.fingerprint(*pairing)

    def __len__(self) -> int:
        return len(self._rows)

    def source(self, index: int) -> str:
        return self.source_names[self.source_index[index]]

    def row_id(self, index: int) -> str:
        """File and line, such as chats.jsonl:12."""
        return self._rows.row_id(index)

    def item(self, index: int) -> Item:
        ids, spans = self._rows.arrays(index)
        row = _row((ids, spans.reshape(-1, 2)))
        if self.mismatched is None or self.labels is None:
            return Item(self.row_id(index), (row,))
        return Item(self.row_id(index), (row, self.mismatched.row(index)), label=bool(self.labels[index]))


@dataclass(frozen=True)
class LoadedExamples:
    """What a run trains on, what it is measured on, and how these came about."""

    train: ExampleDataset
    evals: ExampleDataset
    report: DataReport


def load_examples(
    config: ExampleDataConfig,
    chat: ChatFormat,
    *,
    kind: Literal["conversation", "unpaired"],
    run_folder: Path | None = None,
) -> LoadedExamples:
    """Read, check, tokenize (or take from the cache), split and mix the sources of ``config``.

    Every process that calls this with the same arguments gets the same data; the first one fills the cache.

    Args:
        config: the data section of a recipe.
        chat: tokenizer and template of the run.
        kind: what the rows are: conversations whose assistant turns are learned, or answers with a label.
        run_folder: where ``quarantine.jsonl`` goes; ``None`` writes none.
    Raises:
        DataError: if a source cannot be read, too many of its rows are bad, or too few are left.
    """
    unpaired = kind == "unpaired"
    sources = load_sources(
        config, Examples(labeled=unpaired), lambda source: config.columns, chat, run_folder=run_folder
    )
    parts = split(config, sources, max_train=config.max_train_rows, max_eval=config.max_eval_rows)
    if unpaired:
        _refuse_lone_rows(*parts)
        settings = {"seed": config.seed, "max_tokens": config.max_tokens, "bos": chat.tokenizer.bos_token_id}
        train, evals = (ExampleDataset(rows, MismatchedRows(rows, **settings)) for rows in parts)
        sources.report.notes.extend(_label_notes(train))
    else:
        train, evals = map(ExampleDataset, parts)
    sources.report.describe(train.prompt_keys, evals.prompt_keys, train.lengths[:, 0])
    return LoadedExamples(train, evals, sources.report)


def partners(prompt_keys: np.ndarray, seed: int) -> np.ndarray:
    """Another row for every row, each once, with another prompt for as many of them as possible.

    The rows stand in a circle in a seeded order, those of one prompt side by side; the partner is as many places
    on as the most frequent prompt has rows. So nobody reaches into their own prompt, unless it has more than
    half of all rows.
    """
    count = len(prompt_keys)
    if count == 0:
        return np.zeros(0, np.int64)
    shuffled = np.random.default_rng((seed, Draw.PARTNER)).permutation(count)
    circle = np.lexsort((shuffled, seeded_hash(prompt_keys, seed)))
    most = int(np.unique(prompt_keys, return_counts=True)[1].max())
    chosen = np.empty(count, np.int64)
    chosen[circle] = np.roll(circle, -(most if most < count else 1))
    return chosen


def _row(turns: Turns) -> Row:
    ids, spans = turns
    response = np.zeros(len(ids), bool)
    for begin, end in spans:
        response[begin:end] = True
    return Row(ids, response)


def _refuse_lone_rows(train: StoredRows, evals: StoredRows) -> None:
    for role, rows in (("training", train), ("evaluation", evals)):
        if len(rows) == 1:
            raise DataError(
                f"one {role} row is left, but each needs the answer of another one beside it: give more rows, or "
                "change data.eval_share"
            )


def _label_notes(train: ExampleDataset) -> list[str]:
    assert train.labels is not None and train.mismatched is not None
    notes = [f"{int(train.labels.sum())} of {len(train)} training examples have a desirable answer"]
    same = int((train.prompt_keys == train.prompt_keys[train.mismatched.partners]).sum())
    if same:
        notes.append(f"{same} training examples are mismatched with an answer to their own prompt, for want of others")
    return notes
