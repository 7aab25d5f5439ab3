"""Models that the ranks share out while they start (ZeRO-3): the same numbers as of whole ones, and little memory."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

pytestmark = pytest.mark.dist
full = pytest.mark.full

WORKER = str(Path(__file__).parent / "workers" / "start.py")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GATED, tie_word_embeddings=True)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "qwen3moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**GATED, **EXPERTS)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**SIZES, intermediate_size=64, max_position_embeddings=32)),
}
CASE = {"kind": "policy", "lora": False, "head": "linear", "lm_head": False, "frozen": False, "memory": False}
MIB = 2**20


def saved(folder: Path, name: str, stored: str) -> str:
    loader, settings = MODELS[name]
    torch.manual_seed(1)
    path = folder / f"{name}-{stored}"
    if not path.is_dir():
        loader(settings).to(getattr(torch, stored)).save_pretrained(path)
    return str(path)


@pytest.fixture
def on_ranks(run_ranks, tmp_path):
    """``on_ranks(cases, ranks)``: what each rank found of each case."""

    def run(cases: list[dict], ranks: int) -> list[list[dict]]:
        path = tmp_path / "cases.json"
        path.write_text(json.dumps(cases))
        run_ranks([WORKER, str(path)], ranks)
        return json.loads(path.read_text())

    return run


FILES_OF_ANOTHER_TYPE = [
    ("llama", "bfloat16", "float32", {}),
    ("llama", "bfloat16", "float32", {"lora": True}),
    ("llama", "float32", "bfloat16", {"kind": "reward", "lora": True, "lm_head": True}),
    ("llama", "bfloat16", "float32", {"kind": "reward", "head": "mlp"}),
    ("gpt2", "float32", "bfloat16", {"lora": True}),
    ("qwen3moe", "bfloat16", "float32", {}),
    ("roberta", "bfloat16", "float32", {"kind": "reward"}),
    ("roberta", "float32", "bfloat16", {"kind": "reward", "lora": True}),
    ("llama", "bfloat16", "float32", {"frozen": True}),
]
FILES_OF_THE_RUN = [
    ("llama", "bfloat16", "bfloat16", {"lora": True}),
    ("gpt2", "float32", "float32", {}),
    ("qwen3moe", "bfloat16", "bfloat16", {}),
    ("roberta", "bfloat16", "bfloat16", {"kind": "reward"}),
    ("qwen3moe", "float32", "float32", {"kind": "reward", "frozen": True}),
]


@pytest.mark.parametrize(
    ("cases", "ranks"),
    [(FILES_OF_ANOTHER_TYPE, 2), pytest.param(FILES_OF_THE_RUN, 2, marks=full)],
    ids=["files of another type", "files of the run's type"],
)
def test_what_is_shared_out_at_the_start_has_losses_and_weights_of_what_was_whole(on_ranks, tmp_path, cases, ranks):
    given = [
        CASE | {"path": saved(tmp_path, name, stored), "precision": precision} | more
        for name, stored, precision, more in cases
    ]
    for case, found in zip(cases, on_ranks(given, ranks), strict=True):
        for rank in found:
            assert rank["differing"] == [], case
            assert rank["losses"] == rank["expected"], case
            assert rank["weights"] > 20, case


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_takes_its_share_and_the_largest_tensor_however_large_the_model_is(on_ranks, tmp_path, ranks):
    """As DeepSpeed starts it a rank has all weights in float32: 138 MiB."""
    sizes = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().save_pretrained(tmp_path / "model")
    case = CASE | {"path": str(tmp_path / "model"), "precision": "float32", "lora": True, "memory": True}
    (found,) = on_ranks([case], ranks)
    for rank in found:
        grown, share = rank["peak"] - rank["before"], 4 * rank["elements"] / ranks
        assert grown > share
        # What is gathered to set up hooks lies there twice; the rest is of libraries and of the heap.
        assert grown < share + 3 * 4 * rank["largest"] + 30 * MIB, (grown / MIB, share / MIB)
