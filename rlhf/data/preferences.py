"""Preference pairs, from the sources of a recipe to tokens: checked, tokenized, split by prompt, mixed."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.core.errors import DataError
from rlhf.data.batching import Item, Row
from rlhf.data.kinds import Pairs
from rlhf.data.labels import OF_ANOTHER_PAIR
from rlhf.data.loading import load_sources
from rlhf.data.options import AS_GIVEN, DataConfig, LabelsConfig
from rlhf.data.report import DataReport
from rlhf.data.splitting import Draw, StoredRows, split
from rlhf.data.templates import ChatFormat


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
    """N tokenized pairs in a fixed order; the tokens stay on disk.

    Attributes:
        lengths: ``(N, 2)`` int32, tokens of the chosen and of the rejected row.
        prompt_keys: ``(N,)`` uint64; equal for equal prompts.
        margins: ``(N,)`` float64, the data's own margins, nan where there is none.
        given_margins: ``(N,)`` float64, these, or where no pair has one, how far the scores are apart.
        scores: ``(N, 2)`` float64, of chosen and rejected, nan where there are none.
        wrong: ``(N,)`` float64, the probability that the label of the file is wrong, nan where none is given.
        flipped: ``(N,)`` bool, True where the answers have been swapped on purpose.
        source_index: ``(N,)`` int32, into ``source_names``.
        fingerprint: a name for the tokens, their order and the flips.
    """

    def __init__(self, rows: StoredRows, flipped: np.ndarray, wrong: np.ndarray | None = None) -> None:
        self._rows = rows
        self.flipped = flipped
        self.source_index, self.source_names = rows.source_index, rows.source_names
        lengths = rows.records["length"]
        self.lengths = np.where(flipped[:, None], lengths[:, ::-1], lengths)
        self.prompt_keys = rows.records["prompt_key"]
        self.margins = rows.records["number"][:, 0]
        self.scores = rows.records["number"][:, 1:3]
        self.wrong = rows.records["number"][:, 3] if wrong is None else wrong
        gaps = self.scores[:, 0] - self.scores[:, 1]
        self.given_margins = gaps if np.isnan(self.margins).all() else self.margins
        self.fingerprint = rows.fingerprint(flipped)

    def __len__(self) -> int:
        return len(self._rows)

    def audited(self, wrong: np.ndarray, labels: LabelsConfig, report: DataReport) -> "PreferenceDataset":
        """These pairs, treated as ``labels`` says by ``(N,)`` probabilities that their labels are wrong.

        Raises:
            DataError: if nothing is left of them.
        """
        return _audited(self._rows, wrong, labels, report)

    def source(self, index: int) -> str:
        return self.source_names[self.source_index[index]]

    def row_id(self, index: int) -> str:
        """File and line, such as pairs.jsonl:12."""
        return self._rows.row_id(index)

    def item(self, index: int) -> Item:
        pair = self.pair(index)
        sides = ((pair.chosen, pair.chosen_response_start), (pair.rejected, pair.rejected_response_start))
        rows = tuple(Row(tokens, np.arange(len(tokens)) >= start) for tokens, start in sides)
        margin = float(self.given_margins[index])
        return Item(pair.row_id, rows, margin=None if math.isnan(margin) else margin)

    def refuse_missing_margins(self, setting: str = "margin.kind = column") -> None:
        """Refuse data without margins, where ``setting`` of a recipe says that margins are the data's.

        Raises:
            DataError: if the margins of the data are asked for, but some pairs have none.
        """
        missing = np.flatnonzero(np.isnan(self.given_margins))
        if len(missing):
            rows = ", ".join(self.row_id(int(index)) for index in missing[:3])
            raise DataError(
                f"{setting}, but {len(missing)} of {len(self)} training pairs have neither a margin nor, "
                f"where no pair has one, both scores, such as {rows}; name the columns in data.columns.margin or "
                "data.columns.chosen_score and rejected_score, or leave these rows out"
            )

    def pair(self, index: int) -> TokenizedPair:
        record = self._rows.records[index]
        order = slice(None, None, -1) if self.flipped[index] else slice(None)
        chosen, rejected = self._rows.arrays(index)[order]
        chosen_start, rejected_start = record["start"][order].tolist()
        margin, *scores = (None if np.isnan(number) else float(number) for number in record["number"][:3])
        return TokenizedPair(
            self.row_id(index),
            int(record["prompt_key"]),
            chosen,
            rejected,
            chosen_start,
            rejected_start,
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
    config: DataConfig,
    chat: ChatFormat,
    *,
    labels: LabelsConfig = AS_GIVEN,
    run_folder: Path | None = None,
    cache_dir: Path | None = None,
) -> LoadedPreferences:
    """Read, check, tokenize (or take from the cache), split and mix the sources of ``config``.

    Every process that calls this with the same arguments gets the same data; the first one fills the cache.

    Args:
        config: the data section of a recipe.
        chat: tokenizer and template of the run.
        labels: whether the labels of training pairs are believed.
        run_folder: where ``quarantine.jsonl`` goes; ``None`` writes none.
        cache_dir: where to keep tokens if ``config.cache_dir`` is unset; by default the user's cache folder.
    Raises:
        DataError: if a source cannot be read, too many of its rows are bad, or audited labels were not audited.
    """
    sources = load_sources(
        config,
        Pairs(),
        lambda source: source.columns or config.columns,
        chat,
        run_folder=run_folder,
        cache_dir=cache_dir,
    )
    least = config.min_score_gap
    train_rows, eval_rows = split(
        config,
        sources,
        max_train=config.max_train_pairs,
        max_eval=config.max_eval_pairs,
        trainable=None if least is None else lambda rows: _far_apart(rows, least),
    )
    if labels.kind == "audited":
        train = _audited(train_rows, train_rows.records["number"][:, 3], labels, sources.report)
    else:
        train = PreferenceDataset(train_rows, _flips(train_rows.entries, config))
    evals = PreferenceDataset(eval_rows, np.zeros(len(eval_rows), bool))
    sources.report.flipped = int(train.flipped.sum())
    sources.report.describe(train.prompt_keys, evals.prompt_keys, train.lengths)
    return LoadedPreferences(train, evals, sources.report)


def _audited(rows: StoredRows, wrong: np.ndarray, labels: LabelsConfig, report: DataReport) -> PreferenceDataset:
    """The pairs with their labels swapped, or without them, as ``labels`` says; what was done goes into the report.

    ``wrong``: ``(N,)`` probabilities that labels are wrong.
    """
    _refuse(rows, np.isnan(wrong), "no probability of a wrong label: `rlhf data audit` writes it (data.columns.wrong)")
    changed = "changed since their audit (audit_pair is another pair's): audit the data again"
    _refuse(rows, wrong == OF_ANOTHER_PAIR, changed)
    suspected = wrong > labels.above
    report.notes.append(
        f"labels.use={labels.use}: {wrong.mean():.1%} of the training labels are expected to be wrong; "
        f"{int(suspected.sum())} of {len(rows)} with a probability above {labels.above:g}"
    )
    if labels.use == "drop":
        if suspected.all():
            raise DataError(f"labels.use = drop with labels.above = {labels.above:g} leaves no training pairs")
        return PreferenceDataset(rows.only(~suspected), np.zeros(int((~suspected).sum()), bool), wrong[~suspected])
    if labels.use == "weight" and (wrong == 1).all():
        raise DataError("labels.use = weight leaves no training pairs: every label is wrong for sure")
    return PreferenceDataset(rows, suspected & (labels.use == "swap"), wrong)


def _refuse(rows: StoredRows, unfit: np.ndarray, fault: str) -> None:
    places = np.flatnonzero(unfit)
    if len(places):
        shown = ", ".join(rows.row_id(int(place)) for place in places[:3])
        raise DataError(
            f"labels.kind = audited, but {len(places)} of {len(rows)} training pairs, such as {shown}, have {fault}"
        )


def _far_apart(records: np.ndarray, least: float) -> np.ndarray:
    gaps = records["number"][:, 1] - records["number"][:, 2]
    if np.isnan(gaps).any():
        raise DataError(
            f"data.min_score_gap = {least}, but {int(np.isnan(gaps).sum())} training pairs have no scores; name their "
            "columns in data.columns.chosen_score and rejected_score"
        )
    return gaps >= least


def _flips(entries: np.ndarray, config: DataConfig) -> np.ndarray:
    """Which entries to flip: a share of the distinct pairs, so that repeats of a pair agree."""
    distinct, entry_of = np.unique(entries, axis=0, return_inverse=True)
    flipped = np.zeros(len(distinct), bool)
    order = np.random.default_rng((config.seed, Draw.FLIP)).permutation(len(distinct))
    flipped[order[: round(config.flip_labels * len(distinct))]] = True
    return flipped[entry_of.reshape(-1)]
