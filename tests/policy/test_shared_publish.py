"""What is published piece by piece under ZeRO-3, and what the main rank publishes when it has all weights."""

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from reward.serving.card import card_of
from reward.serving.vllm_settings import SETTINGS_NAME
from rlhf.core.errors import ModelError
from rlhf.models.shards import ModelWriter

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WORKER = str(Path(__file__).parent / "workers" / "publish.py")
CASE = {"kind": "policy", "precision": "float32", "lora": False, "publish_lora": "merged", "head": "linear"}
CASE |= {"on_all_ranks": False, "spoilt": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Folders by family: a Llama with one table for both ends, one that does not know all tokens of its tokenizer, a
    GPT-2, and experts that lie fused in memory."""
    folder, vocabulary = tmp_path_factory.mktemp("families"), len(tiny_tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(0)
    grown = LlamaConfig(vocab_size=vocabulary - 5, **sizes, num_key_value_heads=2, **ends, tie_word_embeddings=True)
    made = {
        "few tokens": LlamaForCausalLM(grown),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, **ends)),
        "qwen3moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocabulary, **sizes, **experts, **ends)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made} | {"llama": str(tiny_model)}


@pytest.fixture
def publish(run_ranks, models, tiny_pairs, tmp_path):
    """``publish(cases)``: what each rank found of each case, and its folder."""

    def run(cases: dict[str, dict]) -> dict[str, tuple[list[dict], Path]]:
        given = []
        for name, case in cases.items():
            places = {"folder": str(tmp_path / name), "cache": str(tmp_path / "cache"), "pairs": str(tiny_pairs)}
            given.append(CASE | places | case | {"path": models[case["model"]]})
        path = tmp_path / "cases.json"
        path.write_text(json.dumps(given))
        run_ranks([WORKER, str(path)], 2)
        found = json.loads(path.read_text())
        return {name: (each, tmp_path / name) for name, each in zip(cases, found, strict=True)}

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_equal_folders(pieces: Path, whole: Path) -> None:
    expected = weights(whole)
    assert weights(pieces).keys() == expected.keys()
    for name, value in weights(pieces).items():
        assert value.dtype == expected[name].dtype and value.equal(expected[name]), name
    texts = {path.name for path in whole.iterdir()} - {path.name for path in whole.glob("*.safetensors")}
    assert texts <= {path.name for path in pieces.iterdir()}
    for name in texts:
        assert told(pieces, name) == told(whole, name), name


def told(folder: Path, name: str) -> str:
    """The text of a file; the digest of the weights, which counts their files, is compared with them and left out."""
    text = (folder / name).read_text()
    if name != SETTINGS_NAME:
        return text
    digest = card_of(folder).weights
    assert f"weights={digest};" in text
    return text.replace(digest, "")


CASES = {
    "tied": {"model": "llama"},
    "merged once": {"model": "llama", "precision": "bfloat16", "lora": True},
    "transposed layers": {"model": "gpt2", "lora": True},
    "fused experts": {"model": "qwen3moe", "precision": "bfloat16"},
    "adapter": {"model": "llama", "precision": "bfloat16", "lora": True, "publish_lora": "adapter"},
    "reward": {"model": "llama", "precision": "bfloat16", "kind": "reward", "lora": True},
    "two layers": {"model": "qwen3moe", "kind": "reward", "head": "mlp"},
}


def test_pieces_make_the_folder_that_all_weights_make(publish):
    for name, (found, folder) in publish(CASES).items():
        assert_equal_folders(folder / "pieces", folder / "whole")
        assert all(max(rank["pieces"].values()) < 1e-4 for rank in found), name
        if name != "adapter":
            files = {path.name for path in (folder / "pieces").glob("*.safetensors")}
            index = json.loads((folder / "pieces" / "model.safetensors.index.json").read_text())
            assert len(files) > 1 and set(index["weight_map"].values()) == files, name
            assert index["metadata"]["total_size"] == sum(each.nbytes for each in weights(folder / "pieces").values())
        modes = [{stat.S_IMODE(path.stat().st_mode) for path in each.iterdir()} for each in folder.iterdir()]
        assert len(modes[0]) == 1 and modes[0] == modes[1], name


def test_all_ranks_open_what_no_process_could_and_find_out_what_is_wrong(publish):
    shared = {"on_all_ranks": True}
    found = publish(
        {
            "policy": {"model": "llama", "precision": "bfloat16", "lora": True} | shared,
            "two layers": {"model": "llama", "kind": "reward", "head": "mlp"} | shared,
            "adapter": CASES["adapter"] | shared,
            "adapter with a larger table": CASES["adapter"] | {"model": "few tokens"} | shared,
            "spoilt": {"model": "llama", "spoilt": True} | shared,
        }
    )
    for name in ("policy", "two layers", "adapter", "adapter with a larger table"):
        reports, folder = found[name]
        assert_equal_folders(folder / "pieces", folder / "whole")
        assert all(max(rank["pieces"].values()) < 1e-4 for rank in reports), name
    reports, folder = found["spoilt"]
    assert all("does not reproduce the live values" in rank["fault"] for rank in reports)
    assert list(folder.iterdir()) == []


def test_a_weight_that_does_not_come_is_missed(models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    writer = ModelWriter(model, tmp_path)
    for name, value in list(model.named_parameters())[:-1]:
        writer.add(name, value.detach())
    with pytest.raises(ModelError, match=r"no values for \['model\.norm\.weight'\]"):
        writer.close()
