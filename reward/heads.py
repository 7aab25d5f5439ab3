"""Heads of reward models: what makes a reward of a state, computed in float32 whatever the weights are kept in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlhf.core.checks import check_same_shape
from rlhf.core.errors import ModelError
from rlhf.core.heads import HEAD_NAMES

EULER = 0.5772156649015329
LEAST_SCALE = 1e-10
"""Scales of Weibull variables are bounded from below by it inside logarithms, as in the code of BNRM."""
LARGEST_SHAPE = 1e4


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the precision of its weights."""

    def forward(self, values: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(values.float(), self.weight.float(), bias)


def weibull_moments(mean: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    r"""Scale and variance of Weibull variables of a given mean and shape.

        scale = mean / Gamma(1 + 1/k),   variance = mean^2 (Gamma(1 + 2/k) / Gamma(1 + 1/k)^2 - 1)

    Args:
        mean: not negative; at 0 the variable is 0 for sure.
        shape: k above 0, broadcast against ``mean``. Towards infinity the variance vanishes.
    """
    first = torch.lgamma(1 + 1 / shape)
    return mean * torch.exp(-first), mean.square() * torch.expm1(torch.lgamma(1 + 2 / shape) - 2 * first)


def weibull_gamma_divergence(scale: Tensor, shape: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    r"""Kullback-Leibler divergence of Weibull variables from a Gamma prior, element by element, in nats.

        KL = e a/k - a log l + log k + b l Gamma(1 + 1/k) - e - 1 - a log b + log Gamma(a)

    Args:
        scale: l above 0.
        shape: k above 0, broadcast against ``scale``.
        alpha: shape a of the prior; 1 is the exponential distribution.
        beta: rate b of the prior.
    References:
        Zhang et al. (ICLR 2018), Weibull hybrid autoencoding inference, eq. 9; e is Euler's constant.
    """
    mean = scale * torch.exp(torch.lgamma(1 + 1 / shape))
    prior = math.lgamma(alpha) - alpha * math.log(beta)
    return EULER * alpha / shape - alpha * torch.log(scale) + torch.log(shape) + beta * mean - EULER - 1 + prior


@dataclass(frozen=True)
class Judged:
    """What a head says of R states, in full."""

    rewards: Tensor
    """``(R,)`` float32: drawn at random in training, means otherwise; of several heads, their mean."""
    variances: Tensor | None = None
    """``(R,)`` float32 variances of the reward, without gradient."""
    divergences: Tensor | None = None
    """``(R, 2)`` float32, in nats: of the local factors of each row from their prior, and, the same for all rows, of
    the dictionary from its own."""
    each: Tensor | None = None
    """``(R, H)`` float32 rewards of the single heads."""


class NonNegativeHead(nn.Module):
    r"""Bayesian non-negative reward model: a reward is a sum of non-negative factors times non-negative weights.

        theta_ij ~ Weibull of mean relu(W x_i + b)_j and shape 1 + softplus(v.x_i + c)      local factors of the answer
        phi_j    ~ Weibull of mean relu(w_j) and shape 1 + softplus(s_j)                    the dictionary
        r_i      = sum_j theta_ij phi_j

    All are independent, so that mean and variance of a reward are known. In training both are drawn, outside means
    are used: a head of two layers. A weight that falls to 0 stays there: the dictionary is sparse.

    Without local factors the factors are the states themselves and their negatives, ``r_i = sum_j (phi_j - phi'_j)
    x_ij``: the mean is a linear head.

    Args:
        width: D, of the states.
        factors: how many; 0 for none that are local.
    References:
        Duan et al. (ICML 2026), arXiv:2602.10623, and its code, whose prior is Gamma(1, 1) and whose factors are those
        of a two-layer network. Its amortized shape of the dictionary is a parameter of each weight here, its bias,
        which no pair can tell, is left out; docs/papers.md has all that differs.
    """

    def __init__(self, width: int, factors: int) -> None:
        super().__init__()
        self.local = factors > 0
        if self.local:
            self.factors = Float32Linear(width, factors)
            self.spread = Float32Linear(width, 1)
        self.dictionary = nn.Parameter(torch.empty(factors or 2 * width))
        self.dictionary_shape = nn.Parameter(torch.zeros(factors or 2 * width))

    @torch.no_grad()
    def start(self, scale: float, generator: torch.Generator) -> None:
        """New weights: all rewards start near 0, the dictionary above 0 and as wide as its prior."""
        drawn = torch.randn(self.dictionary.shape, generator=generator, dtype=torch.float32).abs()
        self.dictionary.copy_(drawn * scale / (len(drawn) + 1))
        self.dictionary_shape.zero_()
        if self.local:
            draw(self.factors, (3 * self.factors.in_features) ** -0.5, generator)
            draw(self.spread, (3 * self.spread.in_features) ** -0.5, generator)

    def forward(self, states: Tensor, in_full: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """``(..., 1)`` rewards of ``(..., D)`` states; with ``in_full``, of ``(R, D)``, all that is known of them: the
        first three fields of :class:`Judged`, as a tuple, which is what DeepSpeed finds tensors in.
        """
        states = states.float()
        weight = F.relu(self.dictionary.float())
        shape = 1 + F.softplus(self.dictionary_shape.float()).clamp(max=LARGEST_SHAPE)
        weight_scale, weight_variance = weibull_moments(weight, shape)
        weights = _drawn(weight_scale, shape) if self.training else weight
        divergence = weibull_gamma_divergence(weight_scale.clamp(min=LEAST_SCALE), shape).sum()
        if not self.local:
            both = torch.cat([states, -states], dim=-1)
            rewards = both @ weights
            variances = states.square() @ sum(weight_variance.chunk(2))
            local = torch.zeros_like(rewards)
        else:
            mean = F.relu(self.factors(states))
            spread = 1 + F.softplus(self.spread(states)).clamp(max=LARGEST_SHAPE)
            scale, variance = weibull_moments(mean, spread)
            rewards = (_drawn(scale, spread) if self.training else mean) @ weights
            variances = variance @ (weight_variance + weight.square()) + mean.square() @ weight_variance
            local = weibull_gamma_divergence(scale.clamp(min=LEAST_SCALE), spread).sum(-1)
        if not in_full:
            return rewards.unsqueeze(-1)
        divergences = torch.stack([local, divergence.expand(len(local))], dim=-1)
        return rewards, variances.detach(), divergences


class Heads(Float32Linear):
    """Several linear heads on one backbone; the reward is their mean."""


def judge(head: nn.Module, states: Tensor) -> Judged:
    """All that a head says of ``(R, D)`` states."""
    if isinstance(head, NonNegativeHead):
        return Judged(*head(states, in_full=True))
    if isinstance(head, Heads):
        each = head(states)
        return Judged(each.mean(-1), each=each)
    return Judged(head(states).squeeze(-1))


def mlp_head(width: int, hidden: int) -> nn.Sequential:
    """Two layers, as in GRM."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))


@torch.no_grad()
def mean_head(head: nn.Module) -> nn.Module:
    """A plain head that gives the mean reward: linear, or of two layers where factors are local."""
    if isinstance(head, NonNegativeHead) and head.local:
        two = mlp_head(head.factors.in_features, head.factors.out_features).to(head.dictionary)
        first, last = (layer for layer in two if isinstance(layer, nn.Linear))
        first.load_state_dict(head.factors.state_dict())
        last.weight.copy_(F.relu(head.dictionary)[None])
        last.bias.zero_()
        first.__class__ = last.__class__ = Float32Linear
        return two
    if isinstance(head, NonNegativeHead):
        above, below = F.relu(head.dictionary).chunk(2)
        weight = (above - below)[None]
    elif isinstance(head, Heads):
        weight = head.weight.mean(dim=0, keepdim=True)
    else:
        return head
    linear = Float32Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype, device=weight.device)
    linear.weight.copy_(weight)
    return linear


@torch.no_grad()
def draw(layer: nn.Linear, deviation: float, generator: torch.Generator) -> None:
    """New weights of a layer of a head, bias 0: the same ones in every precision, whatever was drawn before."""
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32) * deviation)
    if layer.bias is not None:
        layer.bias.zero_()


def draws_of_heads(heads: int, indices: Tensor, seed: int) -> Tensor:
    r"""``(B, H)`` how often each head counts pairs: drawn with replacement for each, so that they come to differ.

    Poisson numbers of mean 1, which the draws of a large bootstrap sample are. They depend on seed, head and pair
    alone, never on ranks or micro-batches.

    Args:
        heads: H.
        indices: ``(B,)`` int64 places in the training data.
        seed: of the run.
    References:
        Efron and Tibshirani (1993); Poisson draws: Oza and Russell (2001), Online bagging.
    """
    numbers = indices.cpu().long()[:, None] * 1_000_003 + torch.arange(heads) * 7_919 + seed * 104_729 + 1
    mixed = numbers
    for factor in (0x9E3779B97F4A7C1, 0xBF58476D1CE4E5B, 0x94D049BB133111EB & 0x7FFFFFFFFFFFFFF):
        mixed = (mixed ^ (mixed >> 29)) * factor
    uniform = ((mixed >> 11) & ((1 << 40) - 1)).double() / (1 << 40)
    counts, term, total = torch.zeros_like(uniform), math.exp(-1), 0.0
    for number in range(1, 12):
        total = total + term
        counts += (uniform >= total).double()
        term = term / number
    return counts


def _drawn(scale: Tensor, shape: Tensor) -> Tensor:
    """Weibull variables by inversion, with gradient."""
    check_same_shape(scale=scale, uniform=(uniform := torch.rand_like(scale)))
    return scale * (-torch.log1p(-uniform)).clamp(min=LEAST_SCALE).pow(1 / shape)


def find_head(hf: PreTrainedModel) -> nn.Module:
    for name in HEAD_NAMES:
        if hasattr(hf, name):
            return getattr(hf, name)
    raise ModelError(f"{type(hf).__name__} has neither of the heads {', '.join(HEAD_NAMES)}")


def linear_layers(head: nn.Module) -> list[nn.Linear]:
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


def with_float32_head(hf: PreTrainedModel) -> PreTrainedModel:
    for layer in linear_layers(find_head(hf)):
        if type(layer) is nn.Linear:
            layer.__class__ = Float32Linear
    return hf
