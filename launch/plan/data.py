"""How long the rows of a recipe's data are: counted where the files and the tokenizer are here, else assumed."""

import contextlib
import glob
import io
from pathlib import Path
from typing import Any

import numpy as np

from launch.plan.batches import Lengths, assumed_lengths
from rlhf.core.errors import UserError
from rlhf.data.batching import ItemSource
from rlhf.models.options import BackboneConfig
from rlhf.train.workload import Workload

UNKNOWN_ITEMS_PER_BATCH = 8
"""Steps that are planned when nobody knows how many rows there are."""


def lengths_of(
    workload: Workload, model: BackboneConfig, *, step_items: int, rows: int | None, mean_tokens: float | None
) -> Lengths:
    """Lengths of the rows of a recipe's training data.

    Args:
        workload: of the recipe.
        model: whose tokenizer counts.
        step_items: items of the data in a step.
        rows, mean_tokens: what the command line says, for data that is not here.
    """
    rows_per_item, longest = workload.rows_per_item, workload.rows.max_tokens
    if rows is None and mean_tokens is None:
        counted = _counted(workload, model)
        if counted is not None:
            return counted
    items = rows or UNKNOWN_ITEMS_PER_BATCH * step_items
    if mean_tokens is None:
        values, origin = np.full((items, rows_per_item), longest, np.int64), f"every row at the limit of {longest}"
    else:
        values = assumed_lengths(items, mean_tokens, rows_per_item, longest)
        origin = f"assumed, {mean_tokens:g} tokens a row on average"
    return Lengths(values=values, known_items=rows is not None, origin=origin)


def _counted(workload: Workload, model: BackboneConfig) -> Lengths | None:
    """Lengths from the files, through the run's own cache of tokens; ``None`` if something is missing."""
    sources = workload.rows.train_sources + workload.rows.eval_sources
    if not all(_is_here(source.path) for source in sources):
        return None
    if not (Path(model.path) / "tokenizer_config.json").is_file():
        return None
    with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()):
        return _load(workload, model)
    return None


def _is_here(path: str) -> bool:
    return Path(path).exists() or bool(glob.glob(path, recursive=True))


def _load(workload: Workload, model: BackboneConfig) -> Lengths:
    """Rows and their lengths, read as the stage reads them. Of unpaired rows each side is packed by itself: they are
    counted one by one, as are the rows that rollouts make of prompts."""
    from rlhf.data.examples import load_examples
    from rlhf.data.preferences import load_preferences
    from rlhf.data.prompts import load_prompts
    from rlhf.train.chat import load_chat

    rows: Any = workload.rows
    chat = load_chat(
        model.path, rows.template_choice, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    if workload.kind == "prompts":
        prompts = load_prompts(rows, chat).train
        counts = [[len(prompts.prompt(place).tokens)] for place in range(len(prompts))]
        return Lengths(values=np.array(counts, np.int64), known_items=True, origin="counted")
    train: ItemSource
    if workload.kind == "pairs":
        train = load_preferences(rows, chat, labels=workload.labels).train
    else:
        train = load_examples(rows, chat, kind=workload.kind).train
    here = None if workload.kind == "unpaired" else train
    return Lengths(values=np.asarray(train.lengths, np.int64), known_items=True, origin="counted", rows=here)
