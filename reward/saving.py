"""A reward model as a folder: written after training, and opened to score."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from reward.config import RewardModelConfig
from reward.heads import Heads, NonNegativeHead, find_head, linear_layers, mean_head, mlp_head, with_float32_head
from reward.model import RewardModel
from rlhf.core.errors import ModelError
from rlhf.core.files import write_json
from rlhf.models.backbones import save_settings
from rlhf.models.kernels import exact_attention
from rlhf.models.weight_files import stored_type

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
        for layer in linear_layers(find_head(hf)):
            layer.__class__ = nn.Linear
        hf.save_pretrained(folder)
    else:
        save_settings(hf, folder)
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
    return RewardModel(with_float32_head(hf))


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
    return with_float32_head(hf)


def _tensors(folder: Path, *, prefix: str) -> dict[str, Tensor]:
    """Tensors of a model folder whose names begin with ``prefix``, which is left out."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            found |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return found
