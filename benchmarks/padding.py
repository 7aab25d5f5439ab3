"""Share of computed tokens that is padding: length buckets under a token budget against a fixed batch of 8 pairs.

    python benchmarks/padding.py --model models/SmolLM2-135M-Instruct --data PAIRS.jsonl
"""

import argparse

from rlhf.data.batching import global_batch, plan_micro_batches
from rlhf.data.options import DataConfig
from rlhf.data.preferences import load_preferences
from rlhf.train.chat import load_chat


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="preference pairs")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    config = DataConfig(train=options.data, eval_share=0.0)
    lengths = load_preferences(config, load_chat(options.model)).train.lengths.astype(int)
    ours = fixed = real = 0
    for step in range(len(lengths) // 64):
        batch = lengths[global_batch(step, items=len(lengths), batch_size=64, seed=0)]
        plan = plan_micro_batches(batch, token_budget=4096, ranks=2, length_buckets=4)
        ours += sum(part.padded_tokens for micro_step in plan for part in micro_step)
        fixed += sum(16 * batch[start : start + 8].max() for start in range(0, 64, 8))
        real += batch.sum()
    print(f"padding: {1 - real / ours:.1%} of computed tokens; a fixed batch of 8 pairs: {1 - real / fixed:.1%}")


if __name__ == "__main__":
    main()
