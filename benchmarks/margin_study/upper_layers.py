"""Do audited labels make a better reward model where layers of the backbone are trained, too?

The label study again, with the upper layers of a cut backbone trained along with the head:

    python benchmarks/margin_study/upper_layers.py --model MODEL_DIR --data DIR --features states/ --output upper/

1. States of every different answer below the trained layers are computed once, and kept on disk.
2. The learning rate of the layers is chosen on held-out training prompts, for Bradley-Terry with right labels.
3. Every method, with every share of wrong labels, from every seed. The audit reads the frozen states, as in the label
   study, and is told nothing; numbers of methods are those that label_study.py chose.

Every finished job is a line of upper_runs.jsonl in the output folder; started again, only missing methods are made. At
the end upper_layers.md is written there.
"""

import argparse
import copy
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from features import token_ids
from jobs import Job, Method, best, results
from label_study import BASELINE, LEARNING_RATE, TITLES, Audit, audit_of, losses_of, swapped, tables, wrong_labels
from pairs import SPLITS, read_pairs
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from training import (
    FOLDS,
    WEIGHT_DECAY,
    Corpus,
    Pairs,
    batches,
    marks,
    new_head,
    read_corpus,
    schedule,
    started,
    study_parser,
)
from transformers import AutoModel, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaModel, apply_rotary_pos_emb

from rlhf.core.files import write_text
from rlhf.core.intervals import preference_accuracy
from rlhf.data.batching import batches_by_length

LAYERS = 12
"""The backbone is cut to these; the audit reads what they make of an answer."""
TRAINED = 2
"""How many of them, the upper ones, are trained."""
LONGEST = {"train": 192, "id_test": 384, "ood_test": 384}
"""Tokens of an answer with its prompt, at most: pairs with a longer one are left out."""
BATCH_PAIRS = 32
ROWS = 2 * BATCH_PAIRS
"""Answers that are computed at once; neighbors have the same prompt, mostly, which is computed once then."""
BATCH_TOKENS = 4096
"""Padded tokens at once where the states below are made."""
EPOCHS = 2
RATES = (3e-5, 1e-4, 3e-4)
"""Learning rates of the layers to choose from."""
TENTHS = 2
"""Held-out tenths that the rate is chosen on."""
SHARES = (0.0, 0.2)
METHODS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "soft": {"use": "soft"},
    "OT margins": {"transport": 1.0},
    "soft, GCE if found": {"use": "soft", "loss": "generalized_cross_entropy", "options": (("q", 0.7),), "found": 0.03},
    f"{BASELINE}, layers frozen": {"rate": 0.0},
}
"""What is made of labels, by the numbers that label_study.py chose."""


@dataclass(frozen=True, kw_only=True)
class LayersMethod(Method):
    """What is made of labels in training, and how fast layers learn."""

    rate: float


@dataclass(frozen=True, kw_only=True)
class States:
    """States of A answers below the trained layers; those of equal beginnings are equal, and there once."""

    values: Tensor  # (N, D)
    places: Tensor  # (tokens,) which state is that of each token, one answer behind the other
    starts: Tensor  # (A + 1,) where each begins, and the end of the last

    def of(self, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(U, D)`` states of the answers of these numbers, which one is whose ``(R, T)``, and the ``(R,)`` lengths.

        Rows are padded on the right, with anything.
        """
        rows = [self.places[self.starts[answer] : self.starts[answer + 1]] for answer in answers]
        used, where = nn.utils.rnn.pad_sequence(rows, batch_first=True).unique(return_inverse=True)
        return self.values[used].float(), where, self.lengths[answers]

    @property
    def lengths(self) -> Tensor:
        return self.starts.diff()


@torch.inference_mode()
def states_of(model: LlamaModel, rows: Sequence[Sequence[int]], trained: int) -> tuple[States, np.ndarray]:
    """States of token rows below the upper ``trained`` layers; ``(A, D)`` what all layers make of the last token."""
    lengths = [len(row) for row in rows]
    beginnings: dict[tuple[int, int], int] = {}
    places = [torch.tensor(_places(row, beginnings)) for row in rows]
    values = torch.empty(len(beginnings), model.config.hidden_size, dtype=model.dtype)
    features = torch.empty(len(rows), model.config.hidden_size)
    below = model.config.num_hidden_layers - trained
    for batch in track(list(batches_by_length(lengths, BATCH_TOKENS)), description="states"):
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(rows[row]) for row in batch], batch_first=True)
        hidden = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
        for place, row in enumerate(batch):
            values[places[row]] = hidden[below][place, : lengths[row]]
            features[row] = hidden[-1][place, lengths[row] - 1].float()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return States(values=values, places=torch.cat(places), starts=starts), features.numpy()


def _places(row: Sequence[int], beginnings: dict[tuple[int, int], int]) -> list[int]:
    """The number of each beginning of a row, new ones added: the one before it with one more token."""
    found, last = [], -1
    for token in row:
        last = beginnings.setdefault((last, token), len(beginnings))
        found.append(last)
    return found


class UpperLayers(nn.Module):
    """The upper layers of a cut Llama backbone: the state of each row's last token, from all states below them."""

    def __init__(self, model: LlamaModel, trained: int) -> None:
        super().__init__()
        self.layers = copy.deepcopy(model.layers[len(model.layers) - trained :])
        self.norm = copy.deepcopy(model.norm)
        self.rotary = model.rotary_emb

    def forward(self, states: Tensor, where: Tensor, lengths: Tensor) -> Tensor:
        """``(R, D)``, from what :meth:`States.of` gives."""
        places = torch.arange(where.shape[1])
        turns = self.rotary(states, position_ids=places[None])
        real = places < lengths[:, None]
        asked = torch.zeros(len(states), dtype=torch.long)  # a row and place of each state
        asked[where[real]] = torch.arange(where.numel()).view(where.shape)[real]
        *inner, top = self.layers
        for layer in inner:
            read = _attended(layer, states, where, None, turns).flatten(0, 1)[asked]
            states = _outcome(layer, states, read)
        read = _attended(top, states, where, lengths - 1, turns).squeeze(1)
        return self.norm(_outcome(top, states[where[torch.arange(len(where)), lengths - 1]], read))


def _attended(
    layer: nn.Module, states: Tensor, where: Tensor, asking: Tensor | None, turns: tuple[Tensor, Tensor]
) -> Tensor:
    """What the attention of a layer reads for all places of the rows, or for one of each, ``(R, T or 1, D)``."""
    attention, every, (cosine, sine) = layer.self_attn, torch.arange(len(where))[:, None], turns
    normed = layer.input_layernorm(states)

    def heads(projection: nn.Module, places: Tensor) -> Tensor:
        return projection(normed)[places].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    key, value = heads(attention.k_proj, where), heads(attention.v_proj, where)
    key, _ = apply_rotary_pos_emb(key, key, cosine, sine)
    seen = None
    if asking is None:
        query = heads(attention.q_proj, where)
    else:
        normed = normed[where[every, asking[:, None]]].squeeze(1)
        query = heads(attention.q_proj, every)
        cosine, sine = cosine[0, asking][:, None], sine[0, asking][:, None]
        seen = (torch.arange(where.shape[1]) <= asking[:, None])[:, None, None]
    query, _ = apply_rotary_pos_emb(query, query, cosine, sine)
    with torch.autocast("cpu", enabled=False):  # many small products, which bfloat16 makes slower
        read = functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=seen, is_causal=seen is None, enable_gqa=True
        )
    return read.transpose(1, 2).flatten(2)


def _outcome(layer: nn.Module, states: Tensor, read: Tensor) -> Tensor:
    """The states behind a layer, of those before it and what its attention read for them."""
    states = states + layer.self_attn.o_proj(read)
    return states + layer.mlp(layer.post_attention_layernorm(states))


class RewardModel(nn.Module):
    """Trained layers with the head of the label study, which reads standardized states."""

    def __init__(self, layers: UpperLayers, moments: tuple[np.ndarray, np.ndarray], seed: int) -> None:
        super().__init__()
        self.layers = copy.deepcopy(layers)
        self.center, self.spread = (torch.from_numpy(moment) for moment in moments)
        self.head = new_head(len(self.center), seed)

    def forward(self, states: States, answers: Tensor) -> tuple[Tensor, Tensor]:
        """``(A, D)`` what the head reads of answers, and their ``(A,)`` rewards."""
        with torch.autocast("cpu", torch.bfloat16, enabled=states.values.dtype == torch.bfloat16):
            made = torch.cat([self.layers(*states.of(some)) for some in answers.split(ROWS)])
        read = (made.float() - self.center) / self.spread
        return read, self.head(read).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all jobs share."""

    corpus: Corpus
    states: dict[str, States]
    layers: UpperLayers

    def answers(self, split: str, rows: np.ndarray) -> Tensor:
        """``(N, 2)`` numbers of the answers of pairs among the states."""
        return torch.from_numpy(self.corpus.splits[split]["places"][rows])


@dataclass(frozen=True, kw_only=True)
class Labeled:
    """The training pairs of a job with their labels, some of them wrong, and what the audit says of these."""

    moments: tuple[np.ndarray, np.ndarray]
    answers: Tensor  # (N, 2) numbers of the answers, that which is called the better one first
    score_gap: Tensor
    audit: Audit


def labeled(study: Study, job: Job, rows: np.ndarray) -> Labeled:
    """The pairs of these rows with the labels of ``job``; every method is trained on the same."""
    corpus = study.corpus
    moments = corpus.moments(LAYERS, rows)
    wrong = wrong_labels(job.noise, job.share, corpus.lengths[rows], job.seed)
    pairs = swapped(corpus.pairs("train", LAYERS, rows, *moments), wrong)
    audit = audit_of(pairs, corpus.prompts["train"][rows], corpus.answers[rows], wrong, job.seed)
    answers = study.answers("train", rows)
    answers[wrong] = answers[wrong].flip(1)
    return Labeled(moments=moments, answers=answers, score_gap=pairs.score_gap, audit=audit)


def trained(study: Study, method: LayersMethod, given: Labeled, seed: int) -> RewardModel:
    """A reward model by ``method``."""
    losses = losses_of(method, given.audit)
    model = RewardModel(study.layers, given.moments, seed)
    model.layers.requires_grad_(method.rate > 0)
    groups = [
        {"params": model.layers.parameters(), "lr": method.rate},
        {"params": model.head.parameters(), "lr": LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    plan = list(batches(len(given.answers), seed, epochs=EPOCHS, size=BATCH_PAIRS))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, total=len(plan)))
    for step in plan:
        read, rewards = model(study.states["train"], given.answers[step].T.flatten())
        chosen, rejected = read.split(len(step))
        batch = Pairs(chosen=chosen, rejected=rejected, score_gap=given.score_gap[step])
        optimizer.zero_grad()
        losses(batch, rewards.split(len(step)), step).mean().backward()
        optimizer.step()
        scheduler.step()
    return model.eval()


@torch.inference_mode()
def gaps(study: Study, model: RewardModel, split: str, rows: np.ndarray) -> np.ndarray:
    """``(N,)`` reward gaps of pairs, each answer read once."""
    numbers, places = study.answers(split, rows).unique(return_inverse=True)
    _, rewards = model(study.states[split], numbers)
    return (rewards[places[:, 0]] - rewards[places[:, 1]]).numpy()


def done(job: Job, study: Study) -> dict:
    """The records of one job: accuracies, and which test pairs were ranked rightly."""
    rows, held_out = study.corpus.fold(job.fold)
    watched = [("train", held_out)]
    if job.tests:
        watched = [(split, np.arange(len(study.corpus.prompts[split]))) for split in TITLES]
    given = labeled(study, job, rows)
    found: dict[str, dict] = {}
    for name, method in job.methods:
        assert isinstance(method, LayersMethod)
        model = trained(study, method, given, job.seed)
        judged = {split: gaps(study, model, split, some) for split, some in watched}
        names = {"train": "validation"}
        found[name] = {names.get(split, split): preference_accuracy(gap).value for split, gap in judged.items()}
        if job.tests:
            found[name]["right"] = {split: marks(gap) for split, gap in judged.items()}
    return {"share": given.audit.share, "area": given.audit.area, "methods": found}


def write_states(model_path: str, data: pathlib.Path, folder: pathlib.Path, dtype: torch.dtype) -> None:
    """Files of all splits, where they are not there yet: ``SPLIT.npz`` as of features.py, and ``SPLIT.pt``."""
    missing = [split for split in SPLITS["alpaca"] if not (folder / f"{split}.npz").is_file()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path, num_hidden_layers=LAYERS, dtype=dtype).eval()
    for split in missing:
        every = read_pairs(data, "alpaca", split)
        sides = {
            side: [token_ids(tokenizer, pair["prompt"] + pair[side], 2**20) for pair in every]
            for side in ("chosen", "rejected")
        }
        lengths = np.array([[len(row) for row in sides[side]] for side in sides])
        rows = np.flatnonzero((lengths <= LONGEST[split]).all(0))
        numbers: dict[tuple[int, ...], int] = {}
        places = np.array(
            [[numbers.setdefault(tuple(sides[side][row]), len(numbers)) for side in sides] for row in rows]
        )
        states, features = states_of(model, list(numbers), TRAINED)
        arrays = {f"{side}_tokens": lengths[place, rows] for place, side in enumerate(sides)}
        for place, side in enumerate(sides):
            scores = [every[row][f"{side}_score"] for row in rows]
            arrays |= {side: features[places[:, place]][:, None], f"{side}_score": np.array(scores, np.float32)}
        torch.save(vars(states), folder / f"{split}.pt")
        temporary = folder / f"{split}.tmp.npz"
        np.savez(temporary, rows=rows, places=places, layers=np.array([LAYERS]), **arrays)
        temporary.rename(folder / f"{split}.npz")
        print(f"{split}: {len(rows)} of {len(every)} pairs, {len(numbers)} answers, {len(states.values)} tokens")


def read_study(model_path: str, data: pathlib.Path, folder: pathlib.Path) -> Study:
    model = AutoModel.from_pretrained(model_path, num_hidden_layers=LAYERS, dtype=torch.float32)
    states = {
        split: States(**torch.load(folder / f"{split}.pt", mmap=True, weights_only=True)) for split in SPLITS["alpaca"]
    }
    return Study(corpus=read_corpus(folder, data), states=states, layers=UpperLayers(model, TRAINED))


def build_parser() -> argparse.ArgumentParser:
    parser = study_parser(__doc__, seeds=8, of="for each share of wrong labels", made="jobs")
    parser.add_argument("--model", required=True, help="Transformers folder of the backbone, a Llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="what is computed in")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of wrong labels")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing more after this time")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    return parser


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    if not (pathlib.Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: no folder of a model (it has no config.json)")
    until = time.monotonic() + 60 * options.minutes
    write_states(options.model, options.data, options.features, getattr(torch, options.dtype))
    options.output.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(options.features, options.data)
    with started(options.workers, read_study, options.model, options.data, options.features) as pool:
        path = options.output / "upper_runs.jsonl"
        ask = partial(results, path=path, fingerprint=corpus.fingerprint, pool=pool, work=done, until=until)
        rates = {f"{rate:g}": LayersMethod(rate=rate) for rate in RATES}
        taken, line = best(ask, "learning rate of the layers", rates, shares=(0.0,), tenths=TENTHS)
        rate = rates[taken].rate
        names = list(dict.fromkeys([BASELINE, *options.methods]))
        methods = tuple((name, LayersMethod(**{"rate": rate, **METHODS[name]})) for name in names)
        jobs = [
            Job(noise="uniform", share=share, seed=seed, fold=seed % FOLDS, methods=methods, tests=True)
            for seed, share in product(range(options.seeds), options.shares)
        ]
        found = dict(zip(jobs, ask(jobs), strict=True))
    records = {
        ("uniform", share): [record for job, record in found.items() if job.share == share] for share in options.shares
    }
    text = tables(records, names, corpus.prompts, [line])
    write_text(options.output / "upper_layers.md", text)
    print(text)


if __name__ == "__main__":
    main()
