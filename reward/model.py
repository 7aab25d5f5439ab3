"""The reward model: a backbone, pooled at the last real token, and a float32 head."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from reward.config import RewardModelConfig
from reward.heads import Float32Linear, Heads, NonNegativeHead, draw, judge, mean_head, mlp_head
from reward.self_check import check_scores
from rlhf.core.errors import ModelError
from rlhf.core.files import write_json
from rlhf.core.heads import HEAD_NAMES
from rlhf.core.logprobs import response_logprobs
from rlhf.core.masking import last_token_index
from rlhf.data.batching import LengthBucket, token_blocks
from rlhf.models import backbones
from rlhf.models.adapters import merge_adapters
from rlhf.models.hidden_states import backbone_of, last_states
from rlhf.models.kernels import apply_kernels, exact_attention
from rlhf.models.options import BackboneConfig
from rlhf.models.trainable import make_trainable
from rlhf.models.weight_files import stored_type

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Scores:
    """What the model says about R rows."""

    rewards: Tensor
    """``(R,)`` float32 rewards in logits."""
    embeddings: Tensor
    """``(R, D)`` input of the head: the last layer's state at the last real token."""
    logprobs: Tensor | None = None
    """``(R,)`` summed log-probabilities of the response tokens under the language-model head."""
    variances: Tensor | None = None
    """``(R,)`` float32 variances of the rewards, where the head knows them."""
    divergences: Tensor | None = None
    """``(R, 2)`` see :class:`reward.heads.Judged`."""
    each: Tensor | None = None
    """``(R, H)`` float32 rewards of the single heads, where there are several."""


class RewardModel(nn.Module):
    """Scores rows of tokens.

    Args:
        hf: a Transformers sequence classifier with one label.
        lm_head: frozen language-model head for the GRM regularizers, or ``None``.
    """

    def __init__(self, hf: PreTrainedModel, lm_head: "LanguageModelHead | None" = None) -> None:
        super().__init__()
        self.hf = hf
        self.lm_head = lm_head
        self.is_decoder = hasattr(hf, "score")
        self._adapters: tuple[PeftModel, ...] = ()
        self._head_input: list[Tensor] = []
        self.head_origin = ""
        """Where the head that training starts from was taken from, in words; empty for a model that is only asked."""
        if not self.is_decoder:
            final = _linear_layers(_find_head(hf))[-1]
            final.register_forward_pre_hook(self._note_head_input)

    def _note_head_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._head_input[:] = inputs[:1]

    def forward(self, buckets: Sequence[LengthBucket]) -> Scores:
        """Score right-padded length buckets, one after the other; rows come back in the order of the buckets."""
        if self.is_decoder:
            blocks = last_states(self.hf, *token_blocks(buckets))
            parts = [self._score_states(states, bucket) for states, bucket in zip(blocks, buckets, strict=True)]
        else:
            parts = [self._score_encoder(bucket.tokens, bucket.token_mask) for bucket in buckets]
        columns = [_joined([getattr(part, field.name) for part in parts]) for field in fields(Scores)]
        return Scores(*columns)  # type: ignore[arg-type]

    def _score_states(self, states: Tensor, bucket: LengthBucket) -> Scores:
        scores = self._pool(states, bucket.token_mask.sum(dim=1) - 1)  # padded on the right, and none is empty
        if self.lm_head is None:
            return scores
        return replace(scores, logprobs=self.lm_head(states, bucket))

    def score(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """``(R,)`` rewards of ``(R, T)`` rows padded on either side, found by the mask alone."""
        return self.score_in_full(tokens, token_mask).rewards

    def score_in_full(self, tokens: Tensor, token_mask: Tensor) -> Scores:
        """All that is known of ``(R, T)`` rows padded on either side, found by the mask alone."""
        if not self.is_decoder:
            return self._score_encoder(tokens, token_mask)
        positions = (token_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        output = backbone_of(self.hf)(
            input_ids=tokens, attention_mask=token_mask.long(), position_ids=positions, use_cache=False
        )
        return self._pool(output.last_hidden_state, last_token_index(token_mask))

    def _pool(self, states: Tensor, last: Tensor) -> Scores:
        rows = torch.arange(len(states), device=states.device)
        pooled = states[rows, last]
        judged = judge(self.hf.get_submodule("score"), pooled)
        return Scores(
            judged.rewards, pooled, variances=judged.variances, divergences=judged.divergences, each=judged.each
        )

    def _score_encoder(self, tokens: Tensor, token_mask: Tensor) -> Scores:
        """Encoders pool by a part of their own (the first token); the embedding is what their last layer reads."""
        logits = self.hf(input_ids=tokens, attention_mask=token_mask.long()).logits
        return Scores(logits.float().squeeze(-1), self._head_input.pop())

    @property
    def adapters(self) -> "tuple[PeftModel, ...]":
        """The peft wrapper under LoRA; else nothing."""
        return self._adapters

    @property
    def head(self) -> nn.Module:
        """What makes a score of a state."""
        return _find_head(self.hf)

    @property
    def heads(self) -> int:
        """How many heads the reward is the mean of."""
        head = self.head
        return head.out_features if isinstance(head, Heads) else 1

    @property
    def knows_variance(self) -> bool:
        """Whether a reward comes with its variance."""
        return isinstance(self.head, NonNegativeHead)

    def keep_means(self) -> None:
        """Have a head that is random in training, or several, become one that gives their mean, as a critic needs."""
        if self.is_decoder:
            self.hf.score = mean_head(self.head)

    def merged(self) -> PreTrainedModel:
        """The Transformers model with adapters merged into its weights. Ends training of this object."""
        for adapter in self._adapters:
            merge_adapters(adapter)
        return self.hf


class LanguageModelHead(nn.Module):
    """A frozen copy of the model's output projection, for log-probabilities of the responses (GRM)."""

    def __init__(self, weight: Tensor, settings: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self._logits = backbones.logit_options(settings)

    def forward(self, states: Tensor, bucket: LengthBucket) -> Tensor:
        """``(R,)`` log-probabilities summed over response tokens; position t predicts token t + 1."""
        tokens, mask, places = bucket.tokens[:, 1:], bucket.response_mask[:, 1:], bucket.places()
        sums, _ = response_logprobs(states[:, :-1], self.weight, tokens, mask, places=places, **self._logits)
        return sums


def build_reward_model(
    config: RewardModelConfig,
    *,
    dtype: torch.dtype,
    pad_token_id: int,
    vocabulary: int,
    seed: int,
    with_lm_head: bool = False,
    checked: bool = True,
    setting: str = "model.path",
    processes: int | None = None,
    shared: bool = False,
) -> RewardModel:
    """A fresh reward model on the CPU, the same on every rank for one seed.

    Args:
        config: backbone and head.
        dtype: of all weights.
        pad_token_id: see rlhf.models.tokenizer.
        vocabulary: tokens of the tokenizer; the embedding grows to it, never to a rounder number.
        seed: of new weights.
        with_lm_head: also keep a frozen language-model head, for the GRM losses.
        checked: whether to compare it with plain Transformers: once for each model is enough, on one rank.
        setting: of the recipe, where the path comes from; for messages.
        processes: see :func:`rlhf.models.backbones.check_host_memory`.
        shared: see :func:`rlhf.models.backbones.load_classifier`.

    Raises:
        ModelError: if the backbone cannot be loaded or has not the parts asked for.
    """
    torch.manual_seed(seed)
    hf, missing = backbones.load_classifier(
        config, dtype=dtype, pad_token_id=pad_token_id, vocabulary=vocabulary, processes=processes, shared=shared
    )
    if not missing and config.head == "linear" and config.heads == 1 and not config.new_head:
        _with_float32_head(hf)
        origin = f"the one of {config.path} (model.new_head=true draws a new one)"
    else:
        _init_head(hf, config, dtype, missing, torch.Generator().manual_seed(seed))
        origin = "a new one" if missing else f"a new one, in place of that of {config.path}"
    lm_head = LanguageModelHead(_output_projection(config, hf.dtype), hf.config) if with_lm_head else None
    model = RewardModel(hf, lm_head)
    model.head_origin = origin
    if checked:
        check_scores(model, f"{setting} = {config.path}")
    apply_kernels(hf, config)
    make_scorer_trainable(model, config, dtype)
    return model


def make_scorer_trainable(model: RewardModel, config: BackboneConfig, dtype: torch.dtype) -> None:
    """What :func:`rlhf.models.trainable.make_trainable` does; the head is always trained."""
    adapter = make_trainable(model.hf, config, dtype)
    if adapter is not None:
        object.__setattr__(model, "_adapters", (adapter,))  # a plain tuple: its weights are hf's own
        _find_head(model.hf).requires_grad_(True)


OWN_MODEL_TYPES = {"mlp": "margin-rlhf-mlp-reward", "bnrm": "margin-rlhf-bnrm-reward"}
"""Model types of heads that plain Transformers has no place for, which refuses them by their name."""
HEADS_KEY = "margin_rlhf_heads"
"""Entry of config.json with the number of heads whose mean is the reward, each of them a label to Transformers."""


def is_plain(config: RewardModelConfig) -> bool:
    """Whether plain Transformers can open what is published."""
    return config.head == "linear" or (config.head == "bnrm" and not config.head_hidden)


def save_reward_model(model: RewardModel, folder: Path, *, weights: bool = True) -> None:
    """Write the merged model as a Transformers folder, or all of it but its ``weights``.

    A linear head, also one that the mean of a Bayesian head folds into, opens in plain Transformers, as do several
    heads, as labels; the settings say that these are values, no classes, so that vLLM puts no sigmoid over them. Other
    heads get a model type of their own: plain Transformers then refuses the folder instead of loading it with a new,
    random head.
    """
    model.hf.config.problem_type = "regression"
    hf = model.merged() if weights else model.hf
    head = getattr(hf, "score", None)
    kind, heads = _own_kind(head), model.heads
    if isinstance(head, NonNegativeHead) and not kind:
        hf.score = mean_head(head)
    if weights:
        for layer in _linear_layers(_find_head(hf)):
            layer.__class__ = nn.Linear
        hf.save_pretrained(folder)
    else:
        backbones.save_settings(hf, folder)
    settings = json.loads((folder / "config.json").read_text())
    if heads > 1:
        write_json(folder / "config.json", settings | {HEADS_KEY: heads})
    if kind:
        settings |= {"model_type": OWN_MODEL_TYPES[kind], "backbone_model_type": settings["model_type"]}
        write_json(folder / "config.json", settings | {"head_hidden": _width(head)})


def _own_kind(head: object) -> str:
    """Which of :data:`OWN_MODEL_TYPES` a head needs; empty for none."""
    if isinstance(head, NonNegativeHead):
        return "bnrm" if head.local else ""
    return "mlp" if isinstance(head, nn.Sequential) else ""


def _width(head: object) -> int:
    first = head.factors if isinstance(head, NonNegativeHead) else head[0]  # type: ignore[index]
    return int(first.out_features)


def load_reward_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False, shared: bool = False
) -> RewardModel:
    """Open what :func:`save_reward_model` wrote, or any sequence classifier with one label, for scoring.

    Args:
        folder: of the model.
        dtype: of all weights.
        trust_remote_code: whether to run code that comes with it.
        shared: see :func:`rlhf.models.backbones.load_classifier`.
    Raises:
        ModelError: if the folder is not such a model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: not a model folder (no config.json); give the final/ folder of a reward run")
    settings = json.loads(path.read_text())
    if shared:
        dtype = stored_type(str(folder)) or dtype
    if settings.get("model_type") in OWN_MODEL_TYPES.values():
        return RewardModel(_load_own(folder, settings, dtype))
    try:
        hf, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=exact_attention(
                AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            ),
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded as a reward model: {error}") from error
    heads = settings.get(HEADS_KEY, 1)
    if report["missing_keys"] or hf.config.num_labels != heads:
        raise ModelError(
            f"{folder}: not a reward model: it has {hf.config.num_labels} labels and lacks the weights "
            f"{', '.join(sorted(report['missing_keys'])) or '(none)'}; give the final/ folder of a reward run"
        )
    if heads > 1:
        hf.score.__class__ = Heads
    return RewardModel(_with_float32_head(hf))


def _load_own(folder: Path, settings: dict, dtype: torch.dtype) -> PreTrainedModel:
    kept = {name: value for name, value in settings.items() if name not in ("model_type", "backbone_model_type")}
    config = AutoConfig.for_model(settings["backbone_model_type"], **kept)
    hf, report = AutoModelForSequenceClassification.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=exact_attention(config),
        output_loading_info=True,
    )
    width, hidden = hf.config.hidden_size, settings["head_hidden"]
    bayesian = settings["model_type"] == OWN_MODEL_TYPES["bnrm"]
    hf.score = (NonNegativeHead(width, hidden) if bayesian else mlp_head(width, hidden)).to(dtype)
    own = {f"score.{name}" for name in hf.score.state_dict()}
    lacking, left = set(report["missing_keys"]) - {"score.weight"}, set(report["unexpected_keys"])
    if lacking or left != own:
        raise ModelError(f"{folder}: weights do not fit: missing {lacking}, of the head {left}, expected {own}")
    hf.score.load_state_dict(_tensors(folder, prefix="score."))
    return _with_float32_head(hf)


def _tensors(folder: Path, *, prefix: str) -> dict[str, Tensor]:
    """Tensors of a model folder whose names begin with ``prefix``, which is left out."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            found |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return found


def _with_float32_head(hf: PreTrainedModel) -> PreTrainedModel:
    for layer in _linear_layers(_find_head(hf)):
        if type(layer) is nn.Linear:
            layer.__class__ = Float32Linear
    return hf


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """All rows of several parts, of which all hold something or none does."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _init_head(
    hf: PreTrainedModel,
    config: RewardModelConfig,
    dtype: torch.dtype,
    missing: Collection[str],
    generator: torch.Generator,
) -> None:
    """New weights of type ``dtype`` for the head; what an encoder's files have of it but for its last layer stays."""
    head = _find_head(hf)
    own = config.head != "linear" or config.heads > 1
    if own and not hasattr(hf, "score"):
        asked = f"head = {config.head}" if config.heads == 1 else f"heads = {config.heads}"
        raise ModelError(f"model.{asked} is for decoder backbones; encoders bring a head of their own")
    width = hf.config.hidden_size
    if config.head == "bnrm":
        hf.score = NonNegativeHead(width, config.head_hidden)
        hf.score.start(config.head_init_scale, generator)
        hf.score.to(dtype)
        return
    if config.heads > 1:
        head = hf.score = Heads(width, config.heads, bias=False)
        hf.config.num_labels = config.heads
    if config.head == "mlp":
        head = hf.score = mlp_head(width, config.head_hidden)
    _with_float32_head(hf)
    *inner, final = _linear_layers(head)
    names = {layer: f"{name}.weight" for name, layer in hf.named_modules()}
    for layer in inner:
        if config.head == "mlp":
            draw(layer.to(dtype), (3 * layer.in_features) ** -0.5, generator)
        elif names[layer] in missing:
            draw(layer.to(dtype), getattr(hf.config, "initializer_range", 0.02), generator)
    draw(final.to(dtype), config.head_init_scale / (final.in_features + 1), generator)


def _find_head(hf: PreTrainedModel) -> nn.Module:
    for name in HEAD_NAMES:
        if hasattr(hf, name):
            return getattr(hf, name)
    raise ModelError(f"{type(hf).__name__} has neither of the heads {', '.join(HEAD_NAMES)}")


def _linear_layers(head: nn.Module) -> list[nn.Linear]:
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


def _output_projection(config: RewardModelConfig, dtype: torch.dtype) -> Tensor:
    """The language-model head of the backbone's checkpoint: ``(V, D)``."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.path, revision=config.revision, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    except ValueError as error:
        raise ModelError(f"model.path = {config.path}: the GRM losses need a language-model head: {error}") from error
    return model.get_output_embeddings().weight
