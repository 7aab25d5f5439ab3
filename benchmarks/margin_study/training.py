"""One run of the margin study: frozen features in, a small head trained on them, accuracies out."""

import argparse
import hashlib
import json
import math
import multiprocessing
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pairs import SPLITS, read_pairs
from torch import Tensor, nn

from reward.margins import optimal_transport_margins
from reward.tables import LOSSES
from rlhf.core.intervals import preference_accuracy

BATCH_PAIRS = 64
EPOCHS = 4
WARMUP_STEPS = 10
WEIGHT_DECAY = 0.01
HIDDEN = 1024
EVALUATE_EVERY = 2
FOLDS = 10


_given: Any = None
"""What the jobs of a worker share."""


def started(workers: int, read: Callable[..., Any], *arguments: Any) -> ProcessPoolExecutor:
    """Processes of one thread each, whose jobs share what ``read(*arguments)`` gives; see :func:`finished`."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (read, arguments))


def _start(read: Callable[..., Any], arguments: tuple) -> None:
    global _given
    torch.set_num_threads(1)
    _given = read(*arguments)


def _work(work: Callable[[Any, Any], dict], job: Any) -> tuple[Any, dict]:
    return job, work(job, _given)


def finished(pool: ProcessPoolExecutor, work: Callable[[Any, Any], dict], jobs: Iterable) -> Iterator[tuple[Any, dict]]:
    """Each job and what ``work`` makes of it and of what the jobs share, as they end.

    Raises:
        SystemExit: if a process is killed.
    """
    try:
        for each in as_completed([pool.submit(_work, work, job) for job in jobs]):
            yield each.result()
    except BrokenProcessPool:
        raise SystemExit(
            "a worker was killed, perhaps for want of memory: start again, which keeps what is done, or with fewer "
            "--workers"
        ) from None


def study_parser(description: str | None, *, seeds: int, of: str, made: str) -> argparse.ArgumentParser:
    """Arguments of a study: ``seeds`` by default, each for ``of``, and ``made`` at the same time by workers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True, type=pathlib.Path, help="folder written by features.py")
    parser.add_argument("--data", required=True, type=pathlib.Path, help="folder of the pairs (pairs.py)")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for runs, tables and plot")
    parser.add_argument("--seeds", type=_several, default=seeds, help=of)
    parser.add_argument("--workers", type=int, default=2, help=f"{made} made at the same time, one core each")
    return parser


def _several(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: an interval needs at least 2")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """N pairs of answers as frozen features."""

    chosen: Tensor  # (N, D) standardized
    rejected: Tensor  # (N, D) standardized
    score_gap: Tensor  # (N,) how clearly the annotator prefers the answer labeled chosen

    def __getitem__(self, rows: Tensor) -> "Pairs":
        return Pairs(chosen=self.chosen[rows], rejected=self.rejected[rows], score_gap=self.score_gap[rows])

    def __len__(self) -> int:
        return len(self.chosen)


# Losses of a batch, (B,), from its pairs, the head's rewards of both sides, and the method's one number.
LossFunction = Callable[[Pairs, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    losses: LossFunction
    candidates: tuple[float, ...]
    """Values of the method's one number to choose from on held-out training prompts."""


def _bradley_terry(pairs: Pairs, chosen: Tensor, rejected: Tensor, setting: float) -> Tensor:
    return LOSSES["bradley_terry"](chosen, rejected)


def _constant_margin(pairs: Pairs, chosen: Tensor, rejected: Tensor, setting: float) -> Tensor:
    return LOSSES["bradley_terry"](chosen, rejected, torch.full_like(chosen, setting))


def _column_margin(pairs: Pairs, chosen: Tensor, rejected: Tensor, setting: float) -> Tensor:
    return LOSSES["bradley_terry"](chosen, rejected, setting * pairs.score_gap)


def _label_smoothing(pairs: Pairs, chosen: Tensor, rejected: Tensor, setting: float) -> Tensor:
    return LOSSES["label_smoothing"](chosen, rejected, smoothing=setting)


def _transport_margin(
    pairs: Pairs, chosen: Tensor, rejected: Tensor, setting: float, *, reward_cost: str, center_rewards: bool
) -> Tensor:
    found = optimal_transport_margins(
        pairs.chosen, pairs.rejected, chosen, rejected, reward_cost=reward_cost, center_rewards=center_rewards
    )
    return LOSSES["bradley_terry"](chosen, rejected, setting * found.margins)


METHODS = {
    "Bradley-Terry": Method(losses=_bradley_terry, candidates=(0.0,)),
    "constant margin": Method(losses=_constant_margin, candidates=(0.25, 0.5, 1.0, 2.0)),
    "column margin": Method(losses=_column_margin, candidates=(0.5, 1.0, 2.0, 4.0)),
    "label smoothing": Method(losses=_label_smoothing, candidates=(0.05, 0.1, 0.2, 0.3)),
    "OT abs, raw": Method(
        losses=partial(_transport_margin, reward_cost="abs", center_rewards=False),
        candidates=(0.5, 1.0, 2.0, 4.0),
    ),
    "OT abs, centered": Method(
        losses=partial(_transport_margin, reward_cost="abs", center_rewards=True),
        candidates=(0.5, 1.0, 2.0, 4.0),
    ),
    "OT signed, centered": Method(
        losses=partial(_transport_margin, reward_cost="signed", center_rewards=True),
        candidates=(0.5, 1.0, 2.0, 4.0),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides the outcome of one training run, given the features."""

    method: str
    setting: float
    flipped: float
    """Share of training labels swapped."""
    layer: int
    learning_rate: float
    fold: int
    """Which tenth of the training prompts is held out for validation."""
    seed: int
    """Decides the head's start, the order of the pairs and which labels are flipped."""
    tests: bool
    """Whether the test sets are looked at, along the whole run; otherwise validation only, at its end."""


@dataclass(frozen=True)
class Corpus:
    """Frozen features of all splits, and which prompt each pair belongs to."""

    splits: dict[str, dict[str, np.ndarray]]
    prompts: dict[str, np.ndarray]  # (N,) number of the prompt, in order of first appearance
    answers: np.ndarray  # (N, 2) numbers of the answers of training pairs, equal for equal answers to one prompt
    fingerprint: str

    def pairs(self, split: str, layer: int, rows: np.ndarray, center: np.ndarray, spread: np.ndarray) -> Pairs:
        arrays = self.splits[split]
        place = list(arrays["layers"]).index(layer)
        sides = [torch.from_numpy((arrays[side][rows, place] - center) / spread) for side in ("chosen", "rejected")]
        gap = arrays["chosen_score"][rows] - arrays["rejected_score"][rows]
        return Pairs(chosen=sides[0], rejected=sides[1], score_gap=torch.from_numpy(gap))

    @property
    def lengths(self) -> np.ndarray:
        """``(N, 2)`` tokens of the chosen and the rejected answers of training pairs, with their prompts."""
        return np.stack([self.splits["train"][f"{side}_tokens"] for side in ("chosen", "rejected")], axis=1)

    def moments(self, layer: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each feature over the answers trained on."""
        arrays = self.splits["train"]
        place = list(arrays["layers"]).index(layer)
        answers = np.concatenate([arrays[side][rows, place] for side in ("chosen", "rejected")])
        return answers.mean(0), answers.std(0)

    def fold(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Training rows left, and rows held out: those of a fixed random tenth of the prompts."""
        prompts = self.prompts["train"]
        shuffled = np.random.default_rng(0).permutation(prompts.max() + 1)
        held_out = np.isin(prompts, shuffled[number::FOLDS])
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def read_corpus(features: pathlib.Path, data: pathlib.Path, data_set: str = "alpaca") -> Corpus:
    splits, prompts, digest = {}, {}, hashlib.sha256()
    for split in SPLITS[data_set]:
        source = features / f"{split}.npz"
        if not source.is_file():
            raise SystemExit(f"study: {source} is missing; make it with benchmarks/margin_study/features.py")
        digest.update(source.read_bytes())
        with np.load(source) as arrays:
            splits[split] = dict(arrays)
        every = read_pairs(data, data_set, split)
        rows = [every[row] for row in splits[split]["rows"] if row < len(every)]
        scores = np.array([row["chosen_score"] for row in rows], dtype=np.float32)
        if not np.array_equal(scores, splits[split]["chosen_score"]):
            raise SystemExit(f"study: {source} was not made from the {data_set} pairs in {data}; make it again")
        numbers: dict[str, int] = {}
        texts = [json.dumps(row["prompt"]) for row in rows]
        prompts[split] = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
        if split == "train":
            places: dict[str, int] = {}
            sides = [[json.dumps([row["prompt"], row[side]]) for side in ("chosen", "rejected")] for row in rows]
            answers = np.array([[places.setdefault(text, len(places)) for text in pair] for pair in sides])
    return Corpus(splits, prompts, answers, digest.hexdigest()[:12])


def flip_labels(pairs: Pairs, share: float, seed: int) -> Pairs:
    """Swap the two answers of a seeded share of the pairs, together with their scores.

    The annotator that mislabels a pair believes in it: the score gap keeps its size and points to the answer
    now called chosen, so a column margin learns nothing about which labels are wrong.
    """
    draw = np.random.default_rng((seed, 1))
    swapped = np.zeros((len(pairs), 1), dtype=bool)
    swapped[draw.choice(len(pairs), size=round(share * len(pairs)), replace=False)] = True
    swap = torch.from_numpy(swapped)
    return Pairs(
        chosen=torch.where(swap, pairs.rejected, pairs.chosen),
        rejected=torch.where(swap, pairs.chosen, pairs.rejected),
        score_gap=pairs.score_gap,
    )


def new_head(features: int, seed: int) -> nn.Sequential:
    """Two layers as in GRM; the last starts small, so that all rewards start near 0."""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    nn.init.normal_(head[2].weight, std=1 / (HIDDEN + 1))
    nn.init.zeros_(head[2].bias)
    return head


def batches(pairs: int, seed: int, *, epochs: int = EPOCHS, size: int = BATCH_PAIRS) -> Iterator[Tensor]:
    """Rows of every step of the run; the last, smaller batch of an epoch is trained on too."""
    draw = np.random.default_rng((seed, 2))
    for _ in range(epochs):
        yield from torch.from_numpy(draw.permutation(pairs)).split(size)


def schedule(step: int, total: int) -> float:
    """Factor of the learning rate: linear warm-up, then cosine to 0."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (total - WARMUP_STEPS)))


@torch.no_grad()
def gaps(head: nn.Module, pairs: Pairs) -> np.ndarray:
    """``(N,)`` plain reward gaps, without any margin."""
    return (head(pairs.chosen) - head(pairs.rejected)).squeeze(1).numpy()


def train(run: Run, corpus: Corpus) -> dict:
    """One run; accuracies along it, and at its end which test pairs were ranked rightly."""
    rows, held_out = corpus.fold(run.fold)
    moments = corpus.moments(run.layer, rows)
    pairs = flip_labels(corpus.pairs("train", run.layer, rows, *moments), run.flipped, run.seed)
    watched = {"validation": corpus.pairs("train", run.layer, held_out, *moments)}
    if run.tests:
        for split in ("id_test", "ood_test"):
            every = np.arange(len(corpus.prompts[split]))
            watched[split] = corpus.pairs(split, run.layer, every, *moments)
    head = new_head(pairs.chosen.shape[1], run.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=run.learning_rate, weight_decay=WEIGHT_DECAY)
    plan = list(batches(len(pairs), run.seed))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, total=len(plan)))
    curve: dict[str, list] = {"step": []} | {name: [] for name in watched}
    for step, batch_rows in enumerate(plan, start=1):
        _update(head, optimizer, METHODS[run.method].losses, pairs[batch_rows], run.setting)
        scheduler.step()
        if step == len(plan) or (run.tests and step % EVALUATE_EVERY == 0):
            curve["step"].append(step)
            for name, watched_pairs in watched.items():
                curve[name].append(round(preference_accuracy(gaps(head, watched_pairs)).value, 5))
    right = {name: marks(gaps(head, watched[name])) for name in watched if name != "validation"}
    return {"curve": curve, "right": right}


def _update(head: nn.Module, optimizer: torch.optim.Optimizer, losses: LossFunction, pairs: Pairs, setting: float):
    rewards = head(torch.cat([pairs.chosen, pairs.rejected])).squeeze(1)
    chosen, rejected = rewards.split(len(pairs))
    optimizer.zero_grad()
    losses(pairs, chosen, rejected, setting).mean().backward()
    optimizer.step()


def marks(gap: np.ndarray) -> str:
    """One character a pair: 2 right, 1 tie, 0 wrong."""
    return "".join(str(int(sign) + 1) for sign in np.sign(gap))
