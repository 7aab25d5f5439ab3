"""``rlhf check served``, and what publishing writes for vLLM."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml
from tokenizers import processors
from transformers import AutoConfig, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from launch.cli import main
from reward.saving import OWN_MODEL_TYPES
from reward.serving.check import Comparison, Verdict
from reward.serving.vllm_settings import score_template, vllm_settings
from rlhf.core.errors import ModelError
from rlhf.data.options import TemplateChoice
from rlhf.train.chat import load_chat
from tests.published import published, with_begin_token


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tiny_tokenizer):
    """A small BERT, whose tokenizer puts a token before and one behind every text."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    ids = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=800, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(final, encoder, tiny_model, tmp_path_factory):
    room = tmp_path_factory.mktemp("kinds")
    system = TemplateChoice(system_prompt="Be kind.")
    return {
        "chatml": final,
        "system prompt": published(tiny_model, room / "system", system),
        "bos and left padding": published(with_begin_token(tiny_model, room / "begin"), room / "bos"),
        "encoder": published(encoder, room / "encoder"),
        "two layers": published(tiny_model, room / "mlp", head="mlp", head_hidden=8),
        "three heads": published(tiny_model, room / "heads", heads=3),
    }


def check(server, folder, *options):
    return main(["check", "served", server.url, "--model", str(folder), *options])


@pytest.mark.parametrize(
    "kind", ["chatml", "system prompt", "bos and left padding", "encoder", "two layers", "three heads"]
)
def test_what_is_served_is_what_plain_transformers_say(folders, serving, kind, capsys):
    assert check(serving(folders[kind]), folders[kind]) == 0
    shown = capsys.readouterr().out
    ways = ["messages", "texts", "token ids", "pairs", "padded on the right"]
    assert all(way in shown for way in ways) and ("padded on the left" in shown) == (kind != "encoder")
    assert "gives the scores of" in shown.splitlines()[-1] and "DIFFERS" not in shown


def test_rows_of_a_file_are_compared_too(server, final, tiny_pairs, capsys):
    assert check(server, final, "--data", str(tiny_pairs), "--rows", "10") == 0
    assert " 16 " in capsys.readouterr().out


def test_another_model_is_found_out(serving, final, moved, capsys):
    assert check(serving(moved), final) == 1
    shown = capsys.readouterr().out
    assert "does not serve" in shown.splitlines()[-1] and "other weights (" in shown and "DIFFERS" in shown


@pytest.mark.parametrize("way", ["sigmoid", "a line feed behind the answer", "one text in ten"])
def test_scores_that_are_off_are_found_out_whatever_the_card_says(serving, final, monkeypatch, capsys, way):
    server = serving(final)
    own, reader = server.batcher._score, server.reader
    if way == "sigmoid":
        server.batcher._score = lambda rows: [1 / (1 + 2.718281828**-score) for score in own(rows)]
    elif way == "one text in ten":
        server.batcher._score = lambda rows: [
            s + 0.1 * (len(r) % 10 == len(rows[0]) % 10) for s, r in zip(own(rows), rows, strict=True)
        ]
    else:
        feed = reader.chat.tokenizer("\n", add_special_tokens=False)["input_ids"]
        shown = type(reader)._shown
        monkeypatch.setattr(type(reader), "_shown", lambda *given: np.append(shown(*given), feed))
    assert check(server, final) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{server.url} gives OTHER scores than")


@pytest.mark.parametrize("worst", [(0.0, math.nan), (math.nan, 0.0), (0.0, math.inf, 0.0)])
def test_a_difference_that_is_no_number_is_one_too_many_wherever_it_stands(worst):
    ways = tuple(Comparison(way=str(place), texts=1, worst=value) for place, value in enumerate(worst))
    verdict = Verdict(comparisons=ways, tolerance=0.01, deviation=1.0, differences=())
    assert not verdict.passed and not math.isfinite(verdict.worst)
    assert replace(verdict, comparisons=tuple(each for each in ways if each.worst == 0)).passed


def test_a_tolerance_is_a_share_of_the_deviation_of_rewards(serving, final, capsys):
    server = serving(final)
    own = server.batcher._score
    server.batcher._score = lambda rows: [score + 0.02 for score in own(rows)]  # of 0.4
    assert check(server, final, "--tolerance", "0.04") == 1
    assert check(server, final, "--tolerance", "0.06") == 0


def test_a_published_model_tells_vllm_and_transformers_what_its_number_is(folders):
    for kind, folder in folders.items():
        assert AutoConfig.from_pretrained(folder).problem_type == "regression" if kind != "two layers" else True
    settings = yaml.safe_load((folders["chatml"] / "vllm.yaml").read_text())
    assert (
        settings == vllm_settings(folders["chatml"], load_chat(folders["chatml"])) and settings["runner"] == "pooling"
    )
    assert settings["pooler-config"] == {"seq_pooling_type": "LAST", "use_activation": False}
    assert settings["dtype"] == "float32"
    assert "seq_pooling_type" not in vllm_settings(folders["encoder"], load_chat(folders["encoder"]))["pooler-config"]


def test_a_head_that_vllm_does_not_know_is_not_offered_to_it(folders, capsys):
    assert not (folders["three heads"] / "vllm.yaml").exists()
    folder = folders["two layers"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == OWN_MODEL_TYPES["mlp"]
    assert not (folder / "vllm.yaml").exists()
    with pytest.raises(ModelError, match=r"\(model.head = mlp\), which vLLM does not know; serve it with --engine hf"):
        vllm_settings(folder, load_chat(folder))


@pytest.mark.parametrize("kind", ["chatml", "system prompt", "bos and left padding", "encoder"])
def test_vllms_template_shows_pairs_and_conversations_as_training_did(folders, kind):
    chat = load_chat(folders[kind])
    template = score_template(chat)
    talk = [{"role": "user", "content": "the sun"}, {"role": "assistant", "content": "is good"}]
    pair = [{"role": "query", "content": "the sun"}, {"role": "document", "content": "is good"}]
    expected = chat.encode(talk[:1], talk[1:])[0].tolist()
    as_talk = chat.tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False)
    as_pair = chat.tokenizer.apply_chat_template(pair, chat_template=template, tokenize=False)
    assert chat.tokenizer(as_talk, add_special_tokens=False)["input_ids"] == expected
    assert chat.tokenizer(as_pair)["input_ids"] == expected  # vLLM lets the tokenizer add its own here
