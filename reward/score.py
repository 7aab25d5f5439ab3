"""Score texts with a published reward model: batched by tokens, in order, resumable."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reward.model import RewardModel
from reward.saving import load_reward_model
from rlhf.core.errors import DataError, ModelError
from rlhf.core.files import digest, weights_checksum, without_half_line, write_json
from rlhf.core.masking import length_mask
from rlhf.data.batching import batches_by_length
from rlhf.data.messages import BadRow
from rlhf.data.options import ColumnConfig, SourceConfig
from rlhf.data.records import to_conversations
from rlhf.data.rows import RowReader, json_cell
from rlhf.data.sources import Source, open_source, row_names
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.build import has_bfloat16
from rlhf.engine.ranks import single_rank
from rlhf.models.backbones import hide_loading_bars
from rlhf.models.manifest import MANIFEST_NAME, read_manifest
from rlhf.train.chat import load_chat

CHUNK_ROWS = 256
MARGIN = "reward_margin"
"""The column with how much better a reward model finds the chosen answer, in logits; below 0 where it disagrees."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What to score with what."""

    model: Path
    data: str
    output: Path
    columns: ColumnConfig
    batch_tokens: int = 8192
    max_tokens: int | None = None
    split: str | None = None
    keep_rows: bool = False
    """Whether a line holds the row's own columns, too, so that a stage can read it."""


def score_file(options: ScoreOptions) -> int:
    """Score every row of ``options.data`` and append one JSON line per row to ``options.output``.

    Every line names file and row. A row with chosen and rejected gives ``chosen_reward`` and ``rejected_reward`` (lists
    where it has several of them) and, for one of each, :data:`MARGIN`, by how much the first exceeds the second; one
    with a response gives ``reward``; models that know how sure they are give deviations beside them (``reward_sd``);
    a row that cannot be scored gives ``error``. Rows that the output already holds
    are skipped, so a stopped run goes on where it was; what was written by another model, or from other data, is
    refused.

    Returns:
        The number of rows that could not be scored.
    Raises:
        DataError: if the output is of another model, other data or other settings.
        ModelError: if the model is none.
    """
    hide_loading_bars()
    if not (options.model / "config.json").is_file():
        raise ModelError(f"{options.model}: no model folder (no config.json); give the final/ folder of a reward run")
    source = open_source(SourceConfig(path=options.data, split=options.split))
    origin = _origin(source, options)
    done = _rows_done(options.output)
    _refuse_other_origin(options.output, origin, done)
    model, chat = load_scorer(options.model)
    names = row_names(source.files)
    total = sum(1 for _ in source.rows())
    if done > total:
        raise DataError(f"{options.output} holds {done} rows, but {options.data} only {total}: it is of other data")
    write_json(_origin_file(options.output), origin)
    faults = 0
    with options.output.open("a", encoding="utf-8") as output, _progress() as progress:
        task = progress.add_task("scoring", total=total, completed=done)
        for rows in _chunks(islice(source.rows(), done, None)):
            places = [
                (dict(row.value) if options.keep_rows and isinstance(row.value, Mapping) else {})
                | {"file": names[source.files[row.file]], "row": row.line}
                for row in rows
            ]
            lines = _score_rows(model, chat, rows, places, options)
            output.write("".join(json.dumps(line, ensure_ascii=False, default=json_cell) + "\n" for line in lines))
            output.flush()
            faults += sum("error" in line for line in lines)
            progress.advance(task, len(rows))
    return faults


def load_scorer(folder: Path) -> tuple[RewardModel, ChatFormat]:
    """A published model with the chat format that it was trained with.

    Raises:
        ModelError: if the folder is no reward model, or tokenizer or template are not those of its manifest.
    """
    device = single_rank().device
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    chat = check_scorer(folder)
    return load_reward_model(folder, dtype=dtype).eval().to(device), chat


def check_scorer(folder: Path) -> ChatFormat:
    """The chat format of a published model, without the model.

    Raises:
        ModelError: if tokenizer or template are not those of its manifest.
    """
    chat = load_chat(folder)
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        for name, found, trained in (
            ("tokenizer", chat.tokenizer_digest, manifest.tokenizer_digest),
            ("chat template", chat.digest, manifest.template_digest),
        ):
            if found != trained and trained not in chat.former_tokenizer_digests:
                raise ModelError(
                    f"{folder}: the {name} ({found}) is not the one that the model was trained with ({trained}): it "
                    "was changed since, or published by an earlier version; copy the folder or publish the model anew"
                )
    return chat


def score_tokens(model: RewardModel, rows: Sequence[np.ndarray], *, batch_tokens: int) -> list[float]:
    """Rewards of token rows, in their order; batches hold rows of like length, up to ``batch_tokens`` padded."""
    return [reward for reward, _ in judge_tokens(model, rows, batch_tokens=batch_tokens)]


@torch.inference_mode()
def judge_tokens(
    model: RewardModel, rows: Sequence[np.ndarray], *, batch_tokens: int
) -> list[tuple[float, float | None]]:
    """The same with standard deviations of the rewards: over several heads, or as a Bayesian head knows them."""
    device = next(model.parameters()).device
    found: list[tuple[float, float | None]] = [(0.0, None)] * len(rows)
    for batch in batches_by_length([len(row) for row in rows], batch_tokens):
        lengths = torch.tensor([len(rows[row]) for row in batch])
        mask = length_mask(lengths, int(lengths.max()))
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        for place, row in enumerate(batch):
            tokens[place, : lengths[place]] = torch.from_numpy(rows[row].astype(np.int64))
        scores = model.score_in_full(tokens.to(device), mask.to(device))
        deviations: Sequence[float | None] = [None] * len(batch)
        if scores.variances is not None:
            deviations = scores.variances.sqrt().tolist()
        elif scores.each is not None:
            deviations = scores.each.std(dim=1, correction=0).tolist()
        for row, reward, deviation in zip(batch, scores.rewards.tolist(), deviations, strict=True):
            found[row] = reward, deviation
    return found


def _score_rows(
    model: RewardModel, chat: ChatFormat, rows: list[Any], lines: list[dict[str, Any]], options: ScoreOptions
) -> list[dict[str, Any]]:
    """Add what was found to ``lines``, which say where every row stands."""
    tokens: list[np.ndarray] = []
    places: list[tuple[int, str, int]] = []
    for place, row in enumerate(rows):
        try:
            found = _tokens_of(row, chat, options)
            if options.columns.group is not None:
                lines[place]["group"] = RowReader(row.value, options.columns).word("group")
        except (BadRow, TemplateFault) as error:
            lines[place]["error"] = str(error)
            continue
        for name, answers in found.items():
            tokens += answers
            places.append((place, name, len(answers)))
    found_of = iter(judge_tokens(model, tokens, batch_tokens=options.batch_tokens))
    for place, name, count in places:
        values, deviations = zip(*islice(found_of, count), strict=True)
        lines[place][name if count == 1 else f"{name}s"] = values[0] if count == 1 else list(values)
        if deviations[0] is not None:
            lines[place][f"{name}_sd" if count == 1 else f"{name}_sds"] = (
                deviations[0] if count == 1 else list(deviations)
            )
    for place in {place for place, _, _ in places}:
        chosen, rejected = (lines[place].get(f"{side}_reward") for side in ("chosen", "rejected"))
        if isinstance(chosen, float) and isinstance(rejected, float):
            lines[place][MARGIN] = chosen - rejected
    return lines


def _tokens_of(row: Any, chat: ChatFormat, options: ScoreOptions) -> dict[str, list[np.ndarray]]:
    if row.fault is not None:
        raise BadRow("unreadable row", row.fault)
    tokens: dict[str, list[np.ndarray]] = {}
    for side, answers in to_conversations(row.value, options.columns).items():
        name = "reward" if side == "response" else f"{side}_reward"
        for prompt, response in answers:
            ids, _ = chat.encode(prompt, response)
            if options.max_tokens is not None and len(ids) > options.max_tokens:
                raise BadRow("too long", f"{len(ids)} tokens, more than --max-tokens {options.max_tokens}")
            tokens.setdefault(name, []).append(ids)
    return tokens


def _origin(source: Source, options: ScoreOptions) -> dict[str, str]:
    """What decides on the scores, by names to compare."""
    columns = json.dumps(asdict(options.columns), sort_keys=True)
    return {
        "model": _model_digest(options.model),
        "data": source.digest(),
        "settings": digest(columns, str(options.max_tokens), *(["rows"] if options.keep_rows else [])),
    }


def _model_digest(folder: Path) -> str:
    """A name for a model by what is in its folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return digest(*(part for path in files for part in (path.name, weights_checksum(path))))


def _origin_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.origin.json")


def _refuse_other_origin(output: Path, origin: dict[str, str], done: int) -> None:
    """Refuse to go on with rows of another origin.

    Raises:
        DataError: if ``output`` holds rows that came about in another way.
    """
    if not done:
        return
    way_out = "give another --output, or delete it to begin anew"
    path = _origin_file(output)
    if not path.is_file():
        raise DataError(f"{output}: holds {done} rows of unknown origin ({path.name} is not beside it); {way_out}")
    found = json.loads(path.read_text(encoding="utf-8"))
    differ = [name for name, value in origin.items() if found.get(name) != value]
    if differ:
        raise DataError(f"{output}: its {done} rows are of another {' and other '.join(differ)}; {way_out}")


def _rows_done(output: Path) -> int:
    """Whole lines in ``output``."""
    return without_half_line(output).count(b"\n") if output.exists() else 0


def _chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
