"""Models without weights: what the stages would load, built on torch's meta device to be counted."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.plan.activations import Trained
from launch.plan.shapes import KNOWN, ModelShape, known_name, shape_of
from launch.plan.states import Numbers
from rlhf.core.errors import ModelError
from rlhf.core.paths import can_be_hub_name
from rlhf.models.options import BackboneConfig, cut_layers
from rlhf.models.roles import Kind


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where to look for models that are not on disk."""

    fallback: str | None = None
    """``--model-config``: a name of :data:`KNOWN`, or a config.json."""
    made: Mapping[str, BackboneConfig] = field(default_factory=dict)
    """Folders that earlier stages of a pipeline will leave behind, however spelled, and what these start from."""
    counted: dict[tuple[str, ...], "EmptyModel"] = field(default_factory=dict, compare=False, repr=False)
    """Models that were built before: advice plans the same ones again and again."""

    def origin(self, config: BackboneConfig) -> BackboneConfig:
        """What the model at ``config.path`` will have come from, if an earlier stage is to make it."""
        made = {_place(path): start for path, start in self.made.items()}
        while (start := made.pop(_place(config.path), None)) is not None and not _config_file(config.path).is_file():
            config = replace(config, path=start.path, layers=config.layers or start.layers)
        return config


@dataclass(frozen=True, kw_only=True)
class EmptyModel:
    """A model's parameters, counted as the stages freeze and adapt them."""

    kind: Kind
    origin: str
    """Where its configuration came from."""
    shape: ModelShape
    sizes: tuple[int, ...]
    """Elements of every parameter tensor."""
    trained_sizes: tuple[int, ...]
    matrix_parameters: int
    """Parameters of the layers' linear maps, adapters included: what every token is multiplied by."""
    active_layers: int
    """Layers that a backward pass goes through."""
    trained: Trained
    head_trained: bool
    """Whether the output projection has a gradient; a reward model's small head does not count."""
    packs: bool = True
    """Whether a run asks it if it takes packed rows."""
    lora_rank: int = 0
    widest_module: int = 0
    """Elements of the own parameters of the module that has most: ZeRO-3 gathers them together (fused experts)."""

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def most_gathered(self) -> int:
        """Elements that ZeRO-3 has whole at once, at least."""
        return max(self.widest_module, *self.sizes)

    @property
    def trainable(self) -> int:
        return sum(self.trained_sizes)

    def numbers(self, persistent: int = 0) -> Numbers:
        """Parameter counts for the formulas of the states; ``persistent`` is stage 3's threshold."""
        return Numbers(
            total=self.total,
            trainable=self.trainable,
            largest=max(self.sizes),
            largest_trainable=max(self.trained_sizes, default=0),
            vectors=sum(each for each in self.sizes if each <= persistent),
        )


def empty_model(config: BackboneConfig, kind: Kind, *, sources: Sources | None = None, setting: str) -> EmptyModel:
    """The model of a recipe's section.

    Args:
        config: which model, and what of it is trained.
        kind: which head it gets.
        sources: for a model that is not on disk.
        setting: of the recipe that names the path, for messages.
    Raises:
        ModelError: if nothing says what the model's shape is.
    """
    sources = sources or Sources()
    key = (repr(config), kind)
    if key not in sources.counted:
        sources.counted[key] = _built(config, kind, sources, setting)
    return sources.counted[key]


def _built(config: BackboneConfig, kind: Kind, sources: Sources, setting: str) -> EmptyModel:
    from accelerate import init_empty_weights

    settings, origin = model_settings(config, sources, setting)
    with init_empty_weights(include_buffers=True):
        model = _bare_model(settings, config, kind)
        _freeze_and_adapt(model, config)
    found = _counted(model, config, kind, origin, shape_of(settings))
    return _with_head(found, config)


def _with_head(model: EmptyModel, config: BackboneConfig) -> EmptyModel:
    """The model with what a reward head has beyond the one linear layer of a Transformers class."""
    from reward.config import RewardModelConfig

    if not isinstance(config, RewardModelConfig) or (config.head == "linear" and config.heads == 1):
        return model
    hidden, width = model.shape.hidden, config.head_hidden
    own: tuple[int, ...] = ((config.heads - 1) * hidden,)
    if config.head == "mlp":
        own = (hidden * width, width, width)
    if config.head == "bnrm":  # factors with their spread, and a dictionary with its shapes
        own = (hidden * width, width, 1, width, width) if width else (2 * hidden, hidden)
    return replace(model, sizes=model.sizes + own, trained_sizes=model.trained_sizes + own)


def without_training(model: EmptyModel) -> EmptyModel:
    """The same, only asked."""
    return replace(model, trained_sizes=(), active_layers=0, trained="none", head_trained=False)


def model_settings(config: BackboneConfig, sources: Sources, setting: str) -> tuple[Any, str]:
    """The Transformers configuration cut to ``config.layers``, and where it came from."""
    from rlhf.models.positions import settings_of

    config = sources.origin(config)
    if _config_file(config.path).is_file():
        return settings_of(config), f"{config.path}/config.json"
    if sources.fallback is not None:
        return _from_mapping(_named(sources.fallback), config), f"--model-config {sources.fallback}"
    cached = _from_hub_cache(config) if can_be_hub_name(config.path) else None
    if cached is not None:
        return cached, f"{config.path} in the hub's cache"
    name = known_name(config.path)
    if name is None:
        raise ModelError(
            f"{setting} = {config.path}: there is no such folder, and the plan does not know the name (it knows "
            f"{', '.join(KNOWN)}). Give its shape with --model-config: one of these names, or a config.json"
        )
    return _from_mapping(KNOWN[name], config), f"the published shape of {name}"


def _place(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _config_file(path: str) -> Path:
    return Path(path).expanduser() / "config.json"


def _from_hub_cache(config: BackboneConfig) -> Any:
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(config.path, revision=config.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return cut_layers(settings, config)


def _named(fallback: str) -> Mapping[str, Any]:
    if fallback in KNOWN:
        return KNOWN[fallback]
    path = _config_file(fallback) if Path(fallback).is_dir() else Path(fallback)
    if not path.is_file():
        raise ModelError(f"--model-config {fallback}: no such file, and no known name ({', '.join(KNOWN)})")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ModelError(f"{path}: no model configuration: expected an object with model_type in it")
    return content


def _from_mapping(content: Mapping[str, Any], config: BackboneConfig) -> Any:
    from transformers import AutoConfig

    kept = {key: value for key, value in content.items() if key != "model_type"}
    try:
        settings = AutoConfig.for_model(content["model_type"], **kept)
    except (KeyError, ValueError) as error:
        raise ModelError(f"model_type = {content['model_type']}: Transformers does not know it: {error}") from error
    return cut_layers(settings, config)


def _bare_model(settings: Any, config: BackboneConfig, kind: Kind) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind == "language model":
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
    settings.num_labels = 1
    return AutoModelForSequenceClassification.from_config(settings, trust_remote_code=config.trust_remote_code)


def _freeze_and_adapt(model: Any, config: BackboneConfig) -> None:
    """Freeze and adapt the model by the functions that the stages use."""
    from rlhf.core.heads import HEAD_NAMES
    from rlhf.models.trainable import add_lora, freeze_lower_layers

    if config.lora is None:
        freeze_lower_layers(model, config.freeze_layers)
        return
    add_lora(model, config.lora, freeze_layers=config.freeze_layers)
    for name in HEAD_NAMES:
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)


def _counted(model: Any, config: BackboneConfig, kind: Kind, origin: str, shape: ModelShape) -> EmptyModel:
    from torch import nn

    from rlhf.models.trainable import decoder_layers
    from rlhf.train.packing import may_pack

    parameters = list(model.parameters())
    layers = decoder_layers(model)
    matrices = sum(
        module.weight.numel() for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)
    )
    head = model.get_output_embeddings() if kind == "language model" else None
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    embedding_trained = model.get_input_embeddings().weight.requires_grad
    first = 0 if embedding_trained else _first_trained(layers)
    return EmptyModel(
        kind=kind,
        origin=origin,
        shape=shape,
        sizes=tuple(parameter.numel() for parameter in parameters),
        trained_sizes=tuple(parameter.numel() for parameter in trained),
        matrix_parameters=matrices,
        active_layers=len(layers) - first,
        trained="lora" if config.lora is not None else "full",
        head_trained=head is not None and head.weight.requires_grad,
        packs=may_pack(model),
        lora_rank=config.lora.rank if config.lora is not None else 0,
        widest_module=max(sum(own.numel() for own in part.parameters(recurse=False)) for part in model.modules()),
    )


def _first_trained(layers: Any) -> int:
    for number, layer in enumerate(layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return number
    return len(layers)
