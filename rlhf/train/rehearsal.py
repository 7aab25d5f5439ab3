"""Publishing what a run will publish before its first step, untrained, into a folder that is dropped.

Nothing that publishing needs is tried for the first time after training. The fresh process opens the folder while this
one loads the models of the run.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.core.errors import ModelError
from rlhf.core.files import scratch_directory
from rlhf.data.batching import Row
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.ranks import Ranks
from rlhf.train.fresh import begin_check
from rlhf.train.probing import probe_rows
from rlhf.train.publishing import CONVERSATIONS, Publishable, last_of, write_folder
from rlhf.train.recipe import StageConfig
from rlhf.train.status import report_phase

LAYERS = 2
TOKENS = 24

log = logging.getLogger(__name__)

Check = Callable[[], Any]
"""Waits for the fresh process; raises ModelError with what it has against a folder."""


@contextlib.contextmanager
def rehearsed(config: StageConfig, ranks: Ranks, publishable: Publishable[Any]) -> Iterator[None]:
    """Publish an untrained copy of ``publishable`` while the block runs, if it is published after training.

    Of a large model the first layers are enough. Where they alone fail, all of it decides: not every model can be cut.

    Args:
        config: the recipe.
        ranks: every rank must call this.
        publishable: what is going to be published, as far as it is known.
    Raises:
        ModelError: on all ranks, behind the block at the latest, if it cannot be published.
    """
    if config.train.publish == "none" or config.train.resume == "publish":
        yield
        return
    with contextlib.ExitStack() as stack:
        rehearsal = _Rehearsal(publishable)
        report_phase("rehearsing the publication")
        ranks.on_main(lambda: rehearsal.begin(stack.enter_context(scratch_directory(config.output / "rehearsal"))))
        report_phase("loading models")
        yield
        report_phase("rehearsing the publication")
        ranks.on_main(rehearsal.finish)


class _Rehearsal:
    """Two tries: a model cut to its first layers, if it is large, and all of it."""

    def __init__(self, publishable: Publishable[Any]) -> None:
        self._publishable, self._cut = publishable, False

    def begin(self, scratch: Path) -> None:
        self._scratch = scratch
        few = self._publishable.rehearsed(LAYERS, scratch / "base")
        self._cut = few is not None
        if few is None:
            self._check = self._begin_whole()
            return
        try:
            self._check = _begin_untrained(few, scratch / "few")
        except Exception as error:
            self._take_whole(error)

    def finish(self) -> None:
        try:
            self._check()
        except ModelError as error:
            if not self._cut:
                raise _refused(error) from error
            self._take_whole(error)
            self.finish()

    def _take_whole(self, error: Exception) -> None:
        log.warning(
            "%d layers alone cannot be published (%s: %s): all of them are tried", LAYERS, type(error).__name__, error
        )
        self._cut = False
        self._check = self._begin_whole()

    def _begin_whole(self) -> Check:
        try:
            return _begin_untrained(self._publishable, self._scratch / "whole")
        except (ModelError, ValueError, RuntimeError) as error:
            raise _refused(error) from error


def _refused(error: Exception) -> ModelError:
    return ModelError(
        f"what this run would publish was tried before the first step, and cannot be published: {error}. Take another "
        "model or data.template; train.publish=none trains all the same"
    )


def _begin_untrained(publishable: Publishable[Any], folder: Path) -> Check:
    """Write an untrained model, and let the fresh process look at it."""
    folder.mkdir(parents=True)
    model = publishable.build(publishable.dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # adapters begin at zero, and would be missed by nobody
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    weights = dict(model.state_dict())
    question = write_folder(publishable, model, weights, _rows(publishable.chat), None, folder)
    question["threads"] = torch.get_num_threads()  # the ranks need theirs meanwhile
    return begin_check(publishable.reload_module, folder, question)


def _rows(chat: ChatFormat) -> list[Row]:
    rows = probe_rows(len(chat.tokenizer), chat.tokenizer.pad_token_id)
    for messages in CONVERSATIONS:
        try:
            tokens, begin = chat.encode(messages[:-1], messages[-1:])
        except TemplateFault:
            continue
        rows.append(last_of(Row(tokens, np.arange(len(tokens)) >= begin), TOKENS))
    return rows
