"""Shapes and counts, against Transformers' own."""

import json

import pytest
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from launch.plan.models import Sources, empty_model
from launch.plan.shapes import KNOWN, known_name
from policy.building import build_policy
from policy.options import PolicyConfig
from reward.building import build_reward_model
from reward.config import RewardModelConfig
from rlhf.core.errors import ModelError
from rlhf.models.options import BackboneConfig, LoraOptions

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
}
"""Parameter counts as the models' publishers state them."""


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_have_the_published_number_of_parameters(name):
    model = empty_model(BackboneConfig(path=f"someone/{name.title()}-Instruct"), "language model", setting="model.path")
    assert model.total == PUBLISHED[name]
    assert model.origin == f"the published shape of {name}"


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b"])
def test_counts_agree_with_a_closed_form(name):
    """Embeddings, and for each layer query, key, value, output, three of the MLP and two norms; one norm at the end."""
    model = empty_model(BackboneConfig(path=name), "language model", setting="model.path")
    shape = model.shape
    matrices = 2 * shape.hidden * (shape.query_width + shape.kv_width) + 3 * shape.hidden * shape.intermediate
    tables = 1 if KNOWN[name]["tie_word_embeddings"] else 2
    norms = (2 * shape.layers + 1) * shape.hidden
    assert model.matrix_parameters == shape.layers * matrices
    assert model.total == tables * shape.vocabulary * shape.hidden + shape.layers * matrices + norms


VARIANTS = [
    {},
    {"layers": 2},
    {"freeze_layers": 2},
    {"lora": LoraOptions(rank=4)},
    {"lora": LoraOptions(), "freeze_layers": 1},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_what_is_trained_is_what_the_stages_train(tiny_model, settings):
    import torch

    config = PolicyConfig(path=str(tiny_model), **settings)
    real = build_policy(config, dtype=torch.float32, vocabulary=0, seed=0)
    planned = empty_model(config, "language model", setting="model.path")
    assert planned.total == sum(each.numel() for each in real.parameters())
    assert planned.trainable == sum(each.numel() for each in real.parameters() if each.requires_grad)
    config = RewardModelConfig(path=str(tiny_model), **settings)
    real = build_reward_model(config, dtype=torch.float32, pad_token_id=2, vocabulary=0, seed=0)
    planned = empty_model(config, "reward model", setting="model.path")
    assert planned.total == sum(each.numel() for each in real.parameters())
    assert planned.trainable == sum(each.numel() for each in real.parameters() if each.requires_grad)


HEADS = [{"head": "bnrm", "head_hidden": 16}, {"head": "bnrm", "head_hidden": 0}, {"heads": 3}]


@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_heads_are_counted_as_they_are_built(tiny_model, settings):
    import torch

    config = RewardModelConfig(path=str(tiny_model), **settings)
    real = build_reward_model(config, dtype=torch.float32, pad_token_id=2, vocabulary=0, seed=0)
    planned = empty_model(config, "reward model", setting="model.path")
    assert planned.total == sum(each.numel() for each in real.parameters())


@pytest.mark.parametrize(("settings", "active"), [({}, 3), ({"freeze_layers": 2}, 1), ({"lora": LoraOptions()}, 3)])
def test_the_layers_that_a_backward_pass_goes_through(tiny_model, settings, active):
    model = empty_model(BackboneConfig(path=str(tiny_model), **settings), "language model", setting="model.path")
    assert model.active_layers == active


def test_fused_experts_are_gathered_together(tmp_path):
    """Gate, up and down projections of all experts are the parameters of one module."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "num_local_experts": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    file = tmp_path / "config.json"
    AutoConfig.for_model("mixtral", num_hidden_layers=2, **sizes, **heads).to_json_file(file)
    absent = BackboneConfig(path="runs/nowhere/final")
    model = empty_model(absent, "language model", sources=Sources(fallback=str(file)), setting="model.path")
    assert max(model.sizes) == 8 * 2 * 64 * 32 and model.most_gathered == 8 * 3 * 64 * 32


def test_any_configuration_is_counted_as_transformers_counts_it(tmp_path):
    settings = AutoConfig.for_model("qwen3", num_hidden_layers=2, hidden_size=64, head_dim=32)
    with init_empty_weights():
        expected = AutoModelForCausalLM.from_config(settings).num_parameters()
    file = tmp_path / "config.json"
    settings.to_json_file(file)
    absent = BackboneConfig(path="runs/nowhere/final")
    model = empty_model(absent, "language model", sources=Sources(fallback=str(file)), setting="model.path")
    assert model.total == expected
    assert model.shape.query_width == settings.num_attention_heads * 32


def test_a_name_is_known_by_its_longest_part():
    assert known_name("meta-llama/Meta-Llama-3-70B-Instruct/") == "llama-3-70b"
    assert known_name("runs/preference/final") is None


def test_an_unknown_model_is_refused_with_the_way_out():
    with pytest.raises(ModelError, match=r"model.path = runs/nowhere/final.*--model-config"):
        empty_model(BackboneConfig(path="runs/nowhere/final"), "language model", setting="model.path")


def test_a_configuration_file_takes_the_place_of_an_absent_model(tmp_path):
    def described(fallback):
        absent = BackboneConfig(path="runs/nowhere/final", layers=8)
        return empty_model(absent, "language model", sources=Sources(fallback=str(fallback)), setting="model.path")

    file = tmp_path / "config.json"
    file.write_text(json.dumps(KNOWN["smollm2-135m"]))
    assert described(file).shape.layers == described(tmp_path).shape.layers == 8
    file.write_text("[]")
    with pytest.raises(ModelError, match="no model configuration"):
        described(file)
    with pytest.raises(ModelError, match="no such file, and no known name"):
        described("llama-9")


def test_what_an_earlier_stage_will_make_has_the_shape_of_what_it_starts_from():
    made = {
        "runs/p/sft/final": BackboneConfig(path="someone/llama-3-8b", layers=12),
        "runs/p/preference/final": BackboneConfig(path="runs/p/sft/final", lora=LoraOptions()),
    }
    later = BackboneConfig(path="runs/p/preference/final")
    model = empty_model(later, "language model", sources=Sources(made=made), setting="policy.path")
    assert (model.shape.layers, model.shape.hidden, model.trained) == (12, 4096, "full")


@pytest.mark.parametrize(
    "spelling", ["runs/p/sft/final/", "./runs/p/sft/final", "runs/p/../p/sft/final", "{here}/runs/p/sft/final"]
)
def test_a_folder_that_is_still_to_be_made_is_known_however_it_is_spelled(spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {"runs/p/sft/final": BackboneConfig(path="someone/llama-3-8b")}
    later = BackboneConfig(path=spelling.format(here=tmp_path))
    model = empty_model(later, "language model", sources=Sources(made=made), setting="policy.path")
    assert model.total == PUBLISHED["llama-3-8b"]


def test_models_that_wait_for_each_other_in_a_circle_are_unknown():
    made = {"runs/a": BackboneConfig(path="runs/b"), "runs/b": BackboneConfig(path="runs/a/")}
    with pytest.raises(ModelError, match=r"model\.path = "):
        empty_model(BackboneConfig(path="runs/a"), "language model", sources=Sources(made=made), setting="model.path")


def test_more_layers_than_there_are_are_refused(tiny_model):
    with pytest.raises(ModelError, match=r"model\.layers = 9"):
        empty_model(BackboneConfig(path=str(tiny_model), layers=9), "language model", setting="model.path")
    with pytest.raises(ModelError, match=r"model\.layers = 99"):
        empty_model(BackboneConfig(path="llama-3-8b", layers=99), "language model", setting="model.path")
