"""Publishing ``final/``: weights are saved, reloaded by a fresh process, compared, and only then named.

The steps are the same for every kind of model; what differs is asked of a :class:`Publishable`.
"""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rlhf.core.errors import ModelError
from rlhf.core.files import staged_directory
from rlhf.data.batching import ItemSource, Row, length_bucket
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.api import Engine
from rlhf.engine.stop import sheltering_children
from rlhf.models.manifest import Manifest, write_manifest
from rlhf.models.tokenizer import pad_policy
from rlhf.train.batches import asking
from rlhf.train.command import StageConfig
from rlhf.train.stage import say

CASES = 12
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

    def build(self, dtype: torch.dtype) -> ModelT:
        """An untrained copy on the CPU of this process alone, adapters apart, without kernels for GPUs."""

    def has_value(self, row: Row) -> bool:
        """Whether the model says anything about ``row``."""

    def value(self, output: Any, row: Row) -> Tensor:
        """The one number, from what the model says about ``row`` alone."""

    def save(self, model: ModelT, folder: Path) -> None:
        """Write a Transformers folder, without the tokenizer. Ends the use of ``model`` for training."""

    def in_float32(self, saved: ModelT, weights: Weights) -> ModelT:
        """What a reader in float32 gets of the folder that ``saved`` was written to."""


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
    differences = publish(engine, sample, publishable, target)
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
        raise ModelError("no sample row has a value that a reloaded model could be compared by; train.publish=none")
    outputs = live_outputs(engine, rows)
    live = torch.stack([publishable.value(output, row) for output, row in zip(outputs, rows, strict=True)])
    weights = engine.full_state_dict()
    return engine.ranks.on_main(lambda: _write(publishable, weights, rows, live.float().cpu(), target))


def text_form(chat: ChatFormat) -> dict[str, Any]:
    """The entries of a manifest that say how the model's texts become tokens."""
    return {
        "template_digest": chat.digest,
        "tokenizer_digest": chat.tokenizer_digest,
        "pad_policy": pad_policy(portable_tokenizer(chat)),
        "vocabulary_size": len(chat.tokenizer),
    }


def _write(
    publishable: Publishable[ModelT], weights: Weights, rows: Sequence[Row], live: Tensor, target: Path
) -> dict[str, float]:
    tokenizer = portable_tokenizer(publishable.chat)
    model = _rebuilt(publishable, weights)
    with staged_directory(target) as staged:
        publishable.save(model, staged)
        tokenizer.save_pretrained(staged)
        write_manifest(staged, publishable.manifest)
        expected = live
        if publishable.dtype != torch.float32:
            expected = _values(publishable, publishable.in_float32(model, weights), rows)
            check_low_precision(live, expected, publishable.tolerance(expected), publishable.unit)
        del model  # the fresh process holds one too
        request = {"texts": text_cases(publishable.chat), "rows": value_cases(rows, expected)}
        return check_in_fresh_process(publishable.reload_module, staged, {**publishable.details, **request})


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
    """Rows of very different lengths, whole items."""
    order = np.argsort(data.lengths.sum(axis=1), kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, CASES // data.lengths.shape[1]).astype(int))]
    return [row for index in chosen for row in data.item(int(index)).rows]


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


def check_in_fresh_process(module: str, folder: Path, request: dict) -> dict[str, float]:
    """Run ``python -m module folder request.json``; the differences that it reports.

    Raises:
        ModelError: if it does not reproduce the values of ``request``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request))
        with sheltering_children():  # who asks the run to stop signals all its processes
            process = start_fresh(["-m", module, str(folder), str(path)], _plain_environment())
        said, complaint = process.communicate()
    report = said.strip().splitlines()[-1:] or [complaint[-2000:]]
    if process.returncode != 0:
        raise ModelError(
            f"the saved model does not reproduce the live values, so it is not published: {report[0]}; "
            "the checkpoints are intact"
        )
    return json.loads(report[0])


def start_fresh(arguments: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Start ``python arguments``."""
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def check_low_precision(live: Tensor, expected: Tensor, tolerance: float, unit: str) -> None:
    """Warn of weights whose values in the precision of training are far from those in float32.

    Raises:
        ModelError: if one of them is not finite.
    """
    worst = float((live - expected).abs().max())
    if not math.isfinite(worst):
        raise ModelError(
            "values of the trained model are not finite, in training precision or in float32; it is not published, "
            "the checkpoints are intact"
        )
    if worst > tolerance:
        log.warning(
            "values in training precision and in float32 differ by up to %.3f %s, more than %.3f: what is published, "
            "opened in float32, says something else than the run's evaluation by as much",
            worst,
            unit,
            tolerance,
        )


def _plain_environment() -> dict[str, str]:
    """The environment without what a launcher set: the fresh process is nobody's rank, and it reads files only."""
    launched: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "TORCHELASTIC_", "DS_", "SLURM_")
    if "LOCAL_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        launched += ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # shares of the ranks, which wait for this one now
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")]))
    return kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
