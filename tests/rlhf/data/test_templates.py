import numpy as np
import pytest
from transformers import PreTrainedTokenizer

from rlhf.core.errors import DataError, ModelError
from rlhf.core.tokenizers import tokenizer_digest
from rlhf.data.built_in_templates import CHATML_TEMPLATE
from rlhf.data.templates import TemplateFault, chat_format

PROMPT = [{"role": "user", "content": "why?"}]
RESPONSE = [{"role": "assistant", "content": "Because 12 + 30 = 42."}]
SPEAKERS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_row_is_prompt_then_response_and_ends_with_the_end_token(tokenizer):
    ids, start = chat_format(tokenizer, None).encode(PROMPT, RESPONSE)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids[:start]) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids[start:]) == "Because 12 + 30 = 42.<|im_end|>"
    assert ids[-1] == tokenizer.eos_token_id


def test_the_prompt_is_the_text_that_a_rollout_starts_from(tokenizer):
    before, whole = chat_format(tokenizer, None).render(PROMPT, RESPONSE)
    assert before == tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    assert whole.startswith(before)


def test_chatml_leaves_the_default_system_prompt_out(tokenizer, base_tokenizer):
    before, whole = chat_format(tokenizer, "chatml").render(PROMPT, RESPONSE)
    assert before == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert whole == before + RESPONSE[0]["content"] + "<|im_end|>"
    bare = chat_format(tokenizer, None).tokenizer
    assert chat_format(bare, CHATML_TEMPLATE).digest == chat_format(bare, "chatml").digest


def test_a_base_model_gets_the_plain_template_bos_and_eos(base_tokenizer):
    chat = chat_format(base_tokenizer, None)
    assert chat.origin == "plain, because the tokenizer has none"
    before, whole = chat.render(PROMPT, RESPONSE)
    assert before == "<s>User:\nwhy?\n\nAssistant:\n"
    assert whole == before + "Because 12 + 30 = 42.<|endoftext|>"
    ids, start = chat.encode(PROMPT, RESPONSE)
    assert ids[0] == base_tokenizer.bos_token_id
    assert list(ids).count(base_tokenizer.bos_token_id) == 1
    assert base_tokenizer.decode(ids[start:]) == "Because 12 + 30 = 42.<|endoftext|>"


def test_a_template_that_writes_bos_itself_gets_no_second_one(base_tokenizer):
    ids, _ = chat_format(base_tokenizer, "{{ bos_token }}" + SPEAKERS).encode(PROMPT, RESPONSE)
    assert list(ids).count(base_tokenizer.bos_token_id) == 1


def test_a_template_without_an_end_token_gets_one(tokenizer):
    chat = chat_format(tokenizer, SPEAKERS)
    assert chat.render(PROMPT, RESPONSE)[1] == "user: why?\nassistant: Because 12 + 30 = 42.<|im_end|>"
    ids, start = chat.encode(PROMPT, RESPONSE)
    assert tokenizer.decode(ids[start:]).strip() == "Because 12 + 30 = 42.<|im_end|>"


def test_a_response_of_several_messages_is_all_response(tokenizer):
    response = [*RESPONSE, {"role": "user", "content": "tea?"}, {"role": "assistant", "content": "yes"}]
    ids, start = chat_format(tokenizer, None).encode(PROMPT, response)
    turns = tokenizer.decode(ids[start:]).split("<|im_start|>")
    assert turns == [
        "Because 12 + 30 = 42.<|im_end|>\n",
        "user\ntea?<|im_end|>\n",
        "assistant\nyes<|im_end|>",
    ]


def test_many_rows_in_one_call_equal_one_by_one(tokenizer):
    chat = chat_format(tokenizer, None)
    responses = [
        [{"role": "assistant", "content": text}] for text in ("a", "näïve – 茶 ☕", "  spaces  ", "\nline")
    ]
    many = chat.tokenize([chat.render(PROMPT, response) for response in responses])
    for response, (ids, start) in zip(responses, many, strict=True):
        one, one_start = chat.encode(PROMPT, response)
        np.testing.assert_array_equal(ids, one)
        assert start == one_start
        assert tokenizer.decode(ids[start:]) == response[0]["content"] + "<|im_end|>"
    assert chat.tokenize([]) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{{ m['role'] }}", "drops or rewrites the prompt: the user message 'why"),
        ("{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}", "rewrites the response: the assistant"),
        ("{{ m['content'] | upper }}", "drops or rewrites the prompt"),
        ("{{ messages | length }}{{ m['content'] }}", "rewrites the prompt once the response follows"),
        ("{{ raise_exception('no user, please') }}", "refuses the conversation: no user, please"),
        ("{{ m.no.such }}", "refuses the conversation"),
    ],
)
def test_a_template_that_hides_something_from_the_model_is_refused(tokenizer, body, message):
    template = "{% for m in messages %}" + body + "{% endfor %}"
    with pytest.raises(TemplateFault, match=message):
        chat_format(tokenizer, template).render(PROMPT, RESPONSE)


def test_a_template_can_be_a_file(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML_TEMPLATE)
    assert chat_format(tokenizer, str(path)).digest == chat_format(tokenizer, "chatml").digest
    with pytest.raises(
        DataError, match=r"other\.jinja: there is no such file, and it is none of plain, chatml,"
    ):
        chat_format(tokenizer, str(tmp_path / "other.jinja"))


def test_invalid_jinja_is_reported_with_its_line(tokenizer):
    with pytest.raises(DataError, match=r"data\.template \(given in the recipe\): line 2: "):
        chat_format(tokenizer, "{{ 1 }}\n{% for %}").render(PROMPT, RESPONSE)


def test_a_tokenizer_that_lacks_what_is_needed_is_refused(base_tokenizer):
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ModelError, match="no EOS token"):
        chat_format(PreTrainedTokenizerFast(tokenizer_object=base_tokenizer.backend_tokenizer), None)
    with pytest.raises(ModelError, match=r"no token <\|im_end\|>"):
        chat_format(base_tokenizer, "chatml")


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, which knows no offsets: one token a letter."""

    def __init__(self):
        self._ids = {chr(code): code for code in range(128)} | {"</s>": 128}
        super().__init__(eos_token="</s>")

    @property
    def vocab_size(self):
        return len(self._ids)

    def get_vocab(self):
        return dict(self._ids)

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return {number: token for token, number in self._ids.items()}[index]


def test_a_tokenizer_without_offsets_is_tokenized_in_two_parts():
    letters = Letters()
    assert not letters.is_fast
    ids, start = chat_format(letters, None).encode(PROMPT, RESPONSE)
    assert "".join(map(chr, ids[:start])) == "User:\nwhy?\n\nAssistant:\n"
    assert "".join(map(chr, ids[start:-1])) == "Because 12 + 30 = 42."
    assert ids[-1] == 128


def test_digests_tell_templates_and_tokenizers_apart(tokenizer, base_tokenizer):
    assert chat_format(tokenizer, None).digest == chat_format(tokenizer, tokenizer.chat_template).digest
    assert chat_format(tokenizer, None).digest != chat_format(tokenizer, "chatml").digest
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(base_tokenizer) != before


def test_a_token_across_the_boundary_belongs_to_the_response(base_tokenizer):
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %} {% endif %}{% endfor %}"
    chat = chat_format(base_tokenizer, template)
    before, whole = chat.render(
        [{"role": "user", "content": "this"}], [{"role": "assistant", "content": "question"}]
    )
    ids, start = chat.tokenize([(before, whole)])[0]
    assert before == "<s>this "
    assert base_tokenizer.decode(ids[start:]) == " question<|endoftext|>"


# --------------------------------------------------------------------------------------------------- turns

TURNS = [*PROMPT, *RESPONSE, {"role": "user", "content": "tea?"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("template", [None, "chatml", "plain", SPEAKERS])
def test_the_last_turn_is_the_response_of_a_prompt(tokenizer, template):
    chat = chat_format(tokenizer, template)
    before, whole = chat.render(TURNS[:-1], TURNS[-1:])
    assert chat.render_turns(TURNS, first=3) == (whole, [(len(before), len(whole))])


def test_the_end_of_a_turn_is_its_end_token_or_where_the_template_has_none_its_last_character(tokenizer):
    ends = {}
    for template in ("chatml", SPEAKERS):
        text, spans = chat_format(tokenizer, template).render_turns(TURNS)
        ends[template] = [text[begin:end] for begin, end in spans]
    assert ends["chatml"] == ["Because 12 + 30 = 42.<|im_end|>", "yes<|im_end|>"]
    assert ends[SPEAKERS] == ["Because 12 + 30 = 42.", "yes<|im_end|>"]


def test_a_token_across_either_end_of_a_turn_belongs_to_the_turn(base_tokenizer):
    contents = ["this", " quest", "ion a", "nswer"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    chat = chat_format(base_tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    [(ids, spans)] = chat.tokenize_turns([chat.render_turns(messages)])
    assert base_tokenizer.decode(ids) == "<s>this question answer<|endoftext|>"
    assert [base_tokenizer.decode(ids[begin:end]) for begin, end in spans] == [" question", " answer<|endoftext|>"]


def test_turns_of_a_tokenizer_without_offsets_begin_and_end_where_the_text_says():
    chat = chat_format(Letters(), None)
    text, characters = chat.render_turns(TURNS)
    [(ids, tokens)] = chat.tokenize_turns([(text, characters)])
    turns = [text[begin:end].removesuffix("</s>") for begin, end in characters]
    assert turns == ["Because 12 + 30 = 42.", "yes"]
    assert ["".join(map(chr, ids[begin : end - 1])) for begin, end in tokens] == turns
    assert [ids[end - 1] for _, end in tokens] == [128, 128]
