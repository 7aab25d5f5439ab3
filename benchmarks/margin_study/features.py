"""Step 1 of the margin study: pool frozen features of every answer once.

Every (prompt, answer) text is rendered with the tokenizer's chat template, run through the frozen
backbone, and the hidden state of its last token is kept for the layers asked for. The study then
trains a small head on these features, so that one run takes seconds on two cores.

    python benchmarks/margin_study/features.py --model MODEL_DIR --data DIR --output features/
"""

import argparse
import pathlib

import numpy as np
import torch
from pairs import SPLITS, read_pairs
from rich.progress import track
from transformers import AutoModel, AutoTokenizer


def token_ids(tokenizer, messages: list[dict], max_tokens: int) -> list[int]:
    """Template text up to the end-of-turn token; the oldest tokens go first when it is too long."""
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    return tokenizer(text, add_special_tokens=False)["input_ids"][-max_tokens:]


@torch.inference_mode()
def pooled_features(model, rows: list[list[int]], layers: list[int], token_budget: int) -> np.ndarray:
    """``(rows, layers, D)`` hidden states at the last token; right padding needs no mask in a causal model."""
    features = np.zeros((len(rows), len(layers), model.config.hidden_size), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    batches, start = [], 0
    while start < len(order):
        count = max(1, token_budget // len(rows[order[start]]))
        batches.append(order[start : start + count])
        start += count
    for batch in track(batches, description="features"):
        lengths = torch.tensor([len(rows[row]) for row in batch])
        tokens = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
        for place, row in enumerate(batch):
            tokens[place, : lengths[place]] = torch.tensor(rows[row])
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
        last = torch.arange(len(batch)), lengths - 1
        features[batch] = torch.stack([states[layer][last] for layer in layers], dim=1).float().numpy()
    return features


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Transformers folder of the backbone")
    parser.add_argument("--data", required=True, type=pathlib.Path, help="folder of the pairs (pairs.py)")
    parser.add_argument("--data-set", choices=SPLITS, default="alpaca", help="which pairs")
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[12], help="hidden states to keep")
    parser.add_argument("--keep-layers", type=int, default=13, help="run only the first n layers of the backbone")
    parser.add_argument("--splits", nargs="+", choices=SPLITS["alpaca"], help="which ones to do (default: all)")
    parser.add_argument("--train-stride", type=int, default=2, help="take every n-th training pair (time)")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what is computed in")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    known = SPLITS[options.data_set]
    if unknown := set(options.splits or ()) - set(known):
        raise SystemExit(f"features: {options.data_set} has no {', '.join(unknown)}; it has {', '.join(known)}")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModel.from_pretrained(
        options.model, num_hidden_layers=options.keep_layers, dtype=getattr(torch, options.dtype)
    ).eval()
    options.output.mkdir(parents=True, exist_ok=True)
    for split in options.splits or known:
        pairs = read_pairs(options.data, options.data_set, split)
        rows = np.arange(0, len(pairs), options.train_stride if split == "train" else 1)
        pairs = [pairs[row] for row in rows]
        arrays = {
            key: np.array([pair[key] for pair in pairs], dtype=np.float32) for key in ("chosen_score", "rejected_score")
        }
        for side in ("chosen", "rejected"):
            tokens = [token_ids(tokenizer, pair["prompt"] + pair[side], options.max_tokens) for pair in pairs]
            arrays[side] = pooled_features(model, tokens, options.layers, options.token_budget)
            arrays[f"{side}_tokens"] = np.array([len(row) for row in tokens])
        target = options.output / f"{split}.npz"
        temporary = target.with_suffix(".tmp.npz")
        np.savez(temporary, rows=rows, layers=np.array(options.layers), **arrays)
        temporary.rename(target)
        print(f"{target}: {len(pairs)} pairs, layers {options.layers}")


if __name__ == "__main__":
    main()
