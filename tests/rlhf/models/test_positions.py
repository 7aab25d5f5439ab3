import json

import pytest
from transformers import AutoConfig

from rlhf.core.errors import ConfigError
from rlhf.models.options import BackboneConfig
from rlhf.models.positions import check_places, check_positions
from rlhf.models.roles import ModelRole


@pytest.mark.parametrize(("family", "name"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions")])
def test_a_text_longer_than_the_places_is_refused_with_both_lengths(family, name):
    settings = AutoConfig.for_model(family, **{name: 64})
    check_positions(settings, 64, "model.path = here")
    with pytest.raises(ConfigError, match=r"model.path = here has places for 64 tokens .* takes 65"):
        check_positions(settings, 65, "model.path = here")


def test_a_row_that_would_change_the_factors_of_its_neighbors_is_refused():
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 10000.0, **factors}
    settings = AutoConfig.for_model(
        "phi3", max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope
    )
    check_positions(settings, 32, "model.path = here")
    with pytest.raises(ConfigError, match=r"LongRoPE.* passes 32 tokens.* takes 33"):
        check_positions(settings, 33, "model.path = here")


def test_models_without_a_limit_take_any_text():
    check_positions(AutoConfig.for_model("mamba"), 10**6, "model.path = here")


@pytest.mark.parametrize(
    ("family", "pad", "fits"), [("roberta", 1, 512), ("xlm-roberta", 1, 512), ("camembert", 0, 513)]
)
def test_places_behind_the_padding_token_are_counted(family, pad, fits):
    settings = AutoConfig.for_model(family, max_position_embeddings=514, pad_token_id=pad)
    check_positions(settings, fits, "model.path = here")
    with pytest.raises(ConfigError, match=f"places for {fits} tokens"):
        check_positions(settings, fits + 1, "model.path = here")


def test_every_model_of_a_run_must_have_the_places(tmp_path):
    def role(name, places, **more):
        folder = tmp_path / name
        AutoConfig.for_model("llama", max_position_embeddings=places).save_pretrained(folder)
        if more:
            (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | more))
        backbone = BackboneConfig(path=str(folder))
        return ModelRole(name=name, section=name, setting=f"{name}.path", backbone=backbone, kind="reward model")

    roles = [role("policy", 64), role("reference", 48)]
    check_places(roles, 48)
    with pytest.raises(ConfigError, match=r"reference.path = .* places for 48"):
        check_places(roles, 49)
    two_layers = role("reward", 32, model_type="margin-rlhf-mlp-reward", backbone_model_type="llama")
    with pytest.raises(ConfigError, match=r"reward.path = .* places for 32"):
        check_places([*roles, two_layers], 33)
