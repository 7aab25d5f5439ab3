import pytest
from transformers import AutoConfig

from rlhf.core.errors import ConfigError
from rlhf.models.positions import check_positions


@pytest.mark.parametrize(("family", "name"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions")])
def test_a_text_longer_than_the_places_is_refused_with_both_lengths(family, name):
    settings = AutoConfig.for_model(family, **{name: 64})
    check_positions(settings, 64, "here")
    with pytest.raises(ConfigError, match=r"model.path = here has places for 64 tokens .* takes 65"):
        check_positions(settings, 65, "here")


def test_a_row_that_would_change_the_factors_of_its_neighbors_is_refused():
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 10000.0, **factors}
    settings = AutoConfig.for_model(
        "phi3", max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope
    )
    check_positions(settings, 32, "here")
    with pytest.raises(ConfigError, match=r"LongRoPE.* passes 32 tokens.* takes 33"):
        check_positions(settings, 33, "here")


def test_models_without_a_limit_take_any_text():
    check_positions(AutoConfig.for_model("mamba"), 10**6, "here")
