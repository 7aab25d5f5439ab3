"""The audit that a run makes of its own training pairs, before it starts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reward.audit.estimate import OutOfFold, audited
from reward.audit.features import Extraction, Reading, default_layer
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
    """The pairs, audited if ``labels.kind`` is "made". Every rank must call it: they share the reading of the answers.

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
    rows, answers, groups = ranks.together(lambda: _answers_of(data.train))
    extraction = ranks.on_main(lambda: _extraction(labels, model))
    folder = (cache or default_cache_dir().parent) / "features"
    reading = Reading(rows=rows, extraction=extraction, chat=chat, cache=folder, batch_tokens=BATCH_TOKENS)
    with Progress(ranks, len(rows), 0, what="labels: answer") as progress:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done = min(done + count * ranks.world_size, len(rows) - 1)  # as if all ranks had as many; the end is below
            progress.advance(done, {})

        ranks.together(lambda: reading.make(advance, part=(ranks.rank, ranks.world_size)))
        progress.advance(len(rows), {})

    def audit() -> tuple[NDArray[np.float64], str]:
        states = reading.states().astype(np.float64)  # also what nodes keep for themselves
        differences = Differences.of(states[::2], states[1::2], answers)
        pairs = OutOfFold(differences=differences, prompts=data.train.prompt_keys, groups=groups, folds=FOLDS)
        found = audited(pairs)
        return found.wrong, verdict(found.interval, found.wrong)

    wrong, said = ranks.on_main(audit)
    say(ranks, f"labels: {said}")
    return replace(data, train=data.train.audited(wrong, labels, data.report))


def _answers_of(
    pairs: PreferenceDataset,
) -> tuple[list[NDArray[np.int32]], NDArray[np.int64], NDArray[np.uint64]]:
    """Tokens of the 2 N answers, ``(N, 2)`` numbers that equal answers share, and ``(N,)`` names of pairs of answers.

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
    return tokens, np.array(answers), np.array(groups, np.uint64)


def _extraction(labels: LabelsConfig, model: BackboneConfig) -> Extraction:
    """How states of answers are made: by the backbone of the run as it is on disk, up to a layer."""
    source = BackboneConfig(path=model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return Extraction(
        model=replace(source, layers=labels.layer or default_layer(source)),
        dtype=torch.bfloat16 if has_bfloat16() else torch.float32,
    )
