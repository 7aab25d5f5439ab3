"""How long the rows of a recipe's data are: counted where the files and the tokenizer are here, else assumed."""

import contextlib
import glob
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.plan.batches import assumed_lengths
from rlhf.core.errors import UserError

UNKNOWN_ITEMS_PER_BATCH = 8
"""Steps that are planned when nobody knows how many rows there are."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """``(N, S)`` tokens of the rows of each item; of PPO, of the prompts."""

    values: np.ndarray
    known_items: bool
    origin: str


def lengths_of(
    stage: str, config: Any, *, rows: int | None, mean_tokens: float | None, rows_per_item: int, longest: int
) -> Lengths:
    """Of the training data of a recipe.

    Args:
        stage: its name.
        config: the recipe.
        rows, mean_tokens: what the command line says, for data that is not here.
        rows_per_item: 2 for pairs.
        longest: the recipe's limit.
    """
    if rows is None and mean_tokens is None:
        counted = _counted(stage, config)
        if counted is not None:
            return Lengths(values=counted, known_items=True, origin="counted")
    batch = config.rollout.prompts if stage == "ppo" else config.train.global_batch_size
    items = rows or UNKNOWN_ITEMS_PER_BATCH * batch
    if mean_tokens is None:
        values = np.full((items, rows_per_item), longest, np.int64)
        return Lengths(values=values, known_items=rows is not None, origin=f"every row at the limit of {longest}")
    values = assumed_lengths(items, mean_tokens, rows_per_item, longest)
    origin = f"assumed, {mean_tokens:g} tokens a row on average"
    return Lengths(values=values, known_items=rows is not None, origin=origin)


def _counted(stage: str, config: Any) -> np.ndarray | None:
    """Lengths from the files, through the run's own cache of tokens; ``None`` if something is missing."""
    section = config.rows if stage == "preference" else config.data
    if not all(_is_here(source.path) for source in section.train_sources + section.eval_sources):
        return None
    if not (Path(config.model.path) / "tokenizer_config.json").is_file():
        return None
    with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()):
        return np.asarray(_load(stage, config, section).lengths, np.int64)
    return None


def _is_here(path: str) -> bool:
    return Path(path).exists() or bool(glob.glob(path, recursive=True))


def _load(stage: str, config: Any, section: Any) -> Any:
    from rlhf.data.examples import load_examples
    from rlhf.data.preferences import load_preferences
    from rlhf.data.prompts import load_prompts
    from rlhf.train.chat import load_chat

    chat = load_chat(config.model.path, section.template, trust_remote_code=config.model.trust_remote_code)
    if stage == "ppo":
        prompts = load_prompts(section, chat).train
        return _Prompts(np.array([[len(prompts.prompt(place).tokens)] for place in range(len(prompts))]))
    if stage == "reward" or (stage == "preference" and config.data is not None):
        return load_preferences(section, chat).train
    return load_examples(section, chat, kind="unpaired" if stage == "preference" else "conversation").train


@dataclass(frozen=True)
class _Prompts:
    lengths: np.ndarray
