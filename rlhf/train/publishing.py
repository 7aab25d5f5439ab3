"""Publishing ``final/``: weights are saved, reloaded by a fresh process, compared, and only then named.

The steps are the same for every kind of model; what differs is asked of a :class:`Publishable`. They are rehearsed
before the first step (:mod:`rlhf.train.rehearsal`).
"""

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rlhf.core.errors import ModelError
from rlhf.core.files import staged_directory
from rlhf.core.memory import free_memory
from rlhf.data.batching import ItemSource, Row, length_bucket
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.api import Engine
from rlhf.engine.frozen import Frozen, let_go, share_in_float32
from rlhf.models.manifest import Manifest, write_manifest
from rlhf.models.tokenizer import pad_policy
from rlhf.models.trainable import shown_as
from rlhf.train.batches import asking
from rlhf.train.fresh import check_in_fresh_process, check_on_all_ranks
from rlhf.train.pieces import TrainedWeights, write_whole
from rlhf.train.recipe import StageConfig
from rlhf.train.stage import say

CASES = 12
LONGEST = 512
"""Tokens of a row that are compared, the last ones: the fresh process computes on a CPU."""
FRESH_BYTES = 2**30
"""Memory of the fresh process besides the model: Python and its libraries, the values of a row."""
CONVERSATIONS = (
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because 12 + 30 = 42."}],
    [
        {"role": "user", "content": "First line\n\nthird  line\twith a tab, and ``code`` <b>here</b>"},
        {"role": "assistant", "content": "Na\u00efve \u2013 \u8336 \u2615\n1. don't\n2. {{ messages }} {% if %}"},
    ],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi, what can I do?"},
        {"role": "user", "content": "Nothing 12345"},
        {"role": "assistant", "content": "Fine."},
    ],
    [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}],
)
"""What the saved tokenizer must show and split as the run does."""

log = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
Weights = Mapping[str, Tensor]


class Publishable(Protocol[ModelT]):
    """One kind of model on its way to ``final/``: what reward models and policies do differently."""

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and template of the run."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of all weights, in training and on disk."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def reload_module(self) -> str:
        """The module that a fresh process runs with the folder and the cases; see :mod:`rlhf.train.reloading`."""

    @property
    def details(self) -> Mapping[str, Any]:
        """What that module must know besides the cases."""

    @property
    def unit(self) -> str:
        """The unit of the values that are compared."""

    def tolerance(self, expected: Tensor) -> float:
        """How far values in the precision of training may be from ``expected`` ones, of the same weights in float32.

        Values further off are published, with a warning: they are what readers in float32 get.
        """

    def rehearsed(self, layers: int, folder: Path) -> Self | None:
        """The same of a model that is cut to its first ``layers``; ``None`` if that would not make it much smaller.

        Where what is published names a base that is on the disk, a cut one is written into the new ``folder``.
        """

    def build(self, dtype: torch.dtype) -> ModelT:
        """An untrained copy on the CPU of this process alone, adapters apart, without kernels for GPUs."""

    def mapped(self) -> ModelT:
        """The same on every rank, for weights that the ranks share out: those of files are mapped where that can be."""

    def saved_alone(self, model: ModelT) -> Sequence[nn.Parameter] | None:
        """The parameters that are saved, beside the name of a base; ``None`` for a folder with all of them."""

    def save_settings(self, model: ModelT, folder: Path) -> None:
        """Write a Transformers folder without weights and tokenizer. ``model`` stays as it is."""

    def has_value(self, row: Row) -> bool:
        """Whether the model says anything about ``row``."""

    def value(self, output: Any, row: Row) -> Tensor:
        """The one number, from what the model says about ``row`` alone."""

    def save(self, model: ModelT, folder: Path) -> None:
        """Write a Transformers folder, without the tokenizer. Ends the use of ``model`` for training."""

    def in_float32(self, saved: ModelT, weights: Weights) -> ModelT:
        """What a reader in float32 gets of the folder that ``saved`` was written to."""

    def complete(self, folder: Path) -> None:
        """Write what other programs need, into a folder that has weights, tokenizer and manifest."""


def publish_run(config: StageConfig, engine: Engine, sample: ItemSource, publishable: Publishable[Any]) -> None:
    """Publish what ``engine`` holds as ``final/`` of the run folder, unless the recipe asks for none.

    Args:
        config: the recipe.
        engine: every rank must call this.
        sample: rows whose values the reloaded model must reproduce.
        publishable: the kind of model.
    """
    if config.train.publish == "none":
        return
    target = config.output / "final"
    try:
        differences = publish(engine, sample, publishable, target)
    except ModelError as error:
        raise ModelError(
            f"{target} is not published: {error}; the checkpoints are intact: rlhf publish {config.output} tries again"
        ) from error
    worst = f"{max(differences.values()):.1e} {publishable.unit}"
    say(engine.ranks, f"published {target}: reloaded in a fresh process, largest difference {worst}")


def publish(engine: Engine, sample: ItemSource, publishable: Publishable[Any], target: Path) -> dict[str, float]:
    """Write ``target`` atomically after a fresh process has reproduced the live values of sample rows.

    Returns:
        The largest difference to the live values, by way of padding.
    Raises:
        ModelError: if the saved model disagrees; an earlier ``target`` stays as it was.
    """
    rows = [row for row in sample_rows(sample) if publishable.has_value(row)]
    if not rows:
        raise ModelError("no sample row has a value that a reloaded model could be compared by")
    outputs = live_outputs(engine, rows)
    live = torch.stack([publishable.value(output, row) for output, row in zip(outputs, rows, strict=True)])
    if engine.shared_out:
        return _publish_in_pieces(engine, rows, live.float().cpu(), publishable, target)
    weights = engine.full_state_dict()

    def write() -> dict[str, float]:
        with staged_directory(target) as staged:
            question = write_folder(
                publishable, _rebuilt(publishable, weights), weights, rows, live.float().cpu(), staged
            )
            return check_in_fresh_process(publishable.reload_module, staged, question)

    return engine.ranks.on_main(write)


def _publish_in_pieces(
    engine: Engine, rows: Sequence[Row], live: Tensor, publishable: Publishable[Any], target: Path
) -> dict[str, float]:
    """The same where no rank may hold all weights: all of them compute what is compared. Every rank must call it."""
    ranks, low = engine.ranks, publishable.dtype != torch.float32
    engine.release()
    with contextlib.ExitStack() as stack:
        staged = ranks.together(lambda: stack.enter_context(staged_directory(target)) if ranks.is_main else target)
        model = ranks.together(publishable.mapped).eval()
        asked = _written_in_pieces(engine, publishable, model, staged, ask=low)
        ranks.on_main(lambda: _write_around(publishable, staged))
        expected = live
        if asked is not None:
            with asking(asked):
                outputs = [asked.forward((length_bucket([row]).to(ranks.device),)) for row in rows]
            values = [publishable.value(output, row) for output, row in zip(outputs, rows, strict=True)]
            expected = torch.stack(values).float().cpu()
            tolerance = publishable.tolerance(expected)
            ranks.on_main(lambda: check_low_precision(live, expected, tolerance, publishable.unit))
            let_go(asked)
        question = _question(publishable, rows, expected)
        size = 4 * sum(parameter.ds_numel for parameter in engine.module.parameters())  # type: ignore[attr-defined]
        if ranks.on_main(lambda: _fits_one_process(size)):
            found = ranks.on_main(lambda: check_in_fresh_process(publishable.reload_module, staged, question))
        else:
            say(ranks, f"{size / 2**30:.0f} GiB in float32 are too much for one process: all ranks open {target}")
            folder = ranks.broadcast_object(staged)
            found = check_on_all_ranks(publishable.reload_module, folder, question, ranks)
        ranks.together(stack.close)
    return found


def _written_in_pieces(
    engine: Engine, publishable: Publishable[Any], model: Any, staged: Path, *, ask: bool
) -> Frozen | None:
    """Write all but the tokenizer; the float32 model to be asked, if ``ask``."""
    ranks, alone = engine.ranks, publishable.saved_alone(model)
    if alone is None:
        with shown_as(model, publishable.dtype):
            ranks.on_main(lambda: publishable.save_settings(model, staged))
        return write_whole(engine, model, staged, ask=ask)
    types = [parameter.dtype for parameter in alone]
    TrainedWeights(engine, model).fill(*alone)
    for parameter, dtype in zip(alone, types, strict=True):
        parameter.data = parameter.data.to(dtype)  # peft keeps adapters in float32
    ranks.on_main(lambda: publishable.save(model, staged))
    return share_in_float32(model, ranks=ranks, hidden_size=model.hf.config.hidden_size) if ask else None


def _fits_one_process(size: int) -> bool:
    free = free_memory()
    return free is None or size + FRESH_BYTES < free


def _write_around(publishable: Publishable[Any], staged: Path) -> None:
    portable_tokenizer(publishable.chat).save_pretrained(staged)
    write_manifest(staged, publishable.manifest)
    publishable.complete(staged)


def _question(publishable: Publishable[Any], rows: Sequence[Row], expected: Tensor) -> dict[str, Any]:
    cases = {"texts": text_cases(publishable.chat), "rows": value_cases(rows, expected)}
    return {**publishable.details, **cases}


def text_form(chat: ChatFormat) -> dict[str, Any]:
    """The entries of a manifest that say how the model's texts become tokens."""
    return {
        "template_digest": chat.digest,
        "tokenizer_digest": chat.tokenizer_digest,
        "pad_policy": pad_policy(portable_tokenizer(chat)),
        "vocabulary_size": len(chat.tokenizer),
        "system_prompt": chat.system_prompt,
        "thoughts_dropped": chat.drops_thoughts,
    }


def write_folder(
    publishable: Publishable[ModelT],
    model: ModelT,
    weights: dict[str, Tensor],
    rows: Sequence[Row],
    live: Tensor | None,
    folder: Path,
) -> dict[str, Any]:
    """Write ``folder``; what a fresh process is to be asked about it.

    ``weights`` are emptied, and ``model`` is spoilt: the fresh process needs the memory. Without ``live`` values it is
    compared with ``model`` alone.
    """
    if live is None and publishable.dtype == torch.float32:
        live = _values(publishable, model, rows)
    publishable.save(model, folder)
    _write_around(publishable, folder)
    expected = live
    if publishable.dtype != torch.float32:
        expected = _values(publishable, publishable.in_float32(model, weights), rows)
        if live is not None:
            check_low_precision(live, expected, publishable.tolerance(expected), publishable.unit)
    assert expected is not None
    weights.clear()
    return _question(publishable, rows, expected)


def _rebuilt(publishable: Publishable[ModelT], weights: Weights) -> ModelT:
    """A copy on the CPU with the trained weights, adapters still apart."""
    model = publishable.build(publishable.dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {*dict(model.named_parameters())}
    if set(missing) - tied or unexpected:
        raise ModelError(f"trained weights do not fit: missing {missing}, unexpected {unexpected}")
    model.eval()
    return model


def _values(publishable: Publishable[ModelT], model: ModelT, rows: Sequence[Row]) -> Tensor:
    """Values of the rows, computed by this process."""
    with torch.no_grad():
        return torch.stack([publishable.value(model((length_bucket([row]),)), row) for row in rows])


def sample_rows(data: ItemSource) -> list[Row]:
    """Rows of very different lengths, whole items; of long ones the end."""
    order = np.argsort(data.lengths.sum(axis=1), kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, CASES // data.lengths.shape[1]).astype(int))]
    return [last_of(row, LONGEST) for index in chosen for row in data.item(int(index)).rows]


def last_of(row: Row, tokens: int) -> Row:
    return Row(row.tokens[-tokens:], row.response[-tokens:])


def live_outputs(engine: Engine, rows: Sequence[Row]) -> list[Any]:
    """What the model under training says about each row alone. Every rank must call it."""
    with asking(engine):
        return [engine.forward((length_bucket([row]).to(engine.ranks.device),)) for row in rows]


def value_cases(rows: Sequence[Row], values: Tensor) -> list[dict]:
    """Tokens, response mask and value of each row. Not its text: a tokenizer need not be able to give it back."""
    return [
        {"tokens": row.tokens.tolist(), "response": row.response.tolist(), "value": value}
        for row, value in zip(rows, values.tolist(), strict=True)
    ]


def text_cases(chat: ChatFormat) -> list[dict]:
    """Conversations with the texts and tokens that the run makes of them, for the saved tokenizer to do the same.

    Those that the template cannot show in training either are left out.
    """
    cases = []
    for messages in CONVERSATIONS:
        try:
            begun, whole = chat.render_prompt(messages[:-1]), chat.render_whole(messages)
        except TemplateFault:
            continue
        tokens = chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
        cases.append({"messages": messages, "begun": begun, "text": whole, "tokens": tokens})
    return cases


def check_low_precision(live: Tensor, expected: Tensor, tolerance: float, unit: str) -> None:
    """Warn of weights whose values in the precision of training are far from those in float32.

    Raises:
        ModelError: if one of them is not finite.
    """
    worst = float((live - expected).abs().max())
    if not math.isfinite(worst):
        raise ModelError("values of the trained model are not finite, in training precision or in float32")
    if worst > tolerance:
        log.warning(
            "values in training precision and in float32 differ by up to %.3f %s, more than %.3f: what is published, "
            "opened in float32, says something else than the run's evaluation by as much",
            worst,
            unit,
            tolerance,
        )
