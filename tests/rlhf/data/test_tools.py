"""What an assistant may call: rows of every kind carry it, the template shows it, or the row is refused by name."""

import copy
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.core.errors import DataError
from rlhf.data.examples import load_examples
from rlhf.data.kinds import Examples, Pairs, Prompts
from rlhf.data.messages import BadRow, tools_of
from rlhf.data.options import (
    ColumnConfig,
    DataConfig,
    ExampleColumns,
    ExampleDataConfig,
    PromptColumns,
    PromptDataConfig,
    TemplateChoice,
)
from rlhf.data.preferences import load_preferences
from rlhf.data.prompts import load_prompts
from rlhf.data.records import prompt_key, to_conversations, to_prompt
from rlhf.data.templates import TemplateFault, chat_format
from tests.lacking import imported

WEATHER = {
    "name": "weather",
    "description": "Looks it up.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}
SPECS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "clock"}}]
QUESTION = {"role": "user", "content": "Is it raining?"}
ROWS = {
    "pairs": {"prompt": "Is it raining?", "chosen": "Yes.", "rejected": "No."},
    "conversations": {"messages": [QUESTION, {"role": "assistant", "content": "Yes."}]},
    "labeled": {"prompt": [QUESTION], "completion": "Yes.", "label": True},
    "prompts": {"prompt": "Is it raining?"},
}
READERS = {
    "pairs": (Pairs(), ColumnConfig),
    "conversations": (Examples(labeled=False), ExampleColumns),
    "labeled": (Examples(labeled=True), ExampleColumns),
    "prompts": (Prompts(), PromptColumns),
}


def written(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(kind, path, chat, tmp_path, **settings):
    """The tokens of the rows of any kind, as text."""
    settings = {"train": path, "eval_share": 0, "max_tokens": 2048, "cache_dir": tmp_path / "cache", **settings}
    if kind == "pairs":
        return load_preferences(DataConfig(**settings), chat).train.pair(0).chosen
    if kind == "prompts":
        return load_prompts(PromptDataConfig(**settings), chat).train.prompt(0).tokens
    names = {"conversations": "conversation", "labeled": "unpaired"}
    return load_examples(ExampleDataConfig(**settings), chat, kind=names[kind]).train.item(0).rows[0].tokens


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    "given",
    [SPECS, json.dumps(SPECS), [spec["function"] for spec in SPECS], [json.dumps(spec) for spec in SPECS]],
    ids=["list", "text", "bare functions", "list of texts"],
)
def test_tools_of_a_row_are_read_whatever_their_form(kind, given):
    reader, columns = READERS[kind]
    for column, settings in (("tools", {}), ("functions", {}), ("offered", {"tools": "offered"})):
        [record], _ = reader.read({**ROWS[kind], column: given}, columns(**settings), row_id="x:1", source="x")
        assert tools_of(record.prompt) == SPECS
        assert record.unread == ()


@pytest.mark.parametrize("given", ["weather", 3, [{"parameters": {}}], [3], {"name": "weather"}, [{"name": ""}]])
def test_tools_that_are_none_are_refused_by_name(given):
    with pytest.raises(BadRow, match=r"tools(\[0\])? is .*expected"):
        to_prompt({"prompt": "Is it raining?", "tools": given}, PromptColumns(), row_id="x:1", source="x")


@pytest.mark.parametrize("kind", ROWS)
def test_the_template_shows_the_tools_of_a_row(kind, tokenizer, tmp_path):
    rows = [{**ROWS[kind], "tools": SPECS} for _ in range(2)]
    text = tokenizer.decode(loaded(kind, written(tmp_path, rows), chat_format(tokenizer, "qwen3"), tmp_path))
    expected = "<tools>\n" + "\n".join(json.dumps(spec) for spec in SPECS) + "\n</tools>"
    assert expected in text


@pytest.mark.parametrize("kind", ROWS)
def test_a_template_that_shows_no_tools_is_refused_by_name(kind, tokenizer, tmp_path):
    path = written(tmp_path, [{**ROWS[kind], "tools": SPECS} for _ in range(2)])
    chat = chat_format(tokenizer, "chatml")
    with pytest.raises(DataError, match=r"does not show the tools of the conversation \(weather, clock\)"):
        loaded(kind, path, chat, tmp_path)
    _, columns = READERS[kind]
    assert len(loaded(kind, path, chat, tmp_path, columns=columns(tools="")))


def test_tools_stand_in_the_text_though_their_names_are_there_by_chance(tokenizer):
    prompt = [{"role": "user", "content": "weather or clock?", "tools": SPECS}]
    with pytest.raises(TemplateFault, match="does not show the tools"):
        chat_format(tokenizer, "chatml").render_prompt(prompt)
    first = "{% for t in (tools or [])[:1] %}{{ t.function.name }}{% endfor %}"
    shows_one = chat_format(tokenizer, first + "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(TemplateFault, match=r"tools of the conversation \(clock\)"):
        shows_one.render_prompt([{**prompt[0], "content": "rain?"}])


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"place": "here"}}}
USED = (
    QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": "yes"}', "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It rains."},
)
BEFORE_THE_LAST_QUESTION = (
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}"
    "{% endif -%}{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}"
    "{%- if tools and m == asked[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}"
    "[INST] {% if system is defined and loop.last %}{{ system + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{%- elif m['tool_calls'] -%}[TOOL_CALLS] ["
    "{% for call in m['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}]"
    "{{ eos_token }}{%- elif m['role'] == 'tool' -%}[TOOL_RESULTS] {{ m['content'] }}[/TOOL_RESULTS]"
    "{%- else %}{{ ' ' + m['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
)
"""As Mistral's: tools and system message stand before the last question and before no other."""


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]], ids=["no system", "system"])
def test_turns_are_found_where_tools_stand_before_the_last_question(tokenizer, system):
    first, *rest = USED
    talk = [*system, {**first, "tools": SPECS}, *rest, {"role": "user", "content": "Still?"}, USED[-1]]
    chat = chat_format(tokenizer, BEFORE_THE_LAST_QUESTION)
    text, spans = chat.render_turns(talk)
    call = '[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "here"}}]<|im_end|>'
    said = " It rains.<|im_end|>"
    assert [text[begin:end] for begin, end in spans] == [call, said, said]
    assert text.index("[AVAILABLE_TOOLS]") >= spans[1][1]
    assert chat.render_prompt(talk[:-1]) == text[: spans[-1][0]]


def test_a_system_message_that_goes_where_tools_are_used_is_refused_or_folded(tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, {**USED[0], "tools": SPECS}, *USED[1:]]
    with pytest.raises(TemplateFault, match=r"system message 'Be brief.' is not .*data\.fold_system=true"):
        chat_format(tokenizer, BEFORE_THE_LAST_QUESTION).render_turns(talk)
    folding = chat_format(tokenizer, TemplateChoice(text=BEFORE_THE_LAST_QUESTION, fold_system=True))
    text, spans = folding.render_turns(talk)
    assert "[INST] Be brief.\n\nIs it raining?[/INST][TOOL_CALLS]" in text
    assert len(spans) == 2 and text.count("[AVAILABLE_TOOLS]") == 1


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "gptoss"])
def test_results_of_tools_that_a_template_shows_as_json_are_in_the_text(tokenizer, name):
    template = (Path(imported("trl").__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    talk = [{**USED[0], "tools": SPECS[:1]}, *USED[1:]]
    text, spans = chat_format(tokenizer, template).render_turns(talk)
    assert json.dumps('{"rain": "yes"}') in text
    first, last = (text[begin:end] for begin, end in spans)
    assert "weather" in first and "It rains." in last


def test_a_system_message_may_bring_tools_and_goes_with_them():
    row = {"messages": [{"role": "system", "content": "Be brief.", "tools": json.dumps(SPECS)}, QUESTION]}
    record, _ = to_prompt(row, PromptColumns(), row_id="x:1", source="x")
    assert (tools_of(record.prompt), record.unread) == (SPECS, ())
    with pytest.raises(BadRow, match="there is a tools column, but the prompt has a message with tools already"):
        to_prompt({**row, "tools": SPECS}, PromptColumns(), row_id="x:1", source="x")


def test_prompts_with_other_tools_are_other_prompts():
    without, one, other = (({**QUESTION, "tools": tools},) for tools in ([], SPECS, SPECS[:1]))
    assert len({prompt_key(without), prompt_key(one), prompt_key(other)}) == 3
    assert prompt_key(without) == prompt_key((QUESTION,))


def test_answers_to_be_scored_keep_their_tools():
    row = {**ROWS["pairs"], "tools": SPECS}
    assert all(tools_of(prompt) == SPECS for [(prompt, _)] in to_conversations(row, ColumnConfig()).values())
    row = {"prompt": "Is it raining?", "response": "Yes.", "tools": SPECS}
    [(prompt, _)] = to_conversations(row, ColumnConfig())["response"]
    assert tools_of(prompt) == SPECS


def test_a_system_prompt_of_the_run_stands_in_front_of_tools(tokenizer, tmp_path):
    path = written(tmp_path, [{**ROWS["prompts"], "tools": SPECS}])
    tokens = loaded("prompts", path, chat_format(tokenizer, "qwen3"), tmp_path, system_prompt="Be brief.")
    assert tokenizer.decode(tokens).startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")


def test_one_of_several_templates_of_a_tokenizer_can_be_named(tokenizer):
    own = copy.deepcopy(tokenizer)
    plain = chat_format(tokenizer, "chatml").template
    own.chat_template = {"default": plain, "tool_use": "{{ tools | tojson }}" + plain}
    prompt = [{**QUESTION, "tools": SPECS}]
    with pytest.raises(TemplateFault, match="further ones: tool_use"):
        chat_format(own, None).render_prompt(prompt)
    assert chat_format(own, "tool_use").render_prompt(prompt).startswith(json.dumps(SPECS))
    own.chat_template = {"rag": plain, "tool_use": plain}
    with pytest.raises(DataError, match=r"the tokenizer has several templates; .*: rag, tool_use"):
        chat_format(own, None)


def test_a_table_adds_no_nulls_to_tools_and_arguments(tmp_path, tokenizer):
    """A parquet column gives every object the keys of all."""
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "here"}}}]
    talk = [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]
    other = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC", "short": True}}}]
    rows = [
        {"messages": talk, "tools": SPECS[:1]},
        {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": other}], "tools": SPECS[1:]},
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    text = tokenizer.decode(loaded("conversations", str(path), chat_format(tokenizer, "qwen3"), tmp_path))
    assert json.dumps(SPECS[0]) in text
    assert '"arguments": {"place": "here"}}' in text
    assert "null" not in text
