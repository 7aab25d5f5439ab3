import pytest

from benchmarks.rehearsal import large_tokenizer, measure, publishables
from benchmarks.sharded_start import write_model
from launch.plan.shapes import KNOWN


def test_a_tokenizer_is_as_large_as_it_is_asked_to_be():
    tokenizer = large_tokenizer(70000)
    assert len(tokenizer) == 70000
    text = "<|start_header_id|>user<|end_header_id|>\n\nwhy, über?<|eot_id|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
@pytest.mark.full
def test_each_kind_of_run_is_rehearsed_for_a_model_of_a_known_shape(tmp_path, monkeypatch):
    small = KNOWN["llama-3.2-1b"] | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 66500}
    monkeypatch.setitem(KNOWN, "llama-3.2-1b", small | {"num_attention_heads": 4, "num_key_value_heads": 2})
    write_model(tmp_path / "base", "llama-3.2-1b", "bfloat16", num_hidden_layers=3)
    large_tokenizer(66500).save_pretrained(tmp_path / "base")
    found = publishables(tmp_path / "base")
    assert len(found) == 4
    for name, publishable in found.items():
        measure(publishable, tmp_path / name)
        assert not list((tmp_path / name).rglob("*.json"))  # nothing is left of it
