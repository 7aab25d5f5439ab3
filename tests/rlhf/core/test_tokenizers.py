import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rlhf.core.tokenizers import tokenizer_digest


def changed(tokenizer, **settings):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"] |= settings
    core = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token)


@pytest.mark.parametrize("settings", [{"ignore_merges": True}, {"dropout": 0.1}])
def test_the_name_of_a_tokenizer_covers_settings_that_the_probe_does_not_show(tiny_tokenizer, settings):
    assert tokenizer_digest(changed(tiny_tokenizer)) != tokenizer_digest(changed(tiny_tokenizer, **settings))


def test_the_name_of_a_tokenizer_covers_the_splitting_of_special_tokens(tiny_tokenizer):
    one, other = changed(tiny_tokenizer), changed(tiny_tokenizer)
    assert tokenizer_digest(one) == tokenizer_digest(other)
    other.split_special_tokens = True
    assert tokenizer_digest(one) != tokenizer_digest(other)
