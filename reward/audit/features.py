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
from rlhf.engine.ranks import single_rank
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

    def digest(self) -> str:
        return digest(weights_digest(self.model), str(self.dtype))


def default_layer(model: BackboneConfig) -> int:
    """Two fifths of the model's layers, where small backbones tell good answers from bad ones best."""
    return max(1, round(0.4 * load_model_config(model).num_hidden_layers))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """R token rows whose states are kept in blocks, each a file of the cache; equal rows are computed once.

    Blocks that are there are not computed again, also after a stop.
    """

    rows: Sequence[np.ndarray]
    """Tokens of each row, at least one row."""
    extraction: Extraction
    """The model that is read, and how."""
    chat: ChatFormat
    """Its tokenizer."""
    cache: Path
    """The folder."""
    batch_tokens: int
    """Padded tokens at once."""

    def make(self, advance: Callable[[int], None] = lambda count: None, part: tuple[int, int] = (0, 1)) -> None:
        """Compute the states that are missing.

        Args:
            advance: told how many more rows are done.
            part: which of how many parts of the blocks, where several processes share the work.
        Raises:
            DataError: if states are not finite.
            ModelError: if the model cannot be loaded.
        """
        number, parts = part
        model: PreTrainedModel | None = None
        blocks, _ = self._blocks
        for block in blocks[number::parts]:
            if not block.path.is_file():
                model = model or _load(self.extraction, self.chat)
                states = _states(model, block.rows, self.batch_tokens)
                if not np.isfinite(states).all():
                    source = self.extraction.model
                    raise DataError(
                        f"{source.path}: the states after layer {source.layers} are not finite for "
                        "some answers; take another --layer, or --dtype float32"
                    )
                write_array(block.path, states)
            advance(block.count)

    def states(self, advance: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """``(R, D)`` float32 states of the last layer at the last token of each row; see :meth:`make`."""
        self.make(advance)
        blocks, places = self._blocks
        return np.concatenate([np.load(block.path) for block in blocks])[places]

    @functools.cached_property
    def _blocks(self) -> "tuple[list[_Block], np.ndarray]":
        """The different rows in blocks, by first appearance; and the ``(R,)`` place of each row among them."""
        folder = self.cache / self.extraction.digest()
        numbers: dict[bytes, int] = {}
        places = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in self.rows])
        firsts = [self.rows[place] for place in np.unique(places, return_index=True)[1]]
        counts = np.bincount(places)
        found = []
        for start in range(0, len(firsts), BLOCK_ROWS):
            block = firsts[start : start + BLOCK_ROWS]
            path = folder / f"{digest(*(row.tobytes() for row in block))}.npy"
            found.append(_Block(rows=block, count=int(counts[start : start + BLOCK_ROWS].sum()), path=path))
        return found, places


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Different rows that are one file of the cache."""

    rows: Sequence[np.ndarray]
    count: int
    """How many rows these are where equal ones count, too."""
    path: Path


def _load(extraction: Extraction, chat: ChatFormat) -> PreTrainedModel:
    device = single_rank().device
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
