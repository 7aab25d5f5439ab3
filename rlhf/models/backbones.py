"""Load a Transformers backbone, freeze or adapt it, and know its parts."""

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from rlhf.core.errors import ModelError
from rlhf.core.files import digest, weights_checksum
from rlhf.core.heads import HEAD_NAMES
from rlhf.core.memory import free_memory
from rlhf.models.adapters import adapter_base, with_adapter
from rlhf.models.kernels import attention_implementation, flash_runs
from rlhf.models.options import BackboneConfig, cut_layers
from rlhf.models.weight_files import checkpoint_bytes, elements_of, stored_type, tensors_of

if TYPE_CHECKING:
    pass

TEXT_PART = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
"""Names of weights in the files of a model that also sees or hears, and what its text model calls them."""

BackboneT = TypeVar("BackboneT", bound=BackboneConfig)

log = logging.getLogger(__name__)


class LoadedClassifier(NamedTuple):
    """A sequence classifier with one label."""

    model: PreTrainedModel
    missing: frozenset[str]
    """Weights of its head that its files do not have: they hold random numbers."""


def load_classifier(
    config: BackboneConfig,
    *,
    dtype: torch.dtype,
    pad_token_id: int,
    vocabulary: int,
    processes: int | None = None,
    shared: bool = False,
) -> LoadedClassifier:
    """``AutoModelForSequenceClassification`` with one label, on the CPU.

    Args:
        config: which model, and how much of it.
        dtype: of all weights.
        pad_token_id: written into the configuration; it must never end a text (see rlhf.models.tokenizer).
        vocabulary: tokens of the tokenizer; the embedding grows to it, never to a rounder number.
        processes: see :func:`check_host_memory`.
        shared: whether an engine is going to share the weights out, and to bring each to ``dtype`` by itself. They may
            then stay in the type of their files, which are only mapped into memory; see :func:`loading_type`.
    Raises:
        ModelError: if the folder or name cannot be loaded as a classifier.
    """
    settings = load_model_config(config)
    settings.num_labels = 1
    what = "a sequence classifier"
    loader = AutoModelForSequenceClassification
    check_host_memory(config, dtype, processes, shared=shared)
    loaded = loading_type(config, dtype, vocabulary) if shared else dtype
    model, missing = _load(loader, what, config, settings, dtype=dtype, loaded=loaded, vocabulary=vocabulary)
    model.config.pad_token_id = pad_token_id
    return LoadedClassifier(model, frozenset(name for name in missing if name.split(".")[0] in HEAD_NAMES))


def load_causal_lm(
    config: BackboneConfig,
    *,
    dtype: torch.dtype,
    vocabulary: int,
    processes: int | None = None,
    shared: bool = False,
) -> PreTrainedModel:
    """``AutoModelForCausalLM``, on the CPU.

    Args:
        config, dtype, vocabulary, processes, shared: see :func:`load_classifier`.
    Raises:
        ModelError: if the folder or name cannot be loaded as a causal language model.
    """
    settings = load_model_config(config)
    check_host_memory(config, dtype, processes, shared=shared)
    loaded = loading_type(config, dtype, vocabulary) if shared else dtype
    what = "a causal language model"
    return _load(AutoModelForCausalLM, what, config, settings, dtype=dtype, loaded=loaded, vocabulary=vocabulary)[0]


def loading_type(config: BackboneConfig, dtype: torch.dtype, vocabulary: int) -> torch.dtype:
    """What to load weights as that an engine shares out as ``dtype``: a conversion makes a whole copy on each rank.

    That of the files, unless something is made of them with the digits of ``dtype``: a larger embedding, or a model
    with an adapter in it.
    """
    if adapter_base(config.path) is not None:
        return dtype
    if vocabulary > (getattr(load_model_config(config), "vocab_size", None) or 0):
        return dtype
    return stored_type(config.path, config.revision) or dtype


def _load(
    loader: type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification],
    what: str,
    config: BackboneConfig,
    settings: PretrainedConfig,
    *,
    dtype: torch.dtype,
    loaded: torch.dtype,
    vocabulary: int,
) -> tuple[PreTrainedModel, Collection[str]]:
    """The model with weights of the type ``loaded``, and names of its weights that its files do not have."""
    origin, revision = _origin(config)
    renamed = TEXT_PART if hasattr(_whole_config(config), "text_config") else None
    chatter = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new head and dropped layers are no news here
    try:
        found: Any = loader.from_pretrained(
            origin,
            config=settings,
            output_loading_info=True,
            key_mapping=renamed,
            ignore_mismatched_sizes=loader is AutoModelForSequenceClassification,  # a head of other labels gives way
            revision=revision,
            dtype=loaded,
            attn_implementation=attention_implementation(
                config.attention, dtype, settings, _has_flash(loader, settings)
            ),
            trust_remote_code=config.trust_remote_code,
        )
    except FAULTS as error:
        unknown = str(error).startswith("Unrecognized configuration class")
        reason = _no_class(settings, loader) if unknown else str(error) or type(error).__name__
        raise ModelError(f"model.path = {config.path}: cannot be loaded as {what}: {reason}") from error
    finally:
        transformers_logging.set_verbosity(chatter)
    model, report = found
    if renamed is not None:
        model._weight_conversions = None  # saving would turn the names back into those of the whole model
    said = f"model.path = {config.path}: cannot be loaded as {what}"
    _refuse_missing(model, report["missing_keys"], said)
    _refuse_other_shapes(report["mismatched_keys"], said)
    if origin != config.path:
        with_adapter(model, Path(config.path))
    if vocabulary > embedding_rows(model):
        model.resize_token_embeddings(vocabulary)
    if not config.dropout:
        switch_dropout_off(model)
    return model, report["missing_keys"]


def _no_class(settings: PretrainedConfig, loader: type) -> str:
    return f"Transformers {transformers.__version__} has no {loader.__name__} for models of type {settings.model_type}"


def _refuse_missing(model: PreTrainedModel, missing: Iterable[str], said: str) -> None:
    """Transformers fills what the files do not have with random numbers; of a decoder only a new head may be so."""
    lacking = sorted(name for name in missing if not name.startswith("score."))
    decoder = hasattr(model, "score") or model.get_output_embeddings() is not None
    if lacking and decoder and not hasattr(model, "classifier"):
        few = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise ModelError(f"{said}: its files lack {len(lacking)} weights of {type(model).__name__} ({few})")


def _refuse_other_shapes(mismatched: Iterable[tuple[str, Any, Any]], said: str) -> None:
    """The head of a classifier with other labels is no loss; any other weight of another shape is."""
    for name, found, expected in sorted(mismatched):
        if name.split(".")[0] not in HEAD_NAMES:
            raise ModelError(f"{said}: {name} has shape {tuple(found)} in its files, expected {tuple(expected)}")


def _origin(config: BackboneConfig) -> tuple[str, str | None]:
    """Folder or name, and revision, of the weights; for an adapter those of its base."""
    base = adapter_base(config.path)
    return (config.path, config.revision) if base is None else (base.path, base.revision)


def embedding_rows(model: PreTrainedModel) -> int:
    """Tokens that the input embedding has a row for."""
    try:
        table: Any = model.get_input_embeddings()  # an nn.Embedding, or what the model has in its place
    except NotImplementedError as error:
        raise ModelError(f"{type(model).__name__} has no table of tokens: take a model of another family") from error
    return table.num_embeddings if isinstance(table, nn.Embedding) else len(table.weight)


def switch_dropout_off(model: PreTrainedModel) -> None:
    """Training without dropout and without noise in routers, in place; the saved configuration keeps its rates.

    Transformers has them as modules, or as attributes of layers (``attention_dropout``, ``attn_pdrop``,
    ``jitter_noise``).

    Raises:
        ModelError: for Phi-MoE, whose router draws experts at random in training mode, at any rate of noise.
    """
    if model.config.model_type == "phimoe":
        raise ModelError(
            "Phi-MoE draws experts at random in training mode, which no rate switches off; model.dropout=true trains "
            "it with that noise (and with its dropout)"
        )
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def plain_copy(config: BackboneT) -> BackboneT:
    """The settings for a copy that is only asked on the CPU: nothing for GPUs, no activations to recompute."""
    on_gpus = config.attention == "flash_attention_2" or (config.attention == "auto" and flash_runs(torch.bfloat16))
    attention = "eager" if on_gpus else config.attention
    return replace(config, kernels="none", gradient_checkpointing=False, attention=attention)


LITTLE_BYTES = 64 * 2**20
FAULTS = (
    OSError, ValueError, RuntimeError, ImportError, ArithmeticError, AssertionError, AttributeError, LookupError,
    TypeError, StrictDataclassError,
)  # fmt: skip
"""What a configuration that does not fit together raises inside of Transformers and of a model's own code."""


def cut_copy(config: BackboneT, layers: int) -> BackboneT | None:
    """The settings for the first ``layers`` of a model alone; ``None`` for one that is little, or has not more."""
    size = checkpoint_bytes(Path(_origin(config)[0]), torch.bfloat16)
    if size is not None and size <= LITTLE_BYTES:
        return None
    count = getattr(load_model_config(config), "num_hidden_layers", None)
    if count is None or count <= layers:
        return None
    return replace(config, layers=layers, freeze_layers=min(config.freeze_layers, layers))


LOGIT_FACTORS = {"hyperclovax": "logits_scaling", "falcon_h1": "lm_head_multiplier"}
"""Settings that multiply the logits, by type of model, where their names do not tell."""
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Settings that bound the logits: of Gemma 2, RecurrentGemma and xLSTM."""


def logit_options(settings: PretrainedConfig) -> dict[str, float | None]:
    """What a model does to its logits: keyword arguments of :func:`rlhf.core.logprobs.token_logprobs`.

    Taken from names in its configuration; ``policy.self_check`` finds out where that is wrong.
    """
    factor = LOGIT_FACTORS.get(settings.model_type)
    if factor is not None:
        scale = getattr(settings, factor)
    else:
        scale = getattr(settings, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(settings, "logits_scaling", None) or 1.0  # Granite divides
    caps = (getattr(settings, name, None) for name in LOGIT_CAPS)
    return {"logit_scale": scale, "softcap": next((cap for cap in caps if cap is not None), None)}


def save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write what ``save_pretrained`` writes beside the weights."""
    model.save_pretrained(folder, state_dict={})
    (folder / "model.safetensors").unlink(missing_ok=True)  # one without a tensor


def weights_digest(config: BackboneConfig) -> str:
    """A name for the weights that a run starts from, by the content of the files or the commit on the hub."""
    folder = Path(config.path)
    if not folder.is_dir():
        settings = load_model_config(config)
        return digest(config.path, str(getattr(settings, "_commit_hash", None) or config.revision), str(config.layers))
    base = adapter_base(folder)
    of_base = [] if base is None else [weights_digest(replace(config, path=base.path, revision=base.revision))]
    parts = [str(config.layers), *of_base]
    for file in sorted(folder.iterdir()):
        if file.name in ("config.json", "adapter_config.json") or file.suffix in (".safetensors", ".bin"):
            parts += [file.name, weights_checksum(file)]
    return digest(*parts)


def hide_loading_bars() -> None:
    """Transformers shows a bar for every load and save; a stage has one progress display of its own."""
    transformers_logging.disable_progress_bar()


def load_model_config(config: BackboneConfig) -> PretrainedConfig:
    """The model's configuration, cut to ``config.layers``; of a model that also sees or hears, its text part's."""
    settings = _whole_config(config)
    if hasattr(settings, "text_config"):
        whole, settings = settings, settings.get_text_config()
        settings.tie_word_embeddings = whole.tie_word_embeddings  # the whole model decides
    return cut_layers(settings, config)


def _whole_config(config: BackboneConfig) -> PretrainedConfig:
    if Path(config.path).suffix == ".gguf":
        way_out = f"turn it into a folder: rlhf import-gguf {config.path} FOLDER"
        raise ModelError(f"model.path = {config.path} is a GGUF file; {way_out}")
    origin, revision = _origin(config)
    try:
        return AutoConfig.from_pretrained(origin, revision=revision, trust_remote_code=config.trust_remote_code)
    except FAULTS as error:
        raise ModelError(
            f"model.path = {config.path}: neither a Transformers folder nor a model of the hub: {error}"
        ) from error


def _has_flash(loader: Any, settings: PretrainedConfig) -> bool:
    kind = loader._model_mapping.get(type(settings), None)
    return bool(getattr(kind, "_supports_flash_attn", False))


def check_host_memory(
    config: BackboneConfig, dtype: torch.dtype, processes: int | None = None, *, shared: bool = False
) -> None:
    """Refuse to load what this host cannot hold: a killed process (exit code -9) would not say why.

    Args:
        config: which model.
        dtype: of all weights.
        processes: how many of this host load it at once; ``None``: all ranks of the host.
        shared: whether all ranks share the weights out, one tensor after the other.
    Raises:
        ModelError: if it does not fit.
    """
    folder = Path(_origin(config)[0])
    bytes_here = checkpoint_bytes(folder, dtype)
    if shared and bytes_here is not None:
        largest = max(elements_of(entry) for entry in tensors_of(folder)) * dtype.itemsize
        bytes_here = min(bytes_here, bytes_here // int(os.environ.get("WORLD_SIZE") or 1) + largest)
    if processes is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    available = free_memory()
    if bytes_here is None or available is None or bytes_here * processes < available:
        return
    raise ModelError(
        f"model.path = {config.path}: {processes} process(es) on this host load {bytes_here / 2**30:.1f} GiB each, "
        f"but only {available / 2**30:.1f} GiB of host memory are free; the system would kill the run with exit "
        "code -9. Use fewer processes per node, a host with more memory, or a smaller model.layers"
    )
