"""Our objectives against the methods of TRL's trainers, called on the same tensors: values and gradients."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from policy.preference.losses import LOSSES
from policy.preference.modifiers import divergence_scores, length_desensitized, wpo_weights
from policy.preference.pair_losses import sigmoid_loss
from tests.lacking import imported

PAIRS, PROMPT = 5, 3
LENGTHS = torch.tensor([6, 4, 9, 1, 7, 5, 8, 2, 9, 3])  # chosen rows, then rejected rows
SETTINGS = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "loss_weights": [1.0],
}
ACCELERATOR = SimpleNamespace(device="cpu", gather_for_metrics=lambda tensor: tensor, gather=lambda tensor: tensor)
TRAINER = {
    "model": SimpleNamespace(training=False),
    "accelerator": ACCELERATOR,
    "aux_loss_enabled": False,
    "precompute_ref_logps": True,
    "_total_train_tokens": 0,
}


@pytest.fixture(scope="module")
def trl():
    return imported("trl")


class Rows:
    """Token log-probabilities of responses that follow prompts of three tokens, as a model with a head fused in."""

    def __init__(self, lengths=LENGTHS, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.positions = torch.arange(PROMPT + int(lengths.max())) - PROMPT
        self.mask = (self.positions >= 0) & (self.positions < lengths[:, None])
        shape = self.mask[:, 1:].shape
        self.tokens = (-3 * torch.rand(shape, generator=generator, dtype=dtype)).requires_grad_()
        self.square_sums = -3 * torch.rand(shape, generator=generator, dtype=dtype)
        self.reference = -3 * torch.rand(shape, generator=generator, dtype=dtype)

    def sums(self, tokens, select=None):
        mask = self.mask if select is None else self.mask & select
        return (tokens * mask[:, 1:]).sum(1)

    def model(self, **_):
        zeros = torch.zeros_like(self.square_sums)
        return SimpleNamespace(
            log_probs=self.tokens * self.mask[:, 1:],
            log_sum_sq_probs=self.square_sums,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    def inputs(self, reference):
        chosen, rejected = reference.chunk(2)
        ones = torch.ones_like(self.mask, dtype=torch.long)
        inputs = {"input_ids": ones, "attention_mask": ones, "completion_mask": self.mask.long()}
        return inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def columns(self):
        columns = {"logprobs": self.sums(self.tokens), "lengths": self.lengths.to(self.tokens.dtype)}
        columns["logratios"] = columns["logprobs"] - self.sums(self.reference)
        pairs = {name: column.chunk(2) for name, column in columns.items()}
        return {f"{side}_{name}": pairs[name][row] for row, side in enumerate(("chosen", "rejected")) for name in pairs}


def dpo_trainer_loss(trl, rows, loss_types, reference=None, **settings):
    settings = SETTINGS | settings
    args = SimpleNamespace(discopop_tau=settings.pop("discopop_tau"))
    metrics = {"eval": defaultdict(list)}
    trainer = SimpleNamespace(**TRAINER, **settings, loss_types=loss_types, args=args, _metrics=metrics)
    reference = rows.sums(rows.reference) if reference is None else reference
    return trl.DPOTrainer._compute_loss(trainer, rows.model, rows.inputs(reference), False)


def ours(name, columns, **options):
    inputs = {key: columns[key] for key in LOSSES[name].inputs}
    return LOSSES[name](**inputs, **options)


def assert_same(theirs, our_losses, variable, rtol=1e-6):
    """Equal in value, and in gradient, which is not zero."""
    (their_gradient,) = torch.autograd.grad(theirs, variable)
    (our_gradient,) = torch.autograd.grad(our_losses, variable)
    torch.testing.assert_close(our_losses, theirs, rtol=rtol, atol=1e-9)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=rtol, atol=1e-9)
    assert bool((their_gradient != 0).any())


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("sigmoid", {}, {}),
        ("hinge", {}, {}),
        ("ipo", {}, {}),
        ("ipo", {"beta": 0.7}, {"beta": 0.7}),
        ("exo_pair", {}, {"label_smoothing": 1e-3}),
        ("exo_pair", {"smoothing": 0.2}, {"label_smoothing": 0.2}),
        ("nca_pair", {}, {"beta": 0.01}),
        ("robust", {}, {"label_smoothing": 0.1}),
        ("bco_pair", {"mean_logratio": 0.0}, {}),
        ("sppo_hard", {}, {"beta": 0.001}),
        ("aot", {}, {"beta": 0.01}),
        ("aot", {"smoothing": 0.2, "beta": 0.5}, {"label_smoothing": 0.2, "beta": 0.5}),
        ("aot_unpaired", {}, {"beta": 0.01}),
        ("aot_unpaired", {"smoothing": 0.2, "beta": 0.5}, {"label_smoothing": 0.2, "beta": 0.5}),
        ("apo_zero", {}, {}),
        ("apo_down", {}, {}),
        ("discopop", {}, {"beta": 0.05}),
        ("discopop", {"tau": 0.7}, {"beta": 0.05, "discopop_tau": 0.7}),
        ("sigmoid_norm", {}, {"beta": 5.0}),
    ],
)
def test_dpo_trainer(trl, name, options, settings):
    rows = Rows()
    theirs = dpo_trainer_loss(trl, rows, [name], **settings)
    assert_same(theirs, ours(name, rows.columns(), **options).mean(), rows.tokens)


def test_sft_where_chosen_responses_are_of_one_length(trl):
    rows = Rows(torch.tensor([4, 4, 4, 2, 7, 3]))
    assert_same(dpo_trainer_loss(trl, rows, ["sft"]), ours("sft", rows.columns()).mean(), rows.tokens)


def test_a_weighted_sum_of_losses(trl):
    rows = Rows(torch.tensor([4, 4, 4, 2, 7, 3]))
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    theirs = dpo_trainer_loss(trl, rows, list(weights), loss_weights=list(weights.values()))
    options = {"bco_pair": {"mean_logratio": 0.0}}
    columns = rows.columns()
    total = sum(weight * ours(name, columns, **options.get(name, {})) for name, weight in weights.items())
    assert_same(theirs, total.mean(), rows.tokens)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "sigmoid_norm", "discopop"])
@pytest.mark.parametrize(
    ("kind", "theirs", "alpha"),
    [
        ("forward_kl", "forward_kl", 0.5),
        ("js", "js_divergence", 0.5),
        ("alpha", "alpha_divergence", 0.5),
        ("alpha", "alpha_divergence", 0.2),
        ("alpha", "alpha_divergence", 1.0),
    ],
)
def test_divergences(trl, name, kind, theirs, alpha):
    rows = Rows(dtype=torch.float32)  # TRL's alpha divergence knows no float64
    loss = dpo_trainer_loss(trl, rows, [name], beta=0.1, f_divergence_type=theirs, f_alpha_divergence_coef=alpha)
    columns = rows.columns()
    for side in ("chosen_logratios", "rejected_logratios"):
        columns[side] = divergence_scores(columns[side], kind, alpha)
    assert_same(loss, ours(name, columns, beta=0.1).mean(), rows.tokens, rtol=1e-5)


def test_wpo_weights(trl):
    rows = Rows()
    theirs = dpo_trainer_loss(trl, rows, ["sigmoid"], use_weighting=True)
    square_sums = rows.sums(rows.square_sums).chunk(2)
    columns = rows.columns()
    weights = wpo_weights(
        columns["chosen_logprobs"],
        square_sums[0],
        columns["chosen_lengths"],
        columns["rejected_logprobs"],
        square_sums[1],
        columns["rejected_lengths"],
    )
    assert float(weights.max()) > 1 > float(weights.min())
    assert_same(theirs, (weights * ours("sigmoid", columns)).mean(), rows.tokens)


def test_ld_dpo(trl):
    rows = Rows()
    shorter = torch.minimum(*rows.lengths.chunk(2)).repeat(2)[:, None]
    inside = rows.positions < shorter

    def desensitized(tokens):
        return length_desensitized(rows.sums(tokens, inside), rows.sums(tokens, ~inside), 0.3)

    theirs = dpo_trainer_loss(trl, rows, ["sigmoid"], desensitized(rows.reference), ld_alpha=0.3)
    chosen, rejected = (desensitized(rows.tokens) - desensitized(rows.reference)).chunk(2)
    assert_same(theirs, sigmoid_loss(chosen, rejected).mean(), rows.tokens)


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("cpo", {"loss_type": "sigmoid"}, {"nll_weight": 0.0}),
        ("cpo", {"loss_type": "sigmoid", "label_smoothing": 0.2}, {"nll_weight": 0.0, "smoothing": 0.2}),
        ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}, {}),
        ("simpo", {"loss_type": "simpo", "beta": 5.0, "simpo_gamma": 0.3}, {"beta": 5.0, "gamma": 0.3}),
    ],
)
def test_cpo_trainer(trl, name, settings, options):
    imported("trl.experimental.cpo")
    from trl.experimental.cpo import CPOTrainer

    rows = Rows()
    columns = rows.columns()
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "alpha": 0.0, "accelerator": ACCELERATOR}
    trainer = SimpleNamespace(**defaults | settings)
    scale = rows.lengths if name == "simpo" else torch.ones_like(rows.lengths)
    chosen, rejected = (rows.sums(rows.tokens) / scale).chunk(2)
    theirs = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
    assert_same(theirs.mean(), ours(name, columns, **options).mean(), rows.tokens)


def test_orpo_trainer(trl):
    imported("trl.experimental.orpo")
    from trl.experimental.orpo import ORPOTrainer

    rows = Rows(dtype=torch.float32)
    columns = rows.columns()
    trainer = SimpleNamespace(beta=0.1, accelerator=ACCELERATOR)
    chosen, rejected = (rows.sums(rows.tokens) / rows.lengths).chunk(2)
    theirs = -chosen - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    assert_same(theirs.mean(), ours("orpo", columns).mean(), rows.tokens, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_kto_trainer(trl, sign):
    rows, mismatched = Rows(), Rows(seed=1)
    labels = torch.tensor([True, False, False, True, True, False, True, False, False, False])
    logratios = rows.sums(rows.tokens) - rows.sums(rows.reference)
    kl_reference = (mismatched.sums(mismatched.tokens) - sign * 2.5).detach()
    inputs = rows.inputs(rows.sums(rows.reference))
    inputs |= {f"KL_{name}": inputs[name] * 2 for name in ("input_ids", "attention_mask", "completion_mask")}
    inputs |= {"label": labels, "ref_logps": rows.sums(rows.reference), "ref_KL_logps": kl_reference}
    del inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]

    trainer = object.__new__(trl.KTOTrainer)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    settings = {"beta": 0.2, "loss_type": "kto", "calculate_KL": True, "_metrics": {"eval": defaultdict(list)}}
    trainer.__dict__.update(TRAINER | weights | settings)

    def model(input_ids, **_):
        return mismatched.model() if int(input_ids[0, 0]) == 2 else rows.model()

    theirs = trainer._compute_loss(model, inputs, False)
    losses = LOSSES["kto"](logratios=logratios, labels=labels, kl=sign * 2.5, beta=0.2, **weights)
    assert_same(theirs, losses.mean(), rows.tokens)
