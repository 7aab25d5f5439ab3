"""Score texts with a published reward model: batched by tokens, in order, resumable."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reward.model import RewardModel, load_reward_model
from rlhf.core.errors import DataError, ModelError
from rlhf.core.masking import length_mask
from rlhf.data.options import ColumnConfig, SourceConfig
from rlhf.data.records import BadRow, to_conversations
from rlhf.data.sources import open_source
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.models.backbones import hide_loading_bars
from rlhf.models.manifest import MANIFEST_NAME, read_manifest
from rlhf.train.chat import load_chat

CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What to score with what."""

    model: Path
    data: str
    output: Path
    columns: ColumnConfig
    batch_tokens: int = 8192
    max_tokens: int | None = None


def score_file(options: ScoreOptions) -> int:
    """Score every row of ``options.data`` and append one JSON line per row to ``options.output``.

    A row with chosen and rejected gives ``chosen_reward`` and ``rejected_reward``, one with a response gives
    ``reward``; a row that cannot be scored gives ``error``. Rows that the output already holds are skipped, so
    a stopped run goes on where it was.

    Returns:
        The number of rows that could not be scored.
    """
    hide_loading_bars()
    source = open_source(SourceConfig(path=options.data))
    model, chat = load_scorer(options.model)
    total = sum(1 for _ in source.rows())
    done = _rows_done(options.output)
    if done > total:
        raise DataError(f"{options.output} holds {done} rows, but {options.data} only {total}: it is of other data")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    faults = 0
    with options.output.open("a", encoding="utf-8") as output, _progress() as progress:
        task = progress.add_task("scoring", total=total, completed=done)
        for rows in _chunks(islice(source.rows(), done, None)):
            lines = _score_rows(model, chat, rows, options)
            output.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            output.flush()
            faults += sum("error" in line for line in lines)
            progress.advance(task, len(rows))
    return faults


def load_scorer(folder: Path) -> tuple[RewardModel, ChatFormat]:
    """A published model with the chat format that it was trained with.

    Raises:
        ModelError: if the folder is no reward model, or tokenizer or template are not those of its manifest.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    model = load_reward_model(folder, dtype=dtype).eval().to(device)
    chat = load_chat(folder)
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        for name, found, trained in (
            ("tokenizer", chat.tokenizer_digest, manifest.tokenizer_digest),
            ("chat template", chat.digest, manifest.template_digest),
        ):
            if found != trained:
                raise ModelError(
                    f"{folder}: the {name} ({found}) is not the one that the model was trained with ({trained}): it "
                    "was changed since, or published by an earlier version; copy the folder or publish the model anew"
                )
    return model, chat


@torch.inference_mode()
def score_tokens(model: RewardModel, rows: Sequence[np.ndarray], *, batch_tokens: int) -> list[float]:
    """Rewards of token rows, in their order; batches hold rows of like length, up to ``batch_tokens`` padded."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    rewards = [0.0] * len(rows)
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // len(rows[order[start]]))
        batch = order[start : start + count]
        start += count
        lengths = torch.tensor([len(rows[row]) for row in batch])
        mask = length_mask(lengths, int(lengths.max()))
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        for place, row in enumerate(batch):
            tokens[place, : lengths[place]] = torch.from_numpy(rows[row].astype(np.int64))
        found = model.score(tokens.to(device), mask.to(device)).tolist()
        for row, value in zip(batch, found, strict=True):
            rewards[row] = value
    return rewards


def _score_rows(model: RewardModel, chat: ChatFormat, rows: list[Any], options: ScoreOptions) -> list[dict]:
    lines: list[dict] = [{"row": row.line} for row in rows]
    tokens: list[np.ndarray] = []
    places: list[tuple[int, str]] = []
    for place, row in enumerate(rows):
        try:
            found = _tokens_of(row, chat, options)
        except (BadRow, TemplateFault) as error:
            lines[place]["error"] = str(error)
            continue
        for name, values in found.items():
            tokens.append(values)
            places.append((place, name))
    for (place, name), reward in zip(
        places, score_tokens(model, tokens, batch_tokens=options.batch_tokens), strict=True
    ):
        lines[place][name] = reward
    return lines


def _tokens_of(row: Any, chat: ChatFormat, options: ScoreOptions) -> dict[str, np.ndarray]:
    if row.fault is not None:
        raise BadRow("unreadable row", row.fault)
    tokens = {}
    for side, (prompt, response) in to_conversations(row.value, options.columns).items():
        ids, _ = chat.encode(prompt, response)
        if options.max_tokens is not None and len(ids) > options.max_tokens:
            raise BadRow("too long", f"{len(ids)} tokens, more than --max-tokens {options.max_tokens}")
        tokens["reward" if side == "response" else f"{side}_reward"] = ids
    return tokens


def _rows_done(output: Path) -> int:
    """Whole lines in ``output``; half a line, left by a killed run, is cut off."""
    if not output.exists():
        return 0
    raw = output.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with output.open("r+b") as handle:
            handle.truncate(len(whole))
    return whole.count(b"\n")


def _chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
