import pytest

from rlhf.core.tokenizers import tokenizer_digest
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import chat_format
from rlhf.models.tokenizer import load_tokenizer

PROMPT = ({"role": "user", "content": "the sun"},)
ANSWER = ({"role": "assistant", "content": "is good and happy"},)


@pytest.fixture(params=[None, "plain", "chatml", "qwen3"])
def pair(request, tiny_model, tmp_path):
    """The format that was trained with, and the tokenizer as a plain user gets it from the published folder."""
    chat = chat_format(load_tokenizer(tiny_model), request.param)
    portable_tokenizer(chat).save_pretrained(tmp_path)
    return chat, load_tokenizer(tmp_path)


def test_plain_users_get_the_tokens_of_training(pair):
    chat, published = pair
    expected, start = chat.encode(PROMPT, ANSWER)
    assert published.apply_chat_template([*PROMPT, *ANSWER], return_dict=False) == expected.tolist()
    begun = published.apply_chat_template(list(PROMPT), add_generation_prompt=True, return_dict=False)
    assert begun == expected[:start].tolist()


def test_the_published_tokenizer_is_recognized_and_keeps_its_padding(pair):
    chat, published = pair
    assert published.pad_token == chat.tokenizer.pad_token != published.eos_token
    assert tokenizer_digest(published) == tokenizer_digest(chat.tokenizer)


def test_publishing_again_changes_nothing(pair):
    chat, published = pair
    again = chat_format(published, None)
    assert again.encode(PROMPT, ANSWER)[0].tolist() == chat.encode(PROMPT, ANSWER)[0].tolist()
