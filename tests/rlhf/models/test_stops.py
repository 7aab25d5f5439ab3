import json
import logging

import pytest

from rlhf.core.errors import ModelError
from rlhf.models.stops import model_stop_tokens
from rlhf.models.tokenizer import load_tokenizer


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A model folder with the configurations given."""

    def make(generation=None, **settings):
        config = json.loads((tiny_model / "config.json").read_text()) | settings
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return make


@pytest.mark.parametrize(("ends", "found"), [(0, (0,)), ([2, 0], (2, 0)), ([], ()), (None, ())])
def test_all_end_tokens_of_the_generation_config_are_found(folder, tiny_model, ends, found):
    assert model_stop_tokens(folder({"eos_token_id": ends}), load_tokenizer(tiny_model)) == found


def test_settings_that_transformers_would_not_save_do_not_matter(folder, tiny_model):
    path = folder({"eos_token_id": [0, 2], "temperature": 0.9, "top_p": 0.6, "do_sample": False})
    assert model_stop_tokens(path, load_tokenizer(tiny_model)) == (0, 2)


def test_a_model_without_generation_config_stops_where_its_configuration_says(folder, tiny_model):
    assert model_stop_tokens(folder(eos_token_id=[0]), load_tokenizer(tiny_model)) == (0,)


def test_a_letter_is_no_end_token_and_that_is_said(folder, tiny_model, caplog):
    tokenizer = load_tokenizer(tiny_model)
    letter = tokenizer.convert_tokens_to_ids("a")
    with caplog.at_level(logging.WARNING):
        assert model_stop_tokens(folder({"eos_token_id": [letter, 2]}), tokenizer) == (2,)
    assert f"{letter} ('a')" in caplog.text
    assert "rollout.stop_token_ids" in caplog.text


def test_a_token_beyond_the_vocabulary_is_no_end_token(folder, tiny_model):
    assert model_stop_tokens(folder({"eos_token_id": [50256]}), load_tokenizer(tiny_model)) == ()


def test_a_folder_without_configurations_names_none(tmp_path, tiny_model):
    assert model_stop_tokens(tmp_path, load_tokenizer(tiny_model)) == ()


@pytest.mark.parametrize("ends", ["<|im_end|>", [2, None], [2, "0"], [[2]], {"a": 1}, 1.5])
def test_ends_that_are_no_tokens_are_refused_in_one_line(folder, tiny_model, ends):
    with pytest.raises(ModelError, match=r"eos_token_id = .*expected the number of a token|cannot be read") as refused:
        model_stop_tokens(folder({"eos_token_id": ends}), load_tokenizer(tiny_model))
    assert "\n" not in str(refused.value)


def test_a_negative_number_is_no_end_token(folder, tiny_model):
    assert model_stop_tokens(folder({"eos_token_id": [-1, 2]}), load_tokenizer(tiny_model)) == (2,)


@pytest.mark.parametrize("settings", [{"pad_token_id": [1]}, {"suppress_tokens": [2], "forced_eos_token_id": [2]}])
def test_a_generation_config_that_transformers_does_not_open_is_refused_in_one_line(folder, tiny_model, settings):
    path = folder(settings)
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read \(.*Transformers would not open it"):
        model_stop_tokens(path, load_tokenizer(tiny_model))
    (path / "generation_config.json").write_text("{not json")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        model_stop_tokens(path, load_tokenizer(tiny_model))
