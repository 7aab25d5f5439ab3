import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from rlhf.core.errors import ModelError
from rlhf.core.tokenizers import tokenizer_digest
from rlhf.models.tokenizer import (
    NEW_PAD_TOKEN,
    RULE,
    apply_pad_policy,
    choose_pad_token,
    load_tokenizer,
    pad_policy,
    required_embedding_rows,
)

TEMPLATE = "{% for message in messages %}{{ message['content'] + '<end>' }}{% endfor %}"


def words(*special: str, template: str | None = TEMPLATE, **named: str) -> PreTrainedTokenizerFast:
    """A whole-word tokenizer over ``special`` tokens and a few words; ``named`` are bos, eos, unk, pad."""
    vocabulary = {token: index for index, token in enumerate([*special, "sun", "rain", "day"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=named.get("unk_token", "sun")))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def test_a_padding_token_of_its_own_is_kept():
    tokenizer = words("<pad>", "<end>", "<unk>", eos_token="<end>", unk_token="<unk>", pad_token="<pad>")
    assert (choose_pad_token(tokenizer).pad_token, choose_pad_token(tokenizer).pad_token_id) == ("<pad>", 0)


def test_padding_with_the_end_token_gives_way_to_the_unknown_token():
    tokenizer = words("<end>", "<unk>", eos_token="<end>", unk_token="<unk>", pad_token="<end>")
    policy = choose_pad_token(tokenizer)
    assert (policy.pad_token, policy.pad_token_id, policy.added) == ("<unk>", 1, False)
    assert "its own (<end>) can end a text" in policy.reason


def test_padding_with_the_end_of_turn_token_gives_way_although_it_is_not_eos():
    tokenizer = words("<eos>", "<end>", "<unk>", eos_token="<eos>", unk_token="<unk>", pad_token="<end>")
    assert choose_pad_token(tokenizer).pad_token == "<unk>"


def test_a_template_picked_by_name_counts_like_a_single_one():
    templates = {"default": "{{ messages }}", "tools": TEMPLATE}
    tokenizer = words(
        "<eos>", "<end>", "<unk>", template=templates, eos_token="<eos>", unk_token="<unk>", pad_token="<end>"
    )
    assert choose_pad_token(tokenizer).pad_token == "<unk>"


def test_an_unknown_token_that_is_also_the_end_token_is_no_padding():
    tokenizer = words("<end>", "<reserved_7>", eos_token="<end>", unk_token="<end>")
    assert choose_pad_token(tokenizer).pad_token == "<reserved_7>"


def test_a_token_made_for_padding_comes_before_a_reserved_one():
    tokenizer = words("<end>", "<reserved_7>", "<|finetune_pad|>", eos_token="<end>")
    policy = choose_pad_token(tokenizer)
    assert (policy.pad_token, policy.pad_token_id) == ("<|finetune_pad|>", 2)
    assert "without a use in the chat template" in policy.reason


def test_a_reserved_token_that_the_template_writes_is_not_idle():
    tokenizer = words(
        "<reserved_7>", "<reserved_8>", template=TEMPLATE + "<reserved_7>", eos_token="<reserved_8>"
    )
    assert choose_pad_token(tokenizer).added


def test_other_special_tokens_are_never_taken_as_they_may_end_a_text():
    tokenizer = words("<end>", "<|end_of_text|>", "</s>", eos_token="<end>")
    policy = choose_pad_token(tokenizer)
    assert (policy.pad_token, policy.added) == (NEW_PAD_TOKEN, True)


def test_a_new_token_takes_the_next_row_and_no_more():
    tokenizer = words("<end>", eos_token="<end>", pad_token="<end>")
    assert required_embedding_rows(tokenizer) == 4
    apply_pad_policy(tokenizer, choose_pad_token(tokenizer))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (NEW_PAD_TOKEN, 4)
    assert required_embedding_rows(tokenizer) == 5


def test_a_new_token_that_lands_in_a_gap_of_the_numbering_is_refused():
    backend = Tokenizer(models.WordLevel({"<end>": 0, "sun": 1, "rain": 10}, unk_token="sun"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    with pytest.raises(ModelError, match=r"'<\|pad\|>' has id 3, expected 11"):
        apply_pad_policy(tokenizer, choose_pad_token(tokenizer))


def test_choosing_changes_nothing():
    tokenizer = words("<end>", eos_token="<end>", pad_token="<end>")
    choose_pad_token(tokenizer)
    assert tokenizer.pad_token == "<end>" and len(tokenizer) == 4


def test_the_policy_survives_saving_and_loading(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    tokens = {"pad_token": "<|endoftext|>", "pad_token_id": 0, "eos_token": "<|im_end|>", "eos_token_id": 2}
    assert pad_policy(tokenizer) == {"rule": RULE, **tokens}
    assert pad_policy(again) == pad_policy(tokenizer)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


def test_a_template_that_is_given_replaces_the_own_one_before_the_choice(tiny_model):
    tokenizer = load_tokenizer(tiny_model, chat_template="{{ messages }}<|endoftext|>")
    assert tokenizer.chat_template == "{{ messages }}<|endoftext|>"
    assert tokenizer.pad_token == NEW_PAD_TOKEN


def test_plain_transformers_reads_the_last_token_of_a_text_that_ends_with_the_end_token(tiny_model):
    """What the policy is for: with padding = end token the same model pools one token too early."""
    tokenizer = load_tokenizer(tiny_model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).eval()
    tokens = torch.tensor([tokenizer("it is a sad day<|im_end|>")["input_ids"]])
    with torch.no_grad():
        hidden = model.model(input_ids=tokens).last_hidden_state
        expected, before = model.score(hidden)[0, -1], model.score(hidden)[0, -2]
        model.config.pad_token_id = tokenizer.pad_token_id
        scores = model(input_ids=tokens).logits[0]
        model.config.pad_token_id = tokenizer.eos_token_id
        wrong = model(input_ids=tokens).logits[0]
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(wrong, before)
    assert (expected - before).abs() > 1e-3


def test_the_digest_is_the_same_in_every_process():
    """Hash seeds differ from run to run; the digest written down here must not."""
    tokenizer = words("<end>", "<unk>", eos_token="<end>", unk_token="<unk>")
    assert tokenizer_digest(tokenizer) == "00e83ef589841190"


@pytest.mark.parametrize("change", ["merge", "word", "added", "special", "splitter", "end"])
def test_the_digest_tells_tokenizers_apart(tiny_model, change):
    tokenizer = load_tokenizer(tiny_model)
    before = tokenizer_digest(tokenizer)
    changed = copy.deepcopy(tokenizer)
    match change:
        case "merge":
            vocabulary, merges = _vocabulary_and_merges(changed)
            changed.backend_tokenizer.model = models.BPE(vocabulary, merges[:-1])
        case "word":
            vocabulary, merges = _vocabulary_and_merges(changed)
            idle = next(word for word in vocabulary if len(word) == 1 and word not in str(merges))
            vocabulary["☃"] = vocabulary.pop(idle)
            changed.backend_tokenizer.model = models.BPE(vocabulary, merges)
        case "added":
            changed.add_tokens(["<think>"])
        case "special":
            tokenizer.add_tokens(["<think>"])
            before = tokenizer_digest(tokenizer)
            changed.add_tokens(["<think>"], special_tokens=True)
        case "splitter":
            changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "end":
            changed.eos_token = "<|endoftext|>"
    assert tokenizer_digest(changed) != before


def test_a_model_put_together_again_has_the_digest_of_the_original(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    again = copy.deepcopy(tokenizer)
    again.backend_tokenizer.model = models.BPE(*_vocabulary_and_merges(tokenizer))
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


def test_the_digest_ignores_padding_and_truncation_of_a_call(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    before = tokenizer_digest(tokenizer)
    tokenizer(["a day", "sun"], padding=True, truncation=True, max_length=3)
    tokenizer.padding_side = "left"
    assert tokenizer_digest(tokenizer) == before


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer can be loaded from here"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="absent: no tokenizer can be loaded from here"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("text", ['{"version": ', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_file_is_a_plain_message(tiny_model, tmp_path, text):
    load_tokenizer(tiny_model).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="no tokenizer can be loaded from here"):
        load_tokenizer(tmp_path)


def test_plain_loading_after_saving_keeps_the_padding_token(tiny_model, tmp_path):
    load_tokenizer(tiny_model).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 0


def _vocabulary_and_merges(tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
