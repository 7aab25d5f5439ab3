"""Prompts, from the sources of a recipe to tokens: checked, tokenized, freed of repeats, split, mixed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.core.files import digest
from rlhf.data.kinds import Prompts
from rlhf.data.loading import load_sources
from rlhf.data.messages import Message
from rlhf.data.options import PromptDataConfig
from rlhf.data.report import DataReport, SourceReport
from rlhf.data.splitting import StoredRows, split
from rlhf.data.store import text_of_numbers
from rlhf.data.templates import ChatFormat
from rlhf.data.tokenizing import TokenizedSource, Tokenizing


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is to answer."""

    row_id: str
    tokens: np.ndarray
    """``(T,)`` int64: the messages in the chat template, up to where the model begins to write. Over length, the
    start is cut here and nowhere else."""
    messages: tuple[Message, ...]
    """The messages of the file, behind the recipe's system prompt where they have none; the last one is the user's."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of its row, for reward functions: ``answer``, ``tests``."""

    @property
    def text(self) -> str:
        """What the user said last."""
        return self.messages[-1]["content"]


class PromptDataset:
    """N prompts in a fixed order; tokens, messages and columns stay on disk.

    Attributes:
        lengths: ``(N, 1)`` int32, tokens of every prompt.
        prompt_keys: ``(N,)`` uint64; equal for equal prompts.
        source_index: ``(N,)`` int32, into ``source_names``.
        fingerprint: a name for the tokens, the messages, the columns, their order, and the tokenizer and template.
    """

    def __init__(self, rows: StoredRows, settings: Tokenizing) -> None:
        """``settings`` are those that the rows were tokenized with."""
        self._rows, self._settings = rows, settings
        self.source_index, self.source_names = rows.source_index, rows.source_names
        self.prompt_keys = rows.records["prompt_key"]
        self.lengths = rows.records["length"][:, :1]
        readers = settings.format.digest, settings.format.tokenizer_digest, json.dumps(settings.system_prompt)
        self.fingerprint = digest(rows.fingerprint(), *readers)

    def __len__(self) -> int:
        return len(self._rows)

    def source(self, index: int) -> str:
        return self.source_names[self.source_index[index]]

    def row_id(self, index: int) -> str:
        """File and line, such as prompts.jsonl:12."""
        return self._rows.row_id(index)

    def prompt(self, index: int) -> Prompt:
        ids, row = self._rows.arrays(index)
        messages, columns = json.loads(text_of_numbers(row))
        shown = tuple(self._settings.with_system_prompt(messages))
        return Prompt(self.row_id(index), ids.astype(np.int64), shown, columns)


@dataclass(frozen=True)
class PromptData:
    """What a run rolls out on, what it is measured on, and how these came about."""

    train: PromptDataset
    evals: PromptDataset
    report: DataReport


def load_prompts(config: PromptDataConfig, chat: ChatFormat, *, run_folder: Path | None = None) -> PromptData:
    """Read, check, tokenize (or take from the cache), split and mix the sources of ``config``.

    Every process that calls this with the same arguments gets the same data; the first one fills the cache.

    Args:
        config: the data section of a recipe.
        chat: tokenizer and template of the run.
        run_folder: where ``quarantine.jsonl`` goes; ``None`` writes none.
    Raises:
        DataError: if a source cannot be read, too many of its rows are bad, or none is left to train on.
    """
    kind = Prompts()
    sources = load_sources(config, kind, lambda source: config.columns, chat, run_folder=run_folder)
    if config.deduplicate:
        reports = sources.report.sources
        train_reports, eval_reports = reports[: len(sources.train)], reports[len(sources.train) :]
        sources = replace(
            sources,
            train=_without_repeats(sources.train, train_reports),
            evals=_without_repeats(sources.evals, eval_reports),
        )
    parts = split(config, sources, max_train=config.max_train_prompts, max_eval=config.max_eval_prompts)
    settings = Tokenizing.of(config, kind, config.columns, chat)
    train, evals = PromptDataset(parts[0], settings), PromptDataset(parts[1], settings)
    sources.report.describe(train.prompt_keys, evals.prompt_keys, train.lengths)
    return PromptData(train, evals, sources.report)


def _without_repeats(parts: Sequence[TokenizedSource], reports: Sequence[SourceReport]) -> list[TokenizedSource]:
    """The sources with the first row of every prompt; how many others there were goes into the reports."""
    if not parts:
        return []
    keys = np.concatenate([part.store.rows["prompt_key"] for part in parts])
    is_first = np.zeros(len(keys), bool)
    is_first[np.unique(keys, return_index=True)[1]] = True
    ends = np.cumsum([len(part.store.rows) for part in parts])
    kept = []
    for part, report, mask in zip(parts, reports, np.split(is_first, ends[:-1]), strict=True):
        report.items = int(mask.sum())
        report.repeated = len(mask) - report.items
        kept.append(replace(part, store=part.store.only(mask)))
    return kept
