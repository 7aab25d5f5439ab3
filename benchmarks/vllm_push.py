"""Seconds that all weights of a policy take to an engine of vLLM, by each way there is without a GPU.

    python benchmarks/vllm_push.py --model MODEL --vllm-python .venv-vllm/bin/python

Before each push every weight is changed. The engine adds up its weights and compares, as it does in training: that is
part of the time. ``--billion`` puts a random Llama of 1.1 billion weights in bfloat16 in the place of the model, whose
tokenizer it takes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from policy.evaluation.compare import open_policy
from policy.generation.options import SamplingConfig, VllmConfig
from policy.generation.vllm.training import Engines
from rlhf.core.files import write_json
from rlhf.train.chat import load_chat

WAYS = {"folder": {}, "folder in /dev/shm": {"folder": "/dev/shm"}, "gloo": {"transport": "gloo"}}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vllm-python", help="Python of an environment that has vLLM (this one)")
    parser.add_argument("--billion", action="store_true", help="a random Llama of 1.1 billion weights in its place")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser


def billion(model: Path, folder: Path) -> Path:
    """A random Llama with the tokenizer of ``model``."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    built = empty.to(torch.bfloat16).to_empty(device="cpu")
    for weight in built.parameters():
        torch.nn.init.uniform_(weight.data, -0.02, 0.02)
    built.tie_weights()
    built.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def pushes(model_folder: Path, dtype: torch.dtype, options: VllmConfig, rounds: int, folder: Path) -> list[float]:
    """Seconds of the first push, which starts the engine, and of those that follow it."""
    model, chat = open_policy(model_folder, dtype), load_chat(model_folder, None)
    engines = Engines(model, chat, SamplingConfig(vllm=options), folder)
    found = []
    try:
        for _ in range(1 + rounds):
            with torch.no_grad():
                for weight in model.module.parameters():
                    weight.mul_(1.01)
            began = time.perf_counter()
            assert engines.weights.push()
            found.append(time.perf_counter() - began)
    finally:
        engines.close()
    return found


def main() -> None:
    options = build_parser().parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, dtype = options.model, torch.float32
        if options.billion:
            model, dtype = billion(options.model, Path(scratch) / "billion"), torch.bfloat16
        for way, settings in WAYS.items():
            with tempfile.TemporaryDirectory(dir=settings.get("folder")) as through:
                own = {**settings, **({"folder": through} if "folder" in settings else {})}
                vllm = VllmConfig(python=options.vllm_python, cache_gib=0.5, max_model_tokens=512, **own)
                start, *later = pushes(model, dtype, vllm, options.rounds, Path(scratch) / way.replace("/", "_"))
            rows[way] = {"start": start, "fastest": min(later), "median": statistics.median(later)}
            print(way, {name: round(value, 2) for name, value in rows[way].items()}, flush=True)
    if options.output is not None:
        write_json(options.output, rows)


if __name__ == "__main__":
    main()
