"""The audit that a run makes of its own training pairs, before it starts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reward.audit.estimate import OutOfFold, audited
from reward.audit.features import Extraction, default_layer, features_of
from reward.audit.margins import Differences
from reward.audit.verdict import verdict
from rlhf.core.errors import DataError
from rlhf.core.files import digest
from rlhf.data.loading import default_cache_dir
from rlhf.data.options import LabelsConfig
from rlhf.data.preferences import LoadedPreferences, PreferenceDataset
from rlhf.data.templates import ChatFormat
from rlhf.engine.build import has_bfloat16
from rlhf.engine.ranks import Ranks
from rlhf.models.options import BackboneConfig
from rlhf.train.progress import Progress
from rlhf.train.stage import say
from rlhf.train.status import report_phase

FOLDS = 5
BATCH_TOKENS = 8192


def with_own_audit(
    data: LoadedPreferences,
    labels: LabelsConfig,
    model: BackboneConfig,
    chat: ChatFormat,
    ranks: Ranks,
    *,
    cache: Path | None = None,
) -> LoadedPreferences:
    """The pairs, audited if ``labels.kind`` is "made". Every rank must call it; the main one does the work.

    Args:
        data: of the run.
        labels: its section.
        model: whose states are read.
        chat: of the run.
        ranks: of the run.
        cache: of tokens, beside which states are kept; ``None`` for the default.
    Raises:
        DataError: if there are too few pairs, or none is left.
    """
    if labels.kind != "made":
        return data
    report_phase("auditing labels")
    with Progress(ranks, 2 * len(data.train), 0, what="labels: answer") as progress:
        wrong, said = ranks.on_main(
            lambda: own_audit(data.train, labels, model, chat, cache, lambda done: progress.advance(done, {}))
        )
    say(ranks, f"labels: {said}")
    return replace(data, train=data.train.audited(wrong, labels, data.report))


def own_audit(
    pairs: PreferenceDataset,
    labels: LabelsConfig,
    model: BackboneConfig,
    chat: ChatFormat,
    cache: Path | None,
    tell: Callable[[int], None] = lambda done: None,
) -> tuple[NDArray[np.float64], str]:
    """``(N,)`` probabilities that labels are wrong, and what was found in one line.

    Args:
        pairs, labels, model, chat, cache: see :func:`with_own_audit`.
        tell: told how many of the 2 N answers have been read.
    Raises:
        DataError: if there are fewer different pairs than folds.
    """
    tokens, answers, groups = [], [], []
    numbers: dict[tuple[int, bytes], int] = {}
    for index in range(len(pairs)):
        pair = pairs.pair(index)
        sides = [pair.chosen, pair.rejected]
        tokens += sides
        keys = [numbers.setdefault((pair.prompt_key, side.tobytes()), len(numbers)) for side in sides]
        answers.append(keys)
        groups.append(int(digest(*map(str, sorted(keys))), 16))
    if len(set(groups)) < FOLDS:
        raise DataError(f"labels.kind = made: {len(set(groups))} different pairs make no {FOLDS} folds for an audit")
    source = BackboneConfig(path=model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    extraction = Extraction(
        model=replace(source, layers=labels.layer or default_layer(source)),
        dtype=torch.bfloat16 if has_bfloat16() else torch.float32,
    )
    folder = (cache or default_cache_dir().parent) / "features"
    read = 0

    def advance(count: int) -> None:
        nonlocal read
        read += count
        tell(read)

    states = features_of(tokens, extraction, chat, cache=folder, batch_tokens=BATCH_TOKENS, advance=advance).astype(
        np.float64
    )
    found = audited(
        OutOfFold(
            differences=Differences.of(states[::2], states[1::2], np.array(answers)),
            prompts=pairs.prompt_keys,
            groups=np.array(groups, np.uint64),
            folds=FOLDS,
        )
    )
    return found.wrong, verdict(found.interval, found.wrong)
