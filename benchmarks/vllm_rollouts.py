"""Samples per second of the two backends of rollouts, with and without the push of the weights.

    python benchmarks/vllm_rollouts.py --model MODEL --prompts ALPACA_EVAL.json.gz --vllm-python .venv-vllm/bin/python

Both draw from the policy at temperature 1, from the same prompts. Each count is done twice, and the better one is kept;
an engine is started once, which is told apart. Before each push every weight is changed, so that all are sent.
"""

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from policy.evaluation.compare import open_policy
from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig, VllmConfig
from policy.generation.vllm.training import Engines
from rlhf.core.files import write_json
from rlhf.train.chat import load_chat

ROUNDS = 2


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON with rows that have an instruction")
    parser.add_argument("--vllm-python", help="Python of an environment that has vLLM (this one)")
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    model, chat = open_policy(options.model), load_chat(options.model, None)
    with gzip.open(options.prompts, "rt") as file:
        texts = [row["instruction"] for row in json.load(file) if len(row["instruction"]) < 200]
    shown = [chat.render_prompt([{"role": "user", "content": text}]) for text in texts[: max(options.counts)]]
    prompts = [np.array(tokens) for tokens in chat.tokenizer(shown, add_special_tokens=False)["input_ids"]]
    settings = SamplingConfig(
        max_new_tokens=options.new_tokens,
        batch_rows=options.batch_rows,
        vllm=VllmConfig(python=options.vllm_python, cache_gib=1.0, max_model_tokens=1024),
    )
    own = HfSampler(
        model, settings, eos_token_ids=chat.end_token_ids, pad_token_id=chat.tokenizer.pad_token_id
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(model, chat, settings, Path(folder))
        start = seconds(engines.weights.push)
        vllm = engines.sampler(settings)
        vllm.generate(prompts[:8], range(8))

        def push() -> None:
            with torch.no_grad():
                for parameter in model.module.parameters():
                    parameter.mul_(1 + 1e-6)
            engines.weights.push()

        for count in options.counts:
            asked = prompts[:count], range(count)
            best = {
                "hf": min(seconds(partial(own.generate, *asked)) for _ in range(ROUNDS)),
                "vllm": min(seconds(partial(vllm.generate, *asked)) for _ in range(ROUNDS)),
                "push": min(seconds(push) for _ in range(ROUNDS)),
            }
            row = {
                "prompts": count,
                "own sampler": count / best["hf"],
                "vLLM": count / best["vllm"],
                "vLLM with push": count / (best["vllm"] + best["push"]),
                "push_seconds": best["push"],
            }
            print({name: round(value, 3) for name, value in row.items()}, flush=True)
            rows.append(row)
        engines.close()
    print(f"start of the engine, weights included: {start:.1f} s")
    if options.output is not None:
        write_json(options.output, {"start_seconds": start, "new_tokens": options.new_tokens, "rows": rows})


if __name__ == "__main__":
    main()
