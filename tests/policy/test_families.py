"""From rows to a published folder, for tokenizers, generation configs and adapters as families of models have them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from policy.ppo.__main__ import main as ppo
from policy.preference.__main__ import main as preference
from policy.publish import repaired_generation_config
from policy.sft.__main__ import main as sft
from reward.__main__ import main as reward
from rlhf.models.adapters import adapter_base

WORDS = ("the", "sun", "rain", "tax", "day", "form", "good", "dentist")
SHORT = ("engine.kind=local", "train.max_steps=1", "train.global_batch_size=4", "train.tensorboard=false")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|header|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
    " {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of conversations, pairs and prompts."""
    folder = tmp_path_factory.mktemp("rows")
    prompts = [f"write one sentence about {word}" for word in WORDS]
    kinds = {
        "conversations": [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": " it is  good.\n"}]}
            for text in prompts
        ],
        "pairs": [{"prompt": text, "chosen": "it is  good", "rejected": "no"} for text in prompts],
        "prompts": [{"prompt": text} for text in prompts],
    }
    for name, lines in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def sentencepiece_model(folder: Path, **generation) -> Path:
    """As Llama 2: a tokenizer that puts a space before each text, so that decoding does not give the text back."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        [" ".join(WORDS)] * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INSTRUCTIONS
    )
    return _save(folder, tokenizer, {"eos_token_id": 2, **generation})


def many_special_tokens_model(folder: Path, tiny_tokenizer) -> Path:
    """As Llama 3: 250 reserved tokens, two end tokens."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    names = ["<|begin|>", "<|end|>", "<|start|>", "<|header|>", "<|eot|>", *(f"<|reserved_{n}|>" for n in range(250))]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<|begin|>", "<|end|>", HEADERS
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|eot|>"])
    return _save(folder, tokenizer, {"eos_token_id": ends, "do_sample": True, "temperature": 0.6, "top_p": 0.9})


def _save(folder: Path, tokenizer, generation) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture
def gpt2(tmp_path, tiny_tokenizer):
    """A model without a row to spare for padding."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.slow
def test_a_policy_whose_tokenizer_cannot_give_texts_back_is_published(rows, tmp_path):
    base = sentencepiece_model(tmp_path / "base")
    assert sft([f"output={tmp_path}/run", f"model.path={base}", f"data.train={rows}/conversations.jsonl", *SHORT]) == 0
    assert (tmp_path / "run" / "final" / "config.json").is_file()


@pytest.mark.slow
def test_a_reward_model_whose_tokenizer_cannot_give_texts_back_is_published(rows, tmp_path):
    base = sentencepiece_model(tmp_path / "base")
    assert reward([f"output={tmp_path}/run", f"model.path={base}", f"data.train={rows}/pairs.jsonl", *SHORT]) == 0
    assert (tmp_path / "run" / "final" / "config.json").is_file()


@pytest.mark.slow
def test_a_policy_with_hundreds_of_special_tokens_is_published_with_its_ends_and_sampling(
    rows, tmp_path, tiny_tokenizer
):
    base = many_special_tokens_model(tmp_path / "base", tiny_tokenizer)
    assert sft([f"output={tmp_path}/run", f"model.path={base}", f"data.train={rows}/conversations.jsonl", *SHORT]) == 0
    final = tmp_path / "run" / "final"
    settings = json.loads((final / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert set(tokenizer.convert_ids_to_tokens(settings["eos_token_id"])) == {"<|end|>", "<|eot|>"}
    assert (settings["temperature"], settings["top_p"]) == (0.6, 0.9)
    assert tokenizer.eos_token == "<|eot|>"


@pytest.mark.slow
def test_settings_of_sampling_without_sampling_are_repaired_and_said(rows, tmp_path, caplog):
    base = sentencepiece_model(tmp_path / "base", temperature=0.9, top_p=0.6)
    assert sft([f"output={tmp_path}/run", f"model.path={base}", f"data.train={rows}/conversations.jsonl", *SHORT]) == 0
    settings = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    assert (settings["do_sample"], settings["temperature"]) == (True, 0.9)
    assert "has settings of sampling, but sampling off: switched on" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 1, "early_stopping": True}, {"top_k": 3, "do_sample": False}, {"num_return_sequences": 4}],
)
def test_whatever_the_generation_config_of_a_base_model_a_valid_one_is_published(settings, tmp_path):
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=10, **SIZES)).generation_config
    for name, value in settings.items():
        setattr(base, name, value)
    repaired_generation_config(base).save_pretrained(tmp_path)
    assert all(getattr(base, name) == value for name, value in settings.items())  # the model keeps its own


ADAPTER = ("model.lora={rank: 4}", "model.publish_lora=adapter")


@pytest.mark.slow
def test_an_adapter_of_a_model_that_had_to_grow_is_published_with_the_embedding(gpt2, rows, tmp_path):
    run = tmp_path / "run"
    code = sft([f"output={run}", f"model.path={gpt2}", f"data.train={rows}/conversations.jsonl", *ADAPTER, *SHORT])
    assert code == 0
    assert (run / "final" / "adapter_config.json").is_file()
    code = preference([f"output={tmp_path}/next", f"model.path={run}/final", f"data.train={rows}/pairs.jsonl", *SHORT])
    assert code == 0
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (gpt2, tmp_path / "next" / "final"))
    assert after.config.vocab_size == before.config.vocab_size + 1


@pytest.fixture
def adapter(tiny_model, rows, tmp_path, monkeypatch):
    """``final/`` of a run that published an adapter; its base was given by a relative path."""
    monkeypatch.chdir(tiny_model.parent)
    model = os.path.relpath(tiny_model)
    code = sft(
        [f"output={tmp_path}/first", f"model.path={model}", f"data.train={rows}/conversations.jsonl", *ADAPTER, *SHORT]
    )
    assert code == 0
    monkeypatch.chdir("/")
    return tmp_path / "first" / "final"


@pytest.mark.slow
def test_an_adapter_starts_every_stage_from_any_folder(adapter, tiny_model, rows, tmp_path):
    assert adapter_base(adapter).path == str(tiny_model.resolve())
    assert (adapter / "generation_config.json").is_file()
    policy = f"model.path={adapter}"
    assert sft([f"output={tmp_path}/sft", policy, f"data.train={rows}/conversations.jsonl", *SHORT]) == 0
    assert preference([f"output={tmp_path}/dpo", policy, f"data.train={rows}/pairs.jsonl", *SHORT]) == 0
    assert reward([f"output={tmp_path}/reward", policy, f"data.train={rows}/pairs.jsonl", *SHORT]) == 0
    drawn = ["rollout.prompts=4", "rollout.samples=2", "rollout.max_new_tokens=4", "advantage.estimator=rloo"]
    judge = f"reward.path={tmp_path}/reward/final"
    code = ppo(
        [f"output={tmp_path}/ppo", f"policy.path={adapter}", judge, f"data.train={rows}/prompts.jsonl", *drawn, *SHORT]
    )
    assert code == 0
    for name in ("sft", "dpo", "reward", "ppo"):
        assert (tmp_path / name / "final" / "config.json").is_file(), name


@pytest.mark.slow
def test_a_second_adapter_on_an_adapter_is_published_merged_or_refused_before_training(adapter, rows, tmp_path, capsys):
    given = [f"output={tmp_path}/next", f"model.path={adapter}", f"data.train={rows}/conversations.jsonl", *SHORT]
    assert sft([*given, *ADAPTER]) != 0
    assert "is an adapter itself" in capsys.readouterr().err
    assert sft([*given, "model.lora={rank: 4}"]) == 0


OWN_CODE = """
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

class OwnConfig(LlamaConfig):
    model_type = "KIND"

class OwnModel(LlamaModel):
    config_class = OwnConfig

AutoModel.register(OwnConfig, OwnModel)

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "data"), [(sft, "conversations"), (reward, "pairs")], ids=["policy", "reward"])
def test_models_that_bring_their_own_code_are_published_with_it(stage, data, tiny_model, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    kind = f"own_{data}"  # once loaded, a type and the code of a folder are known in the whole process
    base = tmp_path / kind
    shutil.copytree(tiny_model, base)
    (base / "modeling_own.py").write_text(OWN_CODE.replace("KIND", kind))
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM",
             "AutoModelForSequenceClassification": "OwnForSequenceClassification"}  # fmt: skip
    settings = json.loads((base / "config.json").read_text()) | {
        "model_type": kind, "architectures": ["OwnForCausalLM"],
        "auto_map": {auto: f"modeling_own.{name}" for auto, name in names.items()},
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(settings))
    given = [f"output={tmp_path}/run", f"model.path={base}", "model.trust_remote_code=true", *SHORT]
    assert stage([*given, f"data.train={rows}/{data}.jsonl"]) == 0
    assert (tmp_path / "run" / "final" / "modeling_own.py").is_file()
