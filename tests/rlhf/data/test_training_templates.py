"""Built-in templates of families, variables of templates, thoughts, and texts that carry markup already."""

import copy

import pytest

from rlhf.core.errors import DataError, ModelError
from rlhf.data.examples import load_examples
from rlhf.data.options import ExampleDataConfig, PromptDataConfig, TemplateChoice
from rlhf.data.portable import portable_tokenizer
from rlhf.data.prompts import load_prompts
from rlhf.data.templates import TemplateFault, chat_format

FAMILIES = {
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "qwen3": ["<think>", "</think>"],
    "r1-distill": ["<｜User｜>", "<｜Assistant｜>"],
}
TALK = [
    {"role": "user", "content": "tea?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nno"},
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": "yes"},
]
FORGETS_THOUGHTS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


@pytest.fixture
def family(tokenizer):
    """A function that gives the tokenizer with the tokens of a family."""

    def make(name):
        own = copy.deepcopy(tokenizer)
        own.add_tokens(FAMILIES[name], special_tokens=name != "qwen3")
        return own

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_template_shows_every_turn_as_it_was_written(family, name):
    chat = chat_format(family(name), name)
    text, spans = chat.render_turns(TALK)
    turns = [text[begin:end] for begin, end in spans]
    assert all(turn.endswith(chat.end_tokens) for turn in turns)
    assert "hm\n</think>\n\nno" in turns[0]
    before, whole = chat.render(TALK[:-1], TALK[-1:])
    assert (before, whole) == (text[: spans[1][0]], text)
    assert before == chat.render_prompt(TALK[:-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_training_template_gives_plain_users_the_same_tokens(family, name):
    chat = chat_format(family(name), name)
    published = portable_tokenizer(chat)
    expected, _ = chat.encode(TALK[:-1], TALK[-1:])
    assert published.apply_chat_template(TALK, return_dict=False) == expected.tolist()


def test_a_training_template_needs_the_tokens_of_its_family(tokenizer):
    for name in ("phi3", "r1-distill"):
        with pytest.raises(ModelError, match=rf"data\.template={name}: the tokenizer has no token"):
            chat_format(tokenizer, name)


def test_a_template_that_cuts_thoughts_out_is_refused_with_what_differs_and_the_way_out(family):
    chat = chat_format(family("r1-distill"), FORGETS_THOUGHTS)
    for answer in ("yes", "<think>\nhm\n</think>\n\nyes"):
        with pytest.raises(TemplateFault, match=r"ends with '<think>\\n'(.|\n)*such as the built-in r1-distill"):
            chat.render(TALK[:1], [{"role": "assistant", "content": answer}])
    assert chat.render_prompt(TALK[:3]).endswith("<｜User｜>rain?<｜Assistant｜><think>\n")


# --------------------------------------------------------------------------------------- variables of templates


def test_variables_of_a_template_hold_for_training_rollouts_and_the_published_tokenizer(family):
    tokenizer = family("qwen3")
    chat = chat_format(tokenizer, TemplateChoice(text="qwen3", options={"enable_thinking": False}))
    before, whole = chat.render(TALK[:1], TALK[3:])
    assert before.endswith("<think>\n\n</think>\n\n")
    assert whole == before + "yes<|im_end|>"
    assert chat.digest != chat_format(tokenizer, "qwen3").digest
    published = portable_tokenizer(chat)
    assert published.apply_chat_template(TALK[:1], add_generation_prompt=True, tokenize=False) == before
    again = chat_format(published, TemplateChoice(options={"enable_thinking": False}))
    assert again.digest == chat.digest


def test_a_variable_that_the_template_does_not_have_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"template_options\.enable_thinking: the template \(chatml\) has no such"):
        chat_format(tokenizer, TemplateChoice(text="chatml", options={"enable_thinking": False}))


# ---------------------------------------------------------------------------------------------------- thoughts


@pytest.mark.parametrize(
    ("thoughts", "learned", "shown"),
    [
        ("keep", "<think>\nhm\n</think>\n\nno<|im_end|>", True),
        ("drop", "<think>\n\n</think>\n\nno<|im_end|>", False),
        ("mask", "no<|im_end|>", True),
    ],
)
def test_thoughts_are_kept_dropped_or_masked_and_the_report_says_so(
    family, write_rows, tmp_path, thoughts, learned, shown
):
    tokenizer = family("qwen3")
    path = write_rows("x.jsonl", [{"messages": TALK[:2]}])
    settings = {"eval_share": 0.0, "cache_dir": tmp_path / "cache", "thoughts": thoughts}
    config = ExampleDataConfig(train=str(path), **settings)
    loaded = load_examples(config, chat_format(tokenizer, "qwen3"), kind="conversation")
    [row] = loaded.train.item(0).rows
    assert tokenizer.decode(row.tokens[row.response]) == learned
    assert ("hm" in tokenizer.decode(row.tokens)) == shown
    assert any(f"data.thoughts={thoughts}" in line for line in loaded.report.lines())


def test_an_answer_of_thoughts_alone_is_bad_where_they_are_dropped(family, write_rows, tmp_path):
    rows = [{"messages": TALK[:2]}, {"messages": [TALK[0], {"role": "assistant", "content": "<think>hm</think>"}]}]
    config = ExampleDataConfig(
        train=str(write_rows("x.jsonl", rows)),
        eval_share=0.0,
        cache_dir=tmp_path / "cache",
        thoughts="drop",
        quarantine_max_share=0.5,
    )
    loaded = load_examples(config, chat_format(family("qwen3"), "qwen3"), kind="conversation")
    assert loaded.report.sources[0].bad == {"empty text": 1}


# ------------------------------------------------------------------------------------------------------ markup


@pytest.mark.parametrize(
    ("text", "mark"),
    [("<|im_start|>user\ntea?<|im_end|>", "<|im_end|>"), ("[INST] tea? [/INST]", "[/INST]"), ("tea?<s>", "<s>")],
)
def test_rows_that_carry_markup_are_named_in_the_report(base_tokenizer, write_rows, tmp_path, text, mark):
    path = write_rows("x.jsonl", [{"prompt": "plain"}, {"prompt": text}])
    config = PromptDataConfig(train=str(path), eval_share=0.0, cache_dir=tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        lines = load_prompts(config, chat_format(base_tokenizer, None)).report.lines()
        [line] = [line for line in lines if "carry markup of" in line]
        assert line.startswith("warning: ")
        assert mark in line
        assert line.endswith("1 rows, such as x.jsonl:2")


@pytest.mark.parametrize("fold", [False, True])
def test_an_option_that_a_published_template_has_already_may_be_given_again_but_not_changed(tokenizer, fold):
    def options(**values):
        return TemplateChoice(options=values, fold_system=fold)

    chat = chat_format(tokenizer, TemplateChoice(text="qwen3", options={"enable_thinking": False}, fold_system=fold))
    published = portable_tokenizer(chat)
    assert chat_format(published, options(enable_thinking=False)).digest == chat.digest
    with pytest.raises(DataError, match=r"template_options\.enable_thinking = true: .* was published with false"):
        chat_format(published, options(enable_thinking=True))


# What the recipe says of the system prompt and of thoughts is part of the template.

MOVES_SYSTEM = (
    "{% set talk = messages[1:] if messages[0]['role'] == 'system' else messages %}{% for m in talk %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n' }}{% endif %}{{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PROMPT = "Be 'brief' \u2013 {% if %} {{ x }} \"kind\"\n\u2615 \\n \U0001f600."
SYSTEM = {"role": "system", "content": PROMPT}


def plain_text(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("template", ["chatml", "plain", "qwen3", MOVES_SYSTEM])
@pytest.mark.parametrize("fold", [False, True])
def test_a_published_template_puts_the_system_prompt_where_the_run_did(tokenizer, template, fold):
    without = chat_format(tokenizer, TemplateChoice(text=template, fold_system=fold))
    chat = chat_format(tokenizer, TemplateChoice(text=template, fold_system=fold, system_prompt=PROMPT))
    assert (chat.system_prompt, without.system_prompt) == (PROMPT, None)
    assert chat.digest != without.digest
    published = portable_tokenizer(chat)
    prompt, own = TALK[:1], [{"role": "system", "content": "own"}, *TALK[:1]]
    expected = without.render_prompt([SYSTEM, *prompt])
    assert PROMPT in expected
    assert plain_text(published, prompt, add_generation_prompt=True) == expected
    assert plain_text(published, own, add_generation_prompt=True) == without.render_prompt(own)
    reader = chat_format(published, None)
    answer = TALK[-1:]
    assert reader.render(prompt, answer) == chat.render([SYSTEM, *prompt], answer)
    assert reader.render(prompt, answer) == without.render([SYSTEM, *prompt], answer)
    assert (reader.digest, reader.system_prompt) == (chat.digest, PROMPT)


def test_a_system_prompt_may_be_given_again_and_another_one_wins(tokenizer):
    chat = chat_format(tokenizer, TemplateChoice(system_prompt="be brief"))
    published = portable_tokenizer(chat)
    assert chat_format(published, TemplateChoice(system_prompt="be brief")).digest == chat.digest
    other = chat_format(published, TemplateChoice(system_prompt="be kind"))
    assert other.digest != chat.digest and other.system_prompt == "be kind"
    again = portable_tokenizer(other)
    text = plain_text(again, TALK[:1], add_generation_prompt=True)
    assert "be kind" in text and "be brief" not in text
    assert chat_format(again, None).digest == other.digest


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_a_published_template_drops_thoughts_that_the_run_has_dropped(family, template):
    tokenizer = family("qwen3")
    tokenizer.add_tokens(FAMILIES["r1-distill"], special_tokens=True)
    kept = chat_format(tokenizer, template)
    chat = chat_format(tokenizer, TemplateChoice(text=template, drop_thoughts=True))
    assert chat.drops_thoughts and not kept.drops_thoughts and chat.digest != kept.digest
    published = portable_tokenizer(chat)
    apart = {"role": "assistant", "reasoning_content": "hm", "content": " no "}
    open_end = {"role": "assistant", "content": "hm\n</think>no"}
    expected = plain_text(published, [*TALK[:1], {"role": "assistant", "content": "no"}])
    for thoughtful in (TALK[1], apart, open_end):
        assert plain_text(published, [*TALK[:1], thoughtful]) == expected
        for reader in (chat, chat_format(published, None)):
            assert reader.render(TALK[:1], [thoughtful])[1] == expected
    if template == "chatml":  # the others look for the tag anywhere
        quoted = {"role": "assistant", "content": "the tag <think> ends with </think>, thus"}
        assert quoted["content"] in plain_text(published, [*TALK[:1], quoted])
    assert "hm" not in plain_text(published, TALK)
