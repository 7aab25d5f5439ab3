import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Like SmolLM2's: a default system prompt, and a line feed behind the end of each turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "user assistant system be kind what is the answer to this question about rain and tea",
    "It rained all day. The tea was cold, so we laughed! Why? Because 12 + 30 = 42.",
    "User:\nAssistant:\nHello there, how are you? I am fine, thanks.",
]


def _train(*, bos: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<|endoftext|>"] if bos else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return core


@pytest.fixture(scope="session")
def tokenizer():
    """A chat tokenizer without BOS."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_train(bos=False),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def base_tokenizer():
    """The tokenizer of a base model: no template, and BOS before every text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_train(bos=True), bos_token="<s>", eos_token="<|endoftext|>"
    )


@pytest.fixture
def write_rows(tmp_path):
    """Write rows (objects, or raw lines as text) to a jsonl file, gzipped if its name says so."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def make_rows():
    """``count`` good rows over ``prompts`` different prompts."""

    def make(count, prompts=None, word="tea"):
        return [
            {
                "prompt": f"question {number % (prompts or count)} about {word}?",
                "chosen": f"a good answer, number {number}",
                "rejected": f"rain {number}",
                "chosen_score": 0.9,
                "rejected_score": 0.25,
                "margin": number / 4,
            }
            for number in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def real_data():
    """A function that finds one file of real preference data, or skips the test."""
    root = Path(os.environ.get("MARGIN_RLHF_DATA", Path(__file__).parents[3].parent / "shared" / "data"))

    def find(name):
        if not (root / name).is_file():
            pytest.skip(f"{root / name} is not there; set MARGIN_RLHF_DATA to a folder that has it")
        return root / name

    return find
