"""How long the rehearsal of a publication takes before the first step, for a model of the size of a known one.

    python -m benchmarks.rehearsal --shape llama-3-8b

writes a random model of that shape with a few of its layers (the rehearsal reads two, however many there are) and a
tokenizer of as many tokens, 256 of them special and the chat template in the form of Llama 3. Then what each kind of
run does before its first step is done: a policy, one with adapters that are merged or not, and a reward model.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.memory import memory
from benchmarks.sharded_start import add_shape, write_model
from policy.options import PolicyConfig
from policy.publish import PublishablePolicy
from reward.config import RewardConfig, RewardModelConfig
from reward.publish import PublishableRewardModel
from rlhf.data.options import DataConfig
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import single_rank
from rlhf.models.options import LoraOptions
from rlhf.train.chat import load_chat
from rlhf.train.fresh import end_fresh_process
from rlhf.train.rehearsal import rehearsed

LAYERS = 4
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += [f"<|reserved_special_token_{number}|>" for number in range(256 - len(SPECIAL))]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def large_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level pieces of one, two and three bytes, until there are ``size`` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(one, other) for one in alphabet for other in alphabet]
    triples = ((one + other, third) for one, other in pairs for third in alphabet)
    merges = [*pairs, *triples_up_to(triples, size - len(SPECIAL) - len(alphabet) - len(pairs))]
    pieces = [*alphabet, *(one + other for one, other in merges)]
    core = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[0],
        eos_token="<|eot_id|>",
        additional_special_tokens=SPECIAL,
        chat_template=TEMPLATE,
    )


def triples_up_to(triples: Any, count: int) -> list[tuple[str, str]]:
    return [next(triples) for _ in range(max(0, count))]


def publishables(base: Path) -> dict[str, Any]:
    """What the runs of each kind would publish."""
    chat = load_chat(base)

    def policy(**model: Any) -> PublishablePolicy:
        config = PolicyConfig(path=str(base), **model)
        return PublishablePolicy(
            stage="sft", model=config, dtype=torch.bfloat16, seed=0, chat=chat, objective={}, training_data=""
        )

    lora = LoraOptions(rank=16)
    reward = RewardConfig(
        output=base,
        model=RewardModelConfig(path=str(base)),
        data=DataConfig(train="-"),
        engine=EngineConfig(kind="local", precision="bfloat16"),
    )
    return {
        "policy": policy(),
        "adapters, merged": policy(lora=lora),
        "adapters alone": policy(lora=lora, publish_lora="adapter"),
        "reward model": PublishableRewardModel(config=reward, chat=chat, evaluation=None, margins={}, training_data=""),
    }


def measure(publishable: Any, folder: Path) -> None:
    """Rehearse, with a fresh process that is started and ended here."""
    recipe: Any = SimpleNamespace(output=folder, train=SimpleNamespace(publish="last", resume="auto"))
    with rehearsed(recipe, single_rank(), publishable):
        pass
    end_fresh_process()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser, "llama-3-8b")
    parser.add_argument("--vocabulary", type=int, default=128256, help="tokens of the tokenizer, as the shape has")
    return parser


def main() -> None:
    options = _parser().parse_args()
    print(f"{torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        write_model(base, options.shape, "bfloat16", num_hidden_layers=LAYERS)
        large_tokenizer(options.vocabulary).save_pretrained(base)
        for name, publishable in publishables(base).items():
            began, spent = time.perf_counter(), _cpu_seconds()
            measure(publishable, Path(scratch) / name)
            seconds, cpu = time.perf_counter() - began, _cpu_seconds() - spent
            print(
                f"{name}: {seconds:.0f} s, {cpu:.0f} CPU seconds; peaks so far {memory('VmHWM') / 2**30:.1f} GiB here, "
                f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.1f} GiB in the fresh process",
                flush=True,
            )


def _cpu_seconds() -> float:
    """Seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
