"""Reward models on encoders, from pairs to a published folder."""

import json

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from reward.__main__ import main as reward

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
ENCODERS = {
    "bert": (BertConfig, BertForMaskedLM, SIZES),
    "distilbert": (DistilBertConfig, DistilBertForMaskedLM, DISTIL),
    "modernbert": (ModernBertConfig, ModernBertForMaskedLM, SIZES),
    "roberta": (RobertaConfig, RobertaForMaskedLM, SIZES),
}


@pytest.fixture(params=ENCODERS)
def encoder(request, tiny_tokenizer, tmp_path):
    """A folder with a small encoder; as with BERT, its tokenizer has [CLS] and [SEP], and no EOS."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    ids = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    kind, model, sizes = ENCODERS[request.param]
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    special |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    model(kind(vocab_size=len(tokenizer) + 4, max_position_embeddings=800, **special, **sizes)).save_pretrained(
        tmp_path / "encoder"
    )
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.slow
def test_an_encoder_is_trained_and_published(encoder, tmp_path):
    rows = [{"prompt": f"the {word}", "chosen": "is good", "rejected": "no"} for word in "abc"] * 4
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"output={tmp_path}/run", f"model.path={encoder}", f"data.train={tmp_path}/pairs.jsonl"]
    short = ["engine.kind=local", "train.max_steps=2", "train.global_batch_size=4", "train.tensorboard=false"]
    assert reward([*given, *short]) == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["padding_share"] < 0.5 and "shared_share" not in first, "an encoder packs no rows"
    final = tmp_path / "run" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    text = [{"role": "user", "content": "the sun"}, {"role": "assistant", "content": "is good"}]
    tokens = tokenizer.apply_chat_template(text, return_dict=False)
    assert (tokens[0], tokens[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert AutoModelForSequenceClassification.from_pretrained(final).config.num_labels == 1
