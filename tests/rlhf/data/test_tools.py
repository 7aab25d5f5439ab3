"""What an assistant may call: rows of every kind carry it, the template shows it, or the row is refused by name."""

import copy
import json

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
)
from rlhf.data.preferences import load_preferences
from rlhf.data.prompts import load_prompts
from rlhf.data.records import prompt_key, to_conversations, to_prompt
from rlhf.data.templates import TemplateFault, chat_format

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
