"""Do audited labels make a better reward model where labels are wrong, and none a worse one where they are right?

The features, head, schedule and tests of study.py (step 1 is the same); what differs is what is made of the labels:

    python benchmarks/margin_study/label_study.py --features features/ --data DIR --output labels/

1. The loss for doubtful labels, its number and the scale of margins are chosen on held-out training prompts, with 20 %
   of the labels wrong, and from what estimated share on that loss is used.
2. Every method, with every share of wrong labels, from every seed. Wrong labels are drawn uniformly, or by length: of
   the pairs whose rejected answer is the longer one. The audit is one of the training pairs alone, made anew for every
   seed, and is told nothing.

Every finished job is a line of label_runs.jsonl in the output folder; started again, only missing methods are made. At
the end labels.md and label_study.png are written there.
"""

import argparse
import pathlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import matplotlib
import numpy as np
import torch
from jobs import TUNED_AT, Ask, Job, Method, best, results
from pairs import SPLITS
from report import mean_and_half_width, prompt_interval
from scipy import stats
from torch import Tensor
from training import (
    FOLDS,
    HIDDEN,
    WEIGHT_DECAY,
    Corpus,
    Pairs,
    batches,
    gaps,
    marks,
    new_head,
    read_corpus,
    schedule,
    started,
    study_parser,
)

from reward.audit.estimate import OutOfFold, judged
from reward.audit.margins import Differences
from reward.audit.mixture import fit_mixture, posterior_wrong
from reward.heads import NonNegativeHead, draws_of_heads
from reward.labels import Labels
from reward.margins import optimal_transport_margins
from reward.tables import LOSSES
from reward.weights import transport_weights
from rlhf.core.files import write_text
from rlhf.core.intervals import preference_accuracy
from rlhf.core.pictures import write_figure
from rlhf.data.options import LabelsConfig

matplotlib.use("Agg")
from matplotlib import pyplot

LEARNING_RATE = 1e-3
"""Chosen by study.py for Bradley-Terry with right labels."""
BASELINE = "Bradley-Terry"
Losses = Callable[[Pairs, tuple[Tensor, Tensor], Tensor], Tensor]
TITLES = {"id_test": "in distribution", "ood_test": "out of distribution"}  # of the tests that a data set may have
NOISES = {"uniform": (0.0, 0.1, 0.2, 0.3, 0.4), "by length": (0.2, 0.4)}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit of the training pairs says."""

    share: float
    area: float | None
    """The area under the curve of its ranking; ``None`` where nothing is wrong."""
    wrong: np.ndarray


def wrong_labels(noise: str, share: float, lengths: np.ndarray, seed: int) -> np.ndarray:
    """``(N,)`` bool, True where the annotator errs: anywhere, or where that makes the longer answer the chosen one."""
    draw = np.random.default_rng((seed, 1))
    able = np.flatnonzero(lengths[:, 1] > lengths[:, 0]) if noise == "by length" else np.arange(len(lengths))
    swapped = np.zeros(len(lengths), bool)
    swapped[draw.choice(able, size=min(len(able), round(share * len(lengths))), replace=False)] = True
    return swapped


def swapped(pairs: Pairs, where: np.ndarray) -> Pairs:
    places = torch.from_numpy(where)[:, None]
    chosen = torch.where(places, pairs.rejected, pairs.chosen)
    return Pairs(chosen=chosen, rejected=torch.where(places, pairs.chosen, pairs.rejected), score_gap=pairs.score_gap)


def audit_of(pairs: Pairs, prompts: np.ndarray, answers: np.ndarray, wrong: np.ndarray, seed: int) -> Audit:
    """The audit of pairs whose labels are those at hand; ``wrong`` judges it, and says how ``answers`` stand."""
    answers = np.where(wrong[:, None], answers[:, ::-1], answers)
    differences = Differences.of(pairs.chosen.double().numpy(), pairs.rejected.double().numpy(), answers)
    groups = np.arange(len(pairs), dtype=np.uint64)
    margins, _, _ = judged(
        OutOfFold(differences=differences, prompts=prompts.astype(np.uint64), groups=groups, seed=seed)
    )
    fitted = fit_mixture(margins)
    area = None
    if wrong.any():
        ranks = stats.mannwhitneyu(-margins[wrong], -margins[~wrong]).statistic
        area = float(ranks / (wrong.sum() * (~wrong).sum()))
    return Audit(share=fitted.share, area=area, wrong=posterior_wrong(margins, fitted.share, fitted.temperature))


def trained(method: Method, pairs: Pairs, audit: Audit, seed: int) -> Callable[[Tensor], Tensor]:
    """Rewards of ``(N, D)`` features, ``(N, 1)``, by the head or heads that ``method`` makes of the labels at hand."""
    suspected = audit.wrong > LabelsConfig().above
    if method.use == "swap":
        pairs = swapped(pairs, suspected)
    if method.use == "drop":
        pairs = pairs[torch.from_numpy(np.flatnonzero(~suspected))]
        audit = replace(audit, wrong=audit.wrong[~suspected])
    losses = losses_of(method, audit)
    draws = draws_of_heads(method.heads, torch.arange(len(pairs)), seed).float()
    heads = []
    for number in range(method.heads):
        counts = draws[:, number] if method.heads > 1 else torch.ones(len(pairs))
        heads.append(_head(method, losses, counts, pairs, seed + 7919 * number))
    return lambda features: torch.stack([head(features) for head in heads]).mean(0)


def losses_of(method: Method, audit: Audit) -> Losses:
    """The losses of a method, ``(B,)``, from a batch, the rewards of its sides, and its places in the audit."""
    loss, options = method.loss, dict(method.options)
    if audit.share < method.found:
        loss, options = "bradley_terry", {}
    if method.share:
        options["wrong_share"] = min(audit.share, 0.45)
    soft = method.use in ("soft", "weight")
    config = LabelsConfig(kind="audited" if soft else "as_given", use=method.use if soft else "soft")
    labels = Labels(config, audit.wrong)

    def losses(batch: Pairs, sides: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        margins = None
        if method.transport:
            found = optimal_transport_margins(batch.chosen, batch.rejected, *sides, reward_cost="abs")
            margins = method.transport * found.margins

        def of(opposite: bool) -> Tensor:
            return LOSSES[loss](*(reversed(sides) if opposite else sides), margins, **options)

        return labels.losses(of, rows)

    return losses


def _head(method: Method, losses_of_batch: Losses, counts: Tensor, pairs: Pairs, seed: int) -> torch.nn.Module:
    """One head, trained; ``counts`` says how often each pair counts."""
    width = pairs.chosen.shape[1]
    head: torch.nn.Module = new_head(width, seed)
    if method.bayesian is not None:
        head = NonNegativeHead(width, HIDDEN)
        head.start(1.0, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    plan = list(batches(len(pairs), seed))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, total=len(plan)))
    for rows in plan:
        batch = pairs[rows]
        both, penalty = torch.cat([batch.chosen, batch.rejected]), torch.zeros(())
        if method.bayesian is None:
            rewards = head(both).squeeze(1)
        else:
            rewards, _, divergences = head(both, in_full=True)
            local, dictionary = divergences.unbind(1)
            penalty = method.bayesian * (local.sum() / len(batch) + dictionary[0] / len(pairs))
        sides = rewards.split(len(batch))
        losses = counts[rows] * losses_of_batch(batch, sides, rows)
        if method.mass < 1:
            losses = losses * transport_weights(batch.chosen, batch.rejected, *sides, mass=method.mass).weights
        optimizer.zero_grad()
        (losses.mean() + penalty).backward()
        optimizer.step()
        scheduler.step()
    return head.eval()


def done(job: Job, corpus: Corpus) -> dict:
    """The records of one job: accuracies, and at the end which test pairs were ranked rightly."""
    rows, held_out = corpus.fold(job.fold)
    layer = int(corpus.splits["train"]["layers"][0])
    moments = corpus.moments(layer, rows)
    wrong = wrong_labels(job.noise, job.share, corpus.lengths[rows], job.seed)
    pairs = swapped(corpus.pairs("train", layer, rows, *moments), wrong)
    audit = audit_of(pairs, corpus.prompts["train"][rows], corpus.answers[rows], wrong, job.seed)
    watched = {"validation": corpus.pairs("train", layer, held_out, *moments)}
    if job.tests:
        sizes = {split: np.arange(len(corpus.prompts[split])) for split in TITLES if split in corpus.prompts}
        watched = {split: corpus.pairs(split, layer, every, *moments) for split, every in sizes.items()}
    found: dict[str, dict] = {}
    for name, method in job.methods:
        head = trained(method, pairs, audit, job.seed)
        judged_gaps = {split: gaps(head, some) for split, some in watched.items()}
        found[name] = {split: preference_accuracy(gap).value for split, gap in judged_gaps.items()}
        if job.tests:
            found[name]["right"] = {split: marks(gap) for split, gap in judged_gaps.items()}
    return {"share": audit.share, "area": audit.area, "methods": found}


LOSS_CANDIDATES = {
    "generalized cross-entropy": [("generalized_cross_entropy", (("q", q),)) for q in (0.3, 0.5, 0.7, 0.9)],
}
TRANSPORT_CANDIDATES = (0.5, 1.0, 2.0, 4.0)
MASS_CANDIDATES = (0.6, 0.7, 0.8, 0.9)
DIVERGENCE_CANDIDATES = (1e-6, 1e-5, 1e-4, 1e-3)
HEADS = 3
FOUND_CANDIDATES = (0.03, 0.06, 0.1)


def chosen(ask: Ask) -> tuple[dict[str, Method], list[str]]:
    """The methods of the comparison with their numbers, and lines on what was tried."""
    said = []

    def take(title: str, candidates: dict[str, Method], shares: tuple[float, ...] = (TUNED_AT,)) -> str:
        taken, line = best(ask, title, candidates, shares=shares)
        said.append(line)
        return taken

    fading = {
        f"q {options[0][1]:g}": Method(loss=loss, options=options)
        for loss, options in LOSS_CANDIDATES["generalized cross-entropy"]
    }
    alone = fading[take("generalized cross-entropy", fading)]
    soft = {name: Method(use="soft", loss=method.loss, options=method.options) for name, method in fading.items()}
    with_soft = soft[take("the same with soft labels", soft)]
    scales = {f"scale {scale:g}": Method(transport=scale) for scale in TRANSPORT_CANDIDATES}
    scale = scales[take("OT margins", scales)].transport
    masses = {f"mass {mass:g}": Method(mass=mass) for mass in MASS_CANDIDATES}
    mass = masses[take("partial transport", masses)].mass
    divergences = {f"weight {weight:g}": Method(bayesian=weight) for weight in DIVERGENCE_CANDIDATES}
    bayesian = divergences[take("BNRM", divergences)].bayesian
    from_share = {
        f"from {100 * found:g} %": Method(use="soft", loss=with_soft.loss, options=with_soft.options, found=found)
        for found in FOUND_CANDIDATES
    }
    found = from_share[take("soft labels with it from this estimate on", from_share, (0.0, 0.1, TUNED_AT))].found
    both = {"use": "soft", "loss": with_soft.loss, "options": with_soft.options, "found": found}
    methods = {
        BASELINE: Method(),
        "generalized cross-entropy": alone,
        "backward correction": Method(loss="robust", share=True),
        "forward correction": Method(loss="forward_robust", share=True),
        "swapped": Method(use="swap"),
        "dropped": Method(use="drop"),
        "weighted": Method(use="weight"),
        "soft": Method(use="soft"),
        "soft, GCE if found": Method(**both),
        "OT margins": Method(transport=scale),
        "OT margins, soft": Method(use="soft", transport=scale),
        "partial transport": Method(mass=mass),
        "partial transport, soft": Method(use="soft", mass=mass),
        "BNRM": Method(bayesian=bayesian),
        "BNRM, soft": Method(use="soft", bayesian=bayesian),
        f"{HEADS} heads": Method(heads=HEADS),
        f"{HEADS} heads, soft": Method(use="soft", heads=HEADS),
    }
    return methods, said


def tables(records: dict[tuple[str, float], list[dict]], methods: list[str], prompts: dict, tuned: list[str]) -> str:
    """What the audits said, differences to Bradley-Terry with intervals over seeds and prompts, and what was tuned."""
    seeds = len(next(iter(records.values())))
    parts = ["| wrong labels | estimated, % | sd | area under the curve |", "|---|---|---|---|"]
    parts += [_audits(f"{noise}, {share:.0%}", found) for (noise, share), found in records.items()]
    for split in [split for split in TITLES if split in prompts]:
        parts.append(
            f"\nAccuracy {TITLES[split]}: of {BASELINE} in %, of the others minus that, points, mean over {seeds} "
            "seeds with the 95 % interval over seeds and test prompts (a star: without 0):\n"
        )
        parts.append("| method | " + " | ".join(f"{noise}, {share:.0%}" for noise, share in records) + " |")
        parts.append("|---" * (len(records) + 1) + "|")
        parts += [_row(name, records.values(), split, prompts[split]) for name in methods]
    parts.append("\nValidation accuracy on held-out training prompts, % (bold: taken):\n")
    parts += ["| number | candidates |", "|---|---|", *tuned]
    return "\n".join(parts) + "\n"


def _audits(case: str, found: list[dict]) -> str:
    estimates = 100 * np.array([record["share"] for record in found])
    areas = [record["area"] for record in found if record["area"] is not None]
    area = f"{np.mean(areas):.3f}" if areas else ""
    return f"| {case} | {estimates.mean():.1f} | {estimates.std(ddof=1):.1f} | {area} |"


def _row(name: str, cases: Iterable[list[dict]], split: str, prompts: np.ndarray) -> str:
    cells = [name]
    for found in cases:
        ours, theirs = ([record["methods"][method] for record in found] for method in (name, BASELINE))
        mean, baseline = (100 * float(np.mean([record[split] for record in group])) for group in (ours, theirs))
        if name == BASELINE:
            cells.append(f"{baseline:.1f}")
            continue
        low, high = (100 * bound for bound in prompt_interval(ours, theirs, split, prompts))
        star = "" if low <= 0 <= high else " *"
        cells.append(f"{mean - baseline:+.1f} [{low:+.1f}, {high:+.1f}]{star}")
    return "| " + " | ".join(cells) + " |"


def plot(records: dict[tuple[str, float], list[dict]], tests: tuple[str, ...], target: pathlib.Path) -> None:
    """Draw the difference to Bradley-Terry against the share of uniformly wrong labels."""
    shown = {
        "generalized cross-entropy": "#56B4E9",
        "swapped": "#009E73",
        "soft": "#E69F00",
        "soft, GCE if found": "#D55E00",
        "OT margins": "#CC79A7",
        "partial transport": "#0072B2",
        "BNRM": "#000000",
    }
    size = (5.5 * len(tests), 4.2)
    figure, [axes] = pyplot.subplots(1, len(tests), figsize=size, sharey=True, squeeze=False, constrained_layout=True)
    for axis, split in zip(axes, tests, strict=True):
        for place, (name, color) in enumerate(shown.items()):
            shares, means, halves = [], [], []
            for (noise, share), found in records.items():
                if noise != "uniform":
                    continue
                values = [r["methods"][name][split] - r["methods"][BASELINE][split] for r in found]
                mean, half = mean_and_half_width(100 * np.array(values))
                shares.append(100 * share + 0.35 * (place - 3))
                means.append(mean)
                halves.append(half)
            axis.errorbar(shares, means, yerr=halves, color=color, marker="o", ms=4, lw=1.3, capsize=2, label=name)
        axis.axhline(0, color="black", lw=1)
        axis.set_title(TITLES[split])
        axis.set_xlabel("wrong training labels, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy minus Bradley-Terry, points")
    axes[0].legend(fontsize=8, loc="upper left")
    write_figure(target, figure, dpi=110)
    pyplot.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = study_parser(__doc__, seeds=10, of="for each noise and share of wrong labels", made="jobs")
    parser.add_argument("--data-set", choices=SPLITS, default="alpaca", help="which pairs the features are of")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing more after this time")
    cases = [(noise, share) for noise, shares in NOISES.items() for share in shares]
    parser.add_argument(
        "--cases",
        nargs="+",
        type=_case,
        default=cases,
        metavar="NOISE:SHARE",
        help="wrong labels, such as uniform:0.2 (default: all)",
    )
    return parser


def _case(text: str) -> tuple[str, float]:
    noise, _, share = text.partition(":")
    if noise not in NOISES or float(share) not in NOISES[noise]:
        known = ", ".join(f"{name}:{share:g}" for name, shares in NOISES.items() for share in shares)
        raise argparse.ArgumentTypeError(f"{text}: not one of {known}")
    return noise, float(share)


def main() -> None:
    options = build_parser().parse_args()
    start = options.features, options.data, options.data_set
    corpus = read_corpus(*start)
    options.output.mkdir(parents=True, exist_ok=True)
    with started(options.workers, read_corpus, *start) as pool:
        path, until = options.output / "label_runs.jsonl", time.monotonic() + 60 * options.minutes
        ask = partial(results, path=path, fingerprint=corpus.fingerprint, pool=pool, work=done, until=until)
        methods, tuned = chosen(ask)
        cases = list(options.cases)
        jobs = [
            Job(noise=noise, share=share, seed=seed, fold=seed % FOLDS, methods=tuple(methods.items()), tests=True)
            for seed, (noise, share) in product(range(options.seeds), cases)
        ]
        found = dict(zip(jobs, ask(jobs), strict=True))
    records = {
        (noise, share): [record for job, record in found.items() if (job.noise, job.share) == (noise, share)]
        for noise, share in cases
    }
    text = tables(records, list(methods), corpus.prompts, tuned)
    write_text(options.output / "labels.md", text)
    plot(records, SPLITS[options.data_set][1:], options.output / "label_study.png")
    print(text)


if __name__ == "__main__":
    main()
