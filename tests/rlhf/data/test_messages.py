"""Roles, keys, parts, thoughts and calls: nothing of a message gets lost without a word."""

import pytest

from rlhf.data.messages import BadRow, Notices, read_messages, thoughts_and_answer, without_thoughts
from rlhf.data.options import ColumnConfig, ExampleColumns, TemplateChoice
from rlhf.data.records import to_example, to_records
from rlhf.data.templates import TemplateFault, chat_format

CALL = {"function": {"name": "look_up", "arguments": '{"word": "rain"}'}}
ONLY_KNOWN = (
    "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read(*entries):
    notices = Notices()
    return read_messages("prompt", entries, notices), list(notices.notes), list(notices.unread)


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("human", "user"),
        ("User", "user"),
        ("prompter", "user"),
        ("Assistant", "assistant"),
        ("gpt", "assistant"),
        ("developer", "system"),
        ("observation", "tool"),
        ("ipython", "tool"),
        ("MODEL", "assistant"),
    ],
)
def test_other_names_of_roles_are_mapped_and_said(role, known):
    [message], notes, _ = read({"role": role, "content": "rain?"})
    assert message == {"role": known, "content": "rain?"}
    assert notes == [f"note: the role {role!r} is read as {known!r}"]


def test_an_unknown_role_is_kept_and_named():
    [message], notes, _ = read({"role": "narrator", "content": "It rained."})
    assert message["role"] == "narrator"
    assert notes == ["warning: the role 'narrator' is none of system, user, assistant, tool"]


def test_sharegpt_messages_are_read():
    messages, _, _ = read({"from": "human", "value": "rain?"}, {"from": "gpt", "value": "Yes."})
    assert messages == ({"role": "user", "content": "rain?"}, {"role": "assistant", "content": "Yes."})


def test_parts_of_text_are_joined_and_other_parts_refused_by_their_kind():
    text = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "rain?"}]
    assert read({"role": "user", "content": text})[0][0]["content"] == "Is it rain?"
    with pytest.raises(BadRow, match=r"prompt\[0\]\.content\[1\] is image_url; only parts of text can be read"):
        read({"role": "user", "content": [*text[:1], {"type": "image_url", "image_url": "x"}]})


def test_tool_calls_and_reasoning_are_kept():
    [asked, told], _, unread = read(
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm", "weight": 0},
        {"role": "tool", "content": {"found": 1}, "name": "look_up", "tool_call_id": "7"},
    )
    assert asked["tool_calls"][0]["function"] == {"name": "look_up", "arguments": {"word": "rain"}}
    assert (asked["content"], asked["reasoning_content"]) == ("", "hm")
    assert told == {"role": "tool", "content": '{"found": 1}', "name": "look_up", "tool_call_id": "7"}
    assert unread == ["weight of messages"]


@pytest.mark.parametrize("arguments", ["{}", {}, None, "[]", "look there"])
def test_arguments_given_as_json_are_what_they_say_empty_ones_too(arguments):
    [message], _, _ = read({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})
    expected = {"[]": [], "look there": "look there"}.get(arguments if isinstance(arguments, str) else "", {})
    assert message["tool_calls"][0]["function"]["arguments"] == expected


def test_a_function_call_of_sharegpt_is_a_call_of_the_assistant():
    [message], notes, _ = read({"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'})
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert notes == ["note: the role 'function_call' is read as 'assistant'"]
    with pytest.raises(BadRow, match="is a call, but its value is no JSON object"):
        read({"from": "function_call", "value": "f(1)"})


@pytest.mark.parametrize(
    ("message", "thoughts", "answer"),
    [
        ({"content": "<think>\nhm\n</think>\n\nYes."}, "hm", "Yes."),
        ({"content": "hm\n</think>\nYes."}, "hm", "Yes."),
        ({"content": "Yes.", "reasoning_content": "hm"}, "hm", "Yes."),
        ({"content": "It is <think>er</think> so."}, "", "It is <think>er</think> so."),
        ({"content": " Yes. "}, "", "Yes."),
    ],
)
def test_thoughts_stand_in_front_of_an_answer_or_apart(message, thoughts, answer):
    assert thoughts_and_answer({"role": "assistant", **message}) == (thoughts, answer)


def test_an_answer_without_thoughts_is_left_as_it_is():
    message = {"role": "assistant", "content": " Yes. "}
    assert without_thoughts(message) is message
    kept = {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}
    assert without_thoughts(kept) == {"role": "assistant", "content": "Yes."}


# ------------------------------------------------------------------------------------ shown by the template


@pytest.mark.parametrize(
    ("role", "hint"),
    [("human", "did you mean user"), ("narrator", "'narrator' is none of"), ("tool", "the tool message")],
)
@pytest.mark.parametrize("content", ["How is the rain?", "a"])
def test_a_message_that_the_template_drops_is_named_whatever_its_role_and_length(tokenizer, role, hint, content):
    chat = chat_format(tokenizer, ONLY_KNOWN)
    prompt = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "no"}]
    prompt += [{"role": role, "content": content}, {"role": "user", "content": "well?"}]
    with pytest.raises(TemplateFault, match=rf"drops or rewrites the (prompt|conversation): (.|\n)*{hint}"):
        chat.render_prompt(prompt)
    with pytest.raises(TemplateFault, match=hint):
        chat.render(prompt[:1], [prompt[1], prompt[2], {"role": "assistant", "content": "yes"}])
    with pytest.raises(TemplateFault, match=hint):
        chat.render_turns([*prompt, {"role": "assistant", "content": "yes"}], first=1)


def test_tool_calls_must_be_in_the_text(tokenizer):
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "rain"}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(TemplateFault, match="'look_up' is not in the rendered text"):
        chat_format(tokenizer, "chatml").render([{"role": "user", "content": "rain?"}], [asked])
    _, whole = chat_format(tokenizer, "qwen3").render([{"role": "user", "content": "rain?"}], [asked])
    assert '{"name": "look_up", "arguments": {"word": "rain"}}' in whole


def test_a_system_message_may_stand_where_the_template_puts_it(tokenizer):
    """As Mistral's do: in front of the last message, and only if that is the user's."""
    template = (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n' %}"
        "{% elif m['role'] == 'user' %}{{ '[' + (ns.system if loop.last else '') + m['content'] + ']' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    talk = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "no"}]
    talk = [{"role": "system", "content": "be brief"}, *talk, {"role": "user", "content": "rain?"}]
    chat = chat_format(tokenizer, template)
    before, whole = chat.render(talk, [{"role": "assistant", "content": "yes"}])
    assert before == "[tea?]no<|im_end|>[be brief\nrain?]"
    assert whole == before + "yes<|im_end|>"
    text, spans = chat.render_turns([*talk, {"role": "assistant", "content": "yes"}], first=2)
    assert text == whole
    assert [text[begin:end] for begin, end in spans] == ["no<|im_end|>", "yes<|im_end|>"]


def test_a_system_message_can_be_folded_into_the_users_first(tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ONLY_KNOWN
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "rain?"}]
    answer = [{"role": "assistant", "content": "yes"}]
    with pytest.raises(TemplateFault, match=r"no system; data\.fold_system=true"):
        chat_format(tokenizer, template).render(prompt, answer)
    folded = chat_format(tokenizer, TemplateChoice(text=template, fold_system=True))
    before, _ = folded.render(prompt, answer)
    assert before == "<|im_start|>user\nbe brief\n\nrain?<|im_end|>\n<|im_start|>assistant\n"
    plain = [{"role": "user", "content": "be brief\n\nrain?"}]
    assert folded.render(plain, answer) == folded.render(prompt, answer)


def test_rows_tell_what_was_mapped_and_what_was_not_read():
    row = {"messages": [{"role": "human", "content": "rain?"}, {"role": "gpt", "content": "Yes."}], "id": 7, "note": ""}
    record, _ = to_example(row, ExampleColumns(), labeled=False, row_id="x:1", source="x")
    assert [note.split(": ")[0] for note in record.notes] == ["note", "note"]
    assert record.unread == ("id",)


def test_pairs_of_capital_roles_share_their_prompt():
    asked = {"role": "Human", "content": "rain?"}
    row = {side: [asked, {"role": "Assistant", "content": side}] for side in ("chosen", "rejected")}
    [pair], _ = to_records(row, ColumnConfig(), row_id="x:1", source="x")
    assert pair.prompt == ({"role": "user", "content": "rain?"},)
    odd = {side: [asked, {"role": "Narrator", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(BadRow, match=r"answers from 'assistant'; its roles are 'user', 'Narrator'"):
        to_records(odd, ColumnConfig(), row_id="x:1", source="x")
