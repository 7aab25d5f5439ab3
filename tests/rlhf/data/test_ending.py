"""What ends an answer, for the ways in which published templates end one."""

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from rlhf.data.ending import Ending
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import chat_format
from rlhf.models.tokenizer import load_tokenizer

QUESTION = [{"role": "user", "content": "why?"}]
TALK = [*QUESTION, {"role": "assistant", "content": "because"}]
LONGER = [*TALK, {"role": "user", "content": "and now?"}, {"role": "assistant", "content": "nothing"}]


def turns(text: str, opening: str, *, always: bool = False, closing: str = "") -> str:
    """A template that shows each message by ``text`` and opens an answer when asked, or always."""
    opened = opening if always else "{% if add_generation_prompt %}" + opening + "{% endif %}"
    closed = "{% if not add_generation_prompt %}" + closing + "{% endif %}"
    return "{% for message in messages %}" + text + "{% endfor %}" + opened + closed


LLAMA = "<h>{{ message['role'] }}</h>\n\n{{ message['content'] | trim }}<eot>"
PHI = "<{{ message['role'] }}>\n{{ message['content'] }}<end>\n"
GLM = "<{{ message['role'] }}>\n{{ message['content'] }}"
COMMAND = (
    "<turn>{{ message['role'] }}{% if message['role'] == 'assistant' %}<say>{% endif %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<said>{% endif %}<turned>"
)
SPOKEN = "{{ message['role'] }}: {{ message['content'] }}\n"
VICUNA = (
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} {% else %}ASSISTANT: {{ message['content'] }}"
    "{{ eos_token }}{% endif %}"
)
SPACED = "{% if message['role'] == 'user' %}" + SPOKEN + "{% else %}{{ message['content'] }} </s>{% endif %}"

FAMILIES = {
    # the header of the next answer is always written, as in Llama 3 when it came out
    "opens another answer": (turns(LLAMA, "<h>assistant</h>\n\n", always=True), "</s>", ("<eot>", "<h>assistant</h>")),
    "opens when asked": (turns(LLAMA, "<h>assistant</h>\n\n"), "</s>", ("<eot>", "")),
    "opens, ends as EOS": (turns(LLAMA, "<h>assistant</h>\n\n", always=True), "<eot>", ("<eot>", "<h>assistant</h>")),
    "EOS of the conversation": (turns(PHI, "<assistant>\n", closing="{{ eos_token }}"), "</s>", ("<end>", "\n</s>")),
    "nothing behind an answer": (turns(GLM, "<assistant>\n"), "</s>", ("</s>", "")),
    "opens without an end": (turns(GLM, "<assistant>\n", always=True), "</s>", ("</s>", "<assistant>")),
    "opens in words": (turns(SPOKEN, "assistant: ", always=True), "</s>", ("</s>", "\nassistant:")),
    "two tokens, EOS last": (turns(COMMAND, "<turn>assistant<say>"), "<turned>", ("<turned>", "")),
    "EOS behind answers": (turns(VICUNA, "ASSISTANT: "), "</s>", ("</s>", "")),
    "a space before EOS": (turns(SPACED, ""), "</s>", ("</s>", "")),
}
SPECIAL = ("<eot>", "<h>", "</h>", "<end>", "<user>", "<assistant>", "<turn>", "<turned>", "<say>", "<said>", "</s>")


@pytest.fixture(params=FAMILIES)
def family(request, tiny_tokenizer):
    template, eos, ending = FAMILIES[request.param]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.eos_token = eos
    return chat_format(tokenizer, template), Ending(*ending)


def test_an_answer_ends_right_behind_its_own_end_token(family):
    chat, expected = family
    assert chat.ending == expected
    ids, start = chat.encode(QUESTION, TALK[1:])
    learned = chat.tokenizer.decode(ids[start:]).strip()
    assert learned.removeprefix("because").replace("<said>", "").strip() == expected.token
    assert set(chat.end_token_ids) == {ids[-1], chat.tokenizer.eos_token_id}


def test_each_turn_of_a_conversation_ends_with_what_ends_an_answer(tiny_tokenizer):
    """GLM-4 writes nothing behind an answer: the header of the next message ends it, as its generation config says."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, "<tool>")])
    tokenizer.eos_token = "</s>"
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<user>", "<tool>"])
    chat = chat_format(tokenizer, turns(GLM, "<assistant>\n"), ends)
    call = {"role": "assistant", "content": "looking", "tool_calls": []}
    talk = [*QUESTION, call, {"role": "tool", "content": "it"}, TALK[1], *LONGER[2:]]
    [(ids, spans)] = chat.tokenize_turns([chat.render_turns(talk)])
    said = [tokenizer.decode(ids[begin:end]) for begin, end in spans]
    assert said == ["looking<tool>", "because<user>", "nothing</s>"]


def test_the_turns_of_a_conversation_end_as_its_last_one_does(family):
    chat, _ = family
    text, spans = chat.render_turns(LONGER)
    first, last = (text[begin:end] for begin, end in spans)
    assert last == chat.render(LONGER[:3], LONGER[3:])[1][spans[1][0] :]
    assert first in (last.replace("nothing", "because"), "because")
    assert text.count("</h>") in (0, 4)  # headers of the four messages, and none of a fifth


def test_who_opens_the_published_tokenizer_stops_and_continues_where_training_did(family, tmp_path):
    chat, expected = family
    portable_tokenizer(chat).save_pretrained(tmp_path)
    published = load_tokenizer(tmp_path)
    assert published.eos_token == expected.token
    for messages in (TALK, LONGER):
        whole = chat.render(messages[:-1], messages[-1:])[1]
        assert published.apply_chat_template(messages, tokenize=False) == whole
        begun = published.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert begun == chat.render_prompt(messages[:-1])
    again = chat_format(published, None)
    assert (again.digest, again.tokenizer_digest) == (chat.digest, chat.tokenizer_digest)
    assert again.ending == Ending(expected.token, "")
    portable_tokenizer(again).save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == published.chat_template


def test_the_same_template_given_to_base_and_to_published_model_is_the_same_form(family, tmp_path):
    chat, _ = family
    portable_tokenizer(chat).save_pretrained(tmp_path)
    if "eos_token" in chat.template:  # then the text is another one: the end token that is written has changed
        return
    given = chat_format(load_tokenizer(tmp_path), chat.template)
    assert (given.digest, given.tokenizer_digest) == (chat.digest, chat.tokenizer_digest)


def test_a_tokenizer_of_many_special_tokens_can_be_published(tiny_tokenizer, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<|endoftext|>")
    reserved = [AddedToken(f"<|reserved_special_token_{n}|>", special=True, normalized=False) for n in range(250)]
    tokenizer.add_tokens([*reserved, AddedToken("it's <\"odd\\>", special=True, normalized=False)])
    tokenizer.eos_token = "<|reserved_special_token_9|>"
    chat = chat_format(tokenizer, "chatml")
    portable_tokenizer(chat).save_pretrained(tmp_path)
    published = load_tokenizer(tmp_path)
    assert published.apply_chat_template(TALK, tokenize=False) == chat.render(QUESTION, TALK[1:])[1]


def test_a_template_that_ends_answers_with_the_padding_token_is_refused(tiny_tokenizer):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<|im_end|>", eos_token="<|endoftext|>"
    )
    with pytest.raises(Exception, match=r"ends answers with <\|im_end\|>, the padding token"):
        chat_format(tokenizer, "chatml").encode(QUESTION, TALK[1:])
