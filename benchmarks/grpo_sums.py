"""GRPO from verifiable rewards on made-up sums: a tiny model that can add up, seldom does, and learns to.

The SFT stage teaches it sums, then to answer "?" six times out of seven: the base. Then GRPO, judged by
``reward.rules:same_number``. The sums that are held out are in none of the three.

    python benchmarks/grpo_sums.py --output runs/sums
"""

import argparse
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model only waits for a second thread

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policy.evaluation.compare import evaluate_policies, read_prompts
from policy.evaluation.options import SamplingSettings
from policy.ppo.__main__ import main as ppo
from policy.sft.__main__ import main as sft
from reward.function import load_function

LARGEST = 29
HELD_OUT = 100
PASSES = 6
"""How often a sum is answered by "?" for each time that it is added up, in what the base learns last."""
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% if message['role'] == 'assistant' %}<end>"
    "{% endif %}{% endfor %}"
)
RULE = "reward.rules:same_number"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Shares of right samples on held-out sums."""

    base: float
    trained: float


def make_base(folder: Path) -> None:
    """A random Llama whose tokens are the numbers."""
    words = ["<pad>", "<end>", "<unknown>", "+", "=", "?", *map(str, range(2 * LARGEST + 1))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("<end>", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unknown>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)
    fast.save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Conversations for SFT, and rows with the right answer for GRPO and for evaluation."""
    chance = random.Random(0)
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    chance.shuffle(rows)
    held_out, train = rows[:HELD_OUT], rows[HELD_OUT:]
    sums = [{"prompt": row["prompt"], "completion": row["answer"]} for row in train]
    passes = [{"prompt": row["prompt"], "completion": "?"} for row in train]
    chats = {"sums": sums * 3 + passes, "seldom": sums + passes * PASSES}
    for name, part in (chats | {"held_out": held_out, "train": train}).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def run(output: Path, *, steps: int, epochs: int = 200) -> Outcome:
    """Make the base, train it, and ask both for ten samples of each held-out sum."""
    output.mkdir(parents=True, exist_ok=True)
    make_base(output / "random")
    make_data(output)
    common = ["engine.kind=local", "train.tensorboard=false", f"data.cache_dir={output / 'cache'}"]
    _sft(output, "random", "sums", common, rate=2e-3, weight_decay=0.5, epochs=epochs)
    _sft(output, "sums", "seldom", common, rate=5e-4, weight_decay=0.0, epochs=2)
    _stage(
        ppo,
        [f"output={output / 'grpo'}", f"policy.path={output / 'seldom' / 'final'}", "preset=dr_grpo",
         "train.global_batch_size=512", f"reward.function={RULE}",
         f"data.train={output / 'train.jsonl'}", f"data.eval={output / 'held_out.jsonl'}", "rollout.prompts=128",
         "rollout.samples=16", "rollout.max_new_tokens=3", "train.epochs=1000", f"train.max_steps={steps}",
         "optim.learning_rate=5e-4", "optim.schedule=linear", "optim.warmup_share=0",
         "train.evaluate_every=50", "train.checkpoint_every=0", "train.publish=last", *common],
    )  # fmt: skip
    prompts, columns = read_prompts(output / "held_out.jsonl")
    base, trained = evaluate_policies(
        {"trained": output / "grpo" / "final"},
        output / "seldom" / "final",
        prompts,
        load_function(RULE),
        template=None,
        settings=SamplingSettings(samples=10, max_new_tokens=3),
        output=output / "evaluation",
        columns=columns,
    )
    return Outcome(base=base.reward.value, trained=trained.reward.value)


def _sft(
    output: Path, start: str, name: str, common: list[str], *, rate: float, weight_decay: float, epochs: int
) -> None:
    """Train on the conversations of this name, from the model of the run ``start``."""
    model = output / start if start == "random" else output / start / "final"
    _stage(
        sft,
        [f"output={output / name}", f"model.path={model}", f"data.train={output / name}.jsonl", "data.eval_share=0",
         f"optim.learning_rate={rate}", f"optim.weight_decay={weight_decay}", f"train.epochs={epochs}",
         "train.global_batch_size=250", "train.evaluate_every=0", "train.checkpoint_every=0", *common],
    )  # fmt: skip


def _stage(main: Any, argv: list[str]) -> None:
    if main(argv):
        raise SystemExit(f"a stage failed: {' '.join(argv)}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=200, help="of GRPO (default: %(default)s)")
    return parser


if __name__ == "__main__":
    arguments = build_parser().parse_args()
    print(run(arguments.output, steps=arguments.steps))
