import json

import pytest

from benchmarks.families import families, markdown, small_config


@pytest.mark.slow
@pytest.mark.dist
def test_a_family_is_tried_from_rows_to_a_reloaded_folder_and_what_fails_is_told_in_one_line(run_ranks, tmp_path):
    run_ranks(["-m", "benchmarks.families", "fnet", "mamba", "--output", str(tmp_path)], ranks=1)
    found = {each["family"]: each for each in json.loads((tmp_path / "families.json").read_text())}
    assert found["mamba"]["model"] == "MambaForCausalLM"
    assert [found["mamba"][step] for step in ("policy", "sampled")] == ["", ""]
    assert "no AutoModelForSequenceClassification for models of type mamba" in found["mamba"]["reward"]
    assert "padd" in found["fnet"]["reward"]
    table = (tmp_path / "families.md").read_text()
    assert "| policies, sampled too (1) | mamba |" in table
    assert "/tmp" not in table


def test_every_family_of_transformers_is_in_the_list_and_models_are_small():
    names = families()
    assert {"llama", "gemma3", "deberta-v2", "mistral3", "falcon_h1", "hyperclovax"} <= set(names)
    assert len(names) > 200
    for name in ("llama", "falcon_h1", "gemma4", "bert"):
        config = small_config(name)
        assert config.get_text_config().hidden_size == 32
    assert markdown([]).startswith("| trained, published, reloaded | families |")
