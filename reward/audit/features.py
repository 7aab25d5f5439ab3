"""What a frozen backbone knows of every answer: the state at its last token, kept on disk."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.core.errors import DataError
from rlhf.core.files import digest, write_array
from rlhf.core.masking import last_token_index, length_mask
from rlhf.data.batching import batches_by_length
from rlhf.data.templates import ChatFormat
from rlhf.models.backbones import load_classifier, load_model_config, weights_digest
from rlhf.models.hidden_states import backbone_of
from rlhf.models.options import BackboneConfig

BLOCK_ROWS = 128
"""Rows of a file of the cache: what a killed run loses at most."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How features are made. All of it, and nothing else, decides on them, given the tokens."""

    model: BackboneConfig
    """The backbone, cut to the layer that is read."""
    dtype: torch.dtype
    """Type of the weights and of what is computed."""

    @functools.cached_property
    def name(self) -> str:
        """A name for all of it."""
        return digest(weights_digest(self.model), str(self.dtype))


def default_layer(model: BackboneConfig) -> int:
    """Two fifths of the model's layers, where small backbones tell good answers from bad ones best."""
    return max(1, round(0.4 * load_model_config(model).num_hidden_layers))


def features_of(
    rows: Sequence[np.ndarray],
    extraction: Extraction,
    chat: ChatFormat,
    *,
    cache: Path,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """``(R, D)`` float32 states of the last layer at the last token of R token rows.

    Args:
        rows, extraction, chat, cache, batch_tokens, advance: see :func:`make_features`, which makes what is missing.
    Raises:
        DataError: if features are not finite.
        ModelError: if the model cannot be loaded.
    """
    make_features(rows, extraction, chat, cache=cache, batch_tokens=batch_tokens, advance=advance)
    blocks, places = _blocks(rows, cache / extraction.name)
    return np.concatenate([np.load(block.path) for block in blocks])[places]


def make_features(
    rows: Sequence[np.ndarray],
    extraction: Extraction,
    chat: ChatFormat,
    *,
    cache: Path,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Put the states that :func:`features_of` gives into the cache; equal rows are computed once.

    Args:
        rows: tokens of each row, at least one.
        extraction: of what model.
        chat: its tokenizer.
        cache: folder; blocks of rows that it holds are not computed again, also after a stop.
        batch_tokens: padded tokens at once.
        advance: told how many more rows are done.
        part: which of how many parts of the blocks, where several processes share the work.
    Raises:
        DataError: if features are not finite.
        ModelError: if the model cannot be loaded.
    """
    number, parts = part
    model: PreTrainedModel | None = None
    for block in _blocks(rows, cache / extraction.name)[0][number::parts]:
        if not block.path.is_file():
            model = model or _load(extraction, chat)
            states = _states(model, block.rows, batch_tokens)
            if not np.isfinite(states).all():
                raise DataError(
                    f"{extraction.model.path}: the states after layer {extraction.model.layers} are not finite for "
                    "some answers; take another --layer, or --dtype float32"
                )
            write_array(block.path, states)
        advance(block.count)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Different rows that are one file of the cache."""

    rows: Sequence[np.ndarray]
    count: int
    """How many rows these are where equal ones count, too."""
    path: Path


def _blocks(rows: Sequence[np.ndarray], folder: Path) -> tuple[list[_Block], np.ndarray]:
    """The different rows in blocks, by first appearance; and the ``(R,)`` place of each row among them."""
    numbers: dict[bytes, int] = {}
    places = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows])
    firsts = [rows[place] for place in np.unique(places, return_index=True)[1]]
    counts = np.bincount(places)
    found = []
    for start in range(0, len(firsts), BLOCK_ROWS):
        block = firsts[start : start + BLOCK_ROWS]
        path = folder / f"{digest(*(row.tobytes() for row in block))}.npy"
        found.append(_Block(rows=block, count=int(counts[start : start + BLOCK_ROWS].sum()), path=path))
    return found, places


def _load(extraction: Extraction, chat: ChatFormat) -> PreTrainedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_classifier(
        extraction.model,
        dtype=extraction.dtype,
        pad_token_id=chat.tokenizer.pad_token_id,
        vocabulary=len(chat.tokenizer),
    )
    return loaded.model.eval().to(device)


@torch.inference_mode()
def _states(model: PreTrainedModel, rows: Sequence[np.ndarray], batch_tokens: int) -> np.ndarray:
    states: list[np.ndarray] = [np.empty(0)] * len(rows)
    for batch in batches_by_length([len(row) for row in rows], batch_tokens):
        lengths = torch.tensor([len(rows[row]) for row in batch])
        mask = length_mask(lengths, int(lengths.max()))
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        for place, row in enumerate(batch):
            tokens[place, : lengths[place]] = torch.from_numpy(rows[row].astype(np.int64))
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        output = backbone_of(model)(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state
        pooled = output[torch.arange(len(batch)), last_token_index(mask)].float().cpu().numpy()
        for place, row in enumerate(batch):
            states[row] = pooled[place]
    return np.stack(states)
