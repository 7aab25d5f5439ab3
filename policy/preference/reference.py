"""Reference log-probabilities: from a cache on disk that all ranks fill together, or from a live model.

A cache is a folder with ``header.json`` (what the numbers belong to) and one ``shard-*.npy`` for every few
hundred items: ``(n, S, 2)`` float32, of each row the summed log-probability up to the length of the item's
shortest response, and of the rest. Shards are renamed into place, so a killed run goes on with the next one.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from policy.model import policy_of
from policy.preference.columns import RowSums, row_sums
from rlhf.core.errors import CheckpointError, ConfigError
from rlhf.core.files import digest, write_array, write_json
from rlhf.data.batching import Batch, ItemSource
from rlhf.engine.frozen import Frozen, move_towards
from rlhf.engine.portions import Portions
from rlhf.engine.stop import StopRequests
from rlhf.train.batches import BatchMaker, without_gradient
from rlhf.train.progress import Progress

HEADER = "header.json"
TOLERANCE_PER_TOKEN = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""How far a log-probability computed again may be from the cached one: kernels and padding differ."""


class Reference(Protocol):
    """Where the reference's log-probabilities of a batch come from."""

    def of(self, batch: Batch) -> RowSums:
        """Log-probabilities of the rows of ``batch``, without gradient. All ranks must call it alike."""


@dataclass(frozen=True)
class CachedReference:
    """Numbers from disk; see :func:`open_cache`."""

    values: np.ndarray
    """``(N, S, 2)`` float32."""

    def of(self, batch: Batch) -> RowSums:
        head, tail = torch.from_numpy(self.values[batch.indices.cpu().numpy()]).to(batch.indices.device).unbind(dim=2)
        return RowSums(head.T, tail.T)


@dataclass(frozen=True)
class LiveReference:
    """A model that is asked in every step; with LoRA, the trained one with its adapter off."""

    model: Frozen
    adapters_off: bool = False
    moves: bool = False
    """Whether the model is moved towards the policy during the run (TR-DPO, arXiv:2404.09656)."""

    def follow(self, policy: Frozen, share: float) -> None:
        """Every rank must call it."""
        move_towards(self.model, policy, share)

    def save(self, folder: Path) -> None:
        """Write the weights, of which each rank has a part. Every rank must call it."""
        Portions(self.model, list(self.model.module.parameters())).save(folder)

    def load(self, folder: Path) -> None:
        """Put back what :meth:`save` wrote. Every rank must call it."""
        portions = Portions(self.model, list(self.model.module.parameters()))
        portions.load(folder)
        portions.put()

    def of(self, batch: Batch) -> RowSums:
        off = policy_of(self.model).without_adapters() if self.adapters_off else contextlib.nullcontext()
        with off:
            ((_, output),) = without_gradient(self.model, [batch])
        return row_sums(output, batch).detach()


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """What to compute, for whom, and where to keep it."""

    data: ItemSource
    batches: BatchMaker
    key: Mapping[str, Any]
    """All that decides on the numbers; the header of the cache."""
    shard_items: int
    verify_items: int
    precision: str
    stop: StopRequests | None = None
    """Asked between shards: what is computed by then is found by the next start."""


def cache_folder(root: Path, key: Mapping[str, Any]) -> Path:
    """Where the cache of this content is kept under ``root``."""
    return root / digest(json.dumps(key, sort_keys=True))


def open_cache(folder: Path, job: CacheJob, ask: Callable[[], Frozen]) -> CachedReference:
    """The cache of ``job``, filled and verified. Every rank must call it.

    Args:
        folder: of the cache, visible to all nodes.
        job: what it must hold.
        ask: gives the reference model; called only if there is something to compute.
    Raises:
        ConfigError: if ``folder`` holds the cache of other data or of another model.
        CheckpointError: if its numbers cannot be reproduced.
        RunStopped: if the run was asked to stop between two shards.
    """
    ranks = job.batches.ranks
    shard_items = ranks.on_main(lambda: _claim(folder, job))
    shards = _Shards(folder, len(job.data), shard_items, job.data.lengths.shape[1])
    values = ranks.together(shards.read)
    missing = ranks.on_main(lambda: shards.missing(values))
    sample = np.unique(np.linspace(0, len(job.data) - 1, job.verify_items).astype(int))
    sample = np.array([index for index in sample if index // shard_items not in missing], dtype=int)
    if missing or len(sample):
        model = ask()
        if len(sample):
            _verify(folder, sample, values, job, model)
        if missing:
            _fill(shards, missing, job, model)
            values = ranks.together(shards.read)
    ranks.together(lambda: _check_complete(folder, values))
    return CachedReference(values)


def _claim(folder: Path, job: CacheJob) -> int:
    """Create the folder or check that it is the right one; the items of a shard."""
    header = {"key": dict(job.key), "items": len(job.data), "shard_items": job.shard_items}
    path = folder / HEADER
    if not path.exists():
        write_json(path, header)
        return job.shard_items
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        key, items, shard_items = found["key"], found["items"], int(found["shard_items"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not the header of a reference cache ({error}); remove the folder") from error
    wanted = json.loads(json.dumps(header["key"]))
    differing = [name for name in sorted({*key, *wanted}) if key.get(name) != wanted.get(name)]
    if differing or items != len(job.data):
        lines = "".join(f"\n  {name}: {key.get(name)} in the cache, {wanted.get(name)} now" for name in differing)
        raise ConfigError(
            f"reference.cache = {folder} was made for something else:{lines or f' {items} items, not {len(job.data)}'}"
            "\nleave reference.cache out (a cache is then found by its content), or name another folder"
        )
    return shard_items


class _Shards:
    """The files of a cache."""

    def __init__(self, folder: Path, items: int, shard_items: int, rows_per_item: int) -> None:
        self._folder, self._items, self._size, self._rows = folder, items, shard_items, rows_per_item

    def span(self, number: int) -> tuple[int, int]:
        return number * self._size, min((number + 1) * self._size, self._items)

    def missing(self, values: np.ndarray) -> list[int]:
        """Shards that :meth:`read` found absent or damaged."""
        return [number for number in self._numbers if np.isnan(values[slice(*self.span(number))]).any()]

    def write(self, number: int, values: np.ndarray) -> None:
        write_array(self._path(number), values)

    def read(self) -> np.ndarray:
        """``(N, S, 2)``, not a number where a shard is absent or damaged."""
        values = np.full((self._items, self._rows, 2), np.nan, np.float32)
        for number in self._numbers:
            part = self._load(number)
            if part is not None:
                values[slice(*self.span(number))] = part
        return values

    @property
    def _numbers(self) -> range:
        return range(-(-self._items // self._size))

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:06d}.npy"

    def _load(self, number: int) -> np.ndarray | None:
        begin, end = self.span(number)
        try:
            values = np.load(self._path(number))
        except (OSError, ValueError, EOFError):
            return None
        usable = values.shape == (end - begin, self._rows, 2) and bool(np.isfinite(values).all())
        return values if usable else None


def _fill(shards: _Shards, missing: list[int], job: CacheJob, model: Frozen) -> None:
    ranks, total = model.ranks, len(job.data)
    done = total - sum(end - begin for begin, end in map(shards.span, missing))
    if ranks.is_main:
        found = f", {done} found" if done else ""
        print(f"reference log-probabilities of {total} items{found}", flush=True)
    with Progress(ranks, total, done, "item") as progress:
        for number in missing:
            if job.stop is not None:
                job.stop.check(f"after {done} of {total} reference log-probabilities")
            begin, end = shards.span(number)
            values = _compute(np.arange(begin, end), job, model)
            ranks.on_main(partial(shards.write, number, values))
            done += end - begin
            progress.advance(done, {})


def _compute(indices: np.ndarray, job: CacheJob, model: Frozen) -> np.ndarray:
    """``(n, S, 2)`` on every rank."""
    found = np.full((len(indices), job.data.lengths.shape[1], 2), np.nan, np.float32)
    for start, batches in job.batches.chunks(job.data, indices):
        for positions, values in _gathered(batches, model):
            found[start + positions] = values
    _check_finite(found, indices, job.data)
    return found


def _gathered(batches: list[Batch], model: Frozen) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch, output in without_gradient(model, batches):
        sums = row_sums(output, batch)
        mine = torch.stack([sums.head.T, sums.tail.T], dim=2).float()
        positions = model.ranks.gather_rows(batch.positions)
        yield positions.cpu().numpy(), model.ranks.gather_rows(mine).cpu().numpy()


def _check_complete(folder: Path, values: np.ndarray) -> None:
    if np.isnan(values).any():
        raise CheckpointError(f"{folder}: the cache is incomplete on this host; is the folder shared?")


def _check_finite(values: np.ndarray, indices: np.ndarray, data: ItemSource) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))
    if len(bad):
        rows = ", ".join(data.item(int(indices[place])).row_id for place in bad[:5])
        raise CheckpointError(
            f"the reference gives log-probabilities that are not finite for {len(bad)} items, such as {rows}; "
            "try engine.precision=float32 or bfloat16, and look at these rows"
        )


def _verify(folder: Path, indices: np.ndarray, values: np.ndarray, job: CacheJob, model: Frozen) -> None:
    again = _compute(indices, job, model).sum(axis=2)
    tokens = job.data.lengths[indices]
    error = np.abs(again - values[indices].sum(axis=2)) / tokens
    limit = TOLERANCE_PER_TOKEN[job.precision]
    if float(error.max()) > limit:
        raise CheckpointError(
            f"{folder}: cached reference log-probabilities are off by up to {error.max():.2g} nats per token (limit "
            f"{limit}) when computed again; another model or machine wrote them. Remove the folder to make it anew"
        )
