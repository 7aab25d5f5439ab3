import csv
import datetime
import json
from collections import Counter
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf.config import load_config
from rlhf.core.errors import ConfigError, DataError
from rlhf.data.built_in_templates import CHATML_TEMPLATE
from rlhf.data.options import DataConfig, PromptColumns, PromptDataConfig, RowSource
from rlhf.data.preferences import load_preferences
from rlhf.data.prompts import load_prompts
from rlhf.data.store import text_as_numbers, text_of_numbers
from rlhf.data.templates import ChatFormat, chat_format

LONG = "why? " * 60


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture
def load(tokenizer, tmp_path):
    """Load prompts with a cache and a run folder of this test's own."""

    def run(*train, reader=tokenizer, **options):
        train = tuple(str(path) if not isinstance(path, RowSource) else path for path in train)
        config = PromptDataConfig(train=train, cache_dir=tmp_path / "cache", **{"eval_share": 0.0, **options})
        return load_prompts(config, chat_format(reader, config.template), run_folder=tmp_path / "run")

    return run


def questions(count, word="tea"):
    return [{"prompt": f"question {number} about {word}?"} for number in range(count)]


def prompts(dataset):
    return [dataset.prompt(index) for index in range(len(dataset))]


def texts(dataset):
    return [prompt.text for prompt in prompts(dataset)]


def quarantined(folder):
    lines = (folder / "run" / "quarantine.jsonl").read_text().splitlines()
    return [(row["line"], row["reason"]) for row in map(json.loads, lines)]


# ------------------------------------------------------------------------------------------ what a prompt is


@pytest.mark.parametrize("reader", ["tokenizer", "base_tokenizer"])
@pytest.mark.parametrize("system_prompt", [None, "be brief"])
def test_the_tokens_are_those_of_the_rendered_prompt(load, write_rows, request, reader, system_prompt):
    reader = request.getfixturevalue(reader)
    rows = [
        {"prompt": "Why? näïve ☕ \n"},
        {"prompt": [user("tea?"), assistant("hot"), user("why?")]},
        {"prompt": [system("own"), user("tea?")]},
    ]
    data = load(write_rows("x.jsonl", rows), reader=reader, system_prompt=system_prompt).train
    first = [] if system_prompt is None else [system(system_prompt)]
    expected = [[*first, user(rows[0]["prompt"])], [*first, *rows[1]["prompt"]], rows[2]["prompt"]]
    chat = chat_format(reader, None)
    for index, messages in enumerate(expected):
        prompt = data.prompt(index)
        ids = chat.tokenizer(chat.render_prompt(messages), add_special_tokens=False)["input_ids"]
        assert prompt.tokens.tolist() == ids
        assert prompt.tokens.dtype == np.int64
        assert prompt.messages == tuple(messages)
        assert data.lengths[index].tolist() == [len(ids)]
    assert texts(data) == ["Why? näïve ☕ \n", "why?", "tea?"]
    assert [prompt.row_id for prompt in prompts(data)] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"]
    assert (data.lengths.shape, data.lengths.dtype) == ((3, 1), np.int32)


def test_the_other_columns_of_a_row_come_along(load, write_rows):
    """Whatever JSON can hold; also what stands beside the messages that a prompt is read from."""
    rows = [
        {"prompt": "Why?", "answer": "#### 4", "tests": [{"in": 1, "out": None}], "empty": ""},
        {"messages": [user("tea?"), assistant("hot")], "label": True, "odd": "\ud800 ☕", "n": 2**70},
        {"prompt": "So?", "tools": []},
    ]
    data = load(write_rows("x.jsonl", rows)).train
    first = {name: cell for name, cell in rows[0].items() if name != "prompt"}
    second = {name: cell for name, cell in rows[1].items() if name != "messages"}
    assert [prompt.columns for prompt in prompts(data)] == [first, second, {}]
    changed = [{**rows[0], "answer": "#### 5"}, *rows[1:]]
    other = load(write_rows("y.jsonl", changed)).train
    assert other.fingerprint != data.fingerprint, "another answer is another run"


def test_dates_and_bytes_of_tables_are_told_as_text_or_left_out(load, tmp_path):
    table = {"prompt": ["Why?"], "when": [datetime.date(2026, 1, 2)], "image": [b"\x00\xff"]}
    table["price"] = [Decimal("1.50")]
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    (prompt,) = prompts(load(tmp_path / "x.parquet").train)
    assert prompt.columns == {"when": "2026-01-02", "image": None, "price": "1.50"}


def test_a_prompt_ends_where_the_model_begins_to_write_and_begins_with_one_bos(load, write_rows, base_tokenizer):
    data = load(write_rows("x.jsonl", [{"prompt": "Why?"}]), reader=base_tokenizer).train
    assert base_tokenizer.decode(data.prompt(0).tokens) == "<s>User:\nWhy?\n\nAssistant:\n"


@pytest.mark.parametrize(
    "row, expected, shape",
    [
        ({"prompt": "tea?", "chosen": "hot", "rejected": "rain"}, [user("tea?")], "prompt text"),
        ({"prompt": "tea?", "messages": [user("other")]}, [user("tea?")], "prompt text"),
        ({"messages": [user("tea?")]}, [user("tea?")], "conversations"),
        (
            {"conversations": [system("s"), user("tea?"), assistant("hot"), user("why?"), assistant("so")]},
            [system("s"), user("tea?"), assistant("hot"), user("why?")],
            "conversations",
        ),
        (
            {
                "chosen": [user("tea?"), assistant("hot"), user("why?"), assistant("so")],
                "rejected": [user("tea?"), assistant("cold"), user("when?"), assistant("now")],
            },
            [user("tea?")],
            "conversations",
        ),
        ({"chosen": [user("tea?"), assistant("hot")]}, [user("tea?")], "conversations"),
        (
            {"chosen": [user("tea?"), assistant("hot")], "rejected": [user("tea?"), assistant("hot")]},
            [user("tea?")],
            "conversations",
        ),
        (
            {"chosen": "\n\nHuman: tea?\n\nAssistant: hot", "rejected": "\n\nHuman: tea?\n\nAssistant: rain"},
            [user("tea?")],
            "human/assistant text",
        ),
        (
            {"prompt": "\n\nHuman: tea?\n\nAssistant: hot\n\nHuman: why?\n\nAssistant:"},
            [user("tea?"), assistant("hot"), user("why?")],
            "human/assistant text",
        ),
    ],
)
def test_the_prompt_is_found_in_rows_of_every_shape(load, write_rows, row, expected, shape):
    loaded = load(write_rows("x.jsonl", [row]))
    assert loaded.train.prompt(0).messages == tuple(expected)
    assert loaded.train.prompt(0).text == expected[-1]["content"]
    assert loaded.report.sources[0].shapes == {shape: 1}


def test_columns_can_be_named_and_a_column_of_the_usual_name_ignored(load, write_rows):
    row = {"prompt": "7", "q": "tea?", "talk": [user("rain?"), assistant("yes")], "good": [user("x"), assistant("y")]}
    path = write_rows("x.jsonl", [row])
    assert texts(load(path, columns=PromptColumns(prompt="q")).train) == ["tea?"]
    assert texts(load(path, columns=PromptColumns(prompt="", messages="talk")).train) == ["rain?"]
    assert texts(load(path, columns=PromptColumns(prompt="", chosen="good")).train) == ["x"]
    with pytest.raises(DataError, match=r"no usable prompt\n  1 x missing column\n.*should be in 'question'"):
        load(path, columns=PromptColumns(prompt="question"))


def test_prompts_come_from_csv_gz_and_globs_alike(load, write_rows, tmp_path):
    write_rows("d/a.jsonl", [{"prompt": "tea?"}])
    write_rows("d/b.jsonl.gz", [{"prompt": "rain?"}])
    with (tmp_path / "d" / "c.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["id", "prompt"], ["1", 'why, "so"?']])
    assert texts(load(tmp_path / "d").train) == ["tea?", "rain?", 'why, "so"?']
    assert texts(load(str(tmp_path / "d" / "*.gz")).train) == ["rain?"]


@pytest.mark.parametrize("text", ["", "a", "ab", "abc", "abcd", "☕", "\x00\uffff🙂"])
def test_text_survives_as_numbers_but_for_spaces_behind_it(text):
    numbers = text_as_numbers(text)
    back = text_of_numbers(numbers.astype(np.int32))
    assert back.startswith(text)
    assert set(back[len(text) :]) <= {" "}
    assert numbers.nbytes - len(text.encode()) in range(4)


# ------------------------------------------------------------------------------------------------- bad rows


BAD_ROWS = [
    ('{"prompt": "p"', "unreadable row"),
    ({"question": "p"}, "missing column"),
    ({"prompt": 5}, "wrong type"),
    ({"prompt": " \n"}, "empty text"),
    ({"prompt": []}, "empty text"),
    ({"prompt": [user("p"), assistant("a")]}, "no prompt"),
    ({"prompt": [user("p"), system("s")]}, "no prompt"),
    ({"messages": [assistant("a")]}, "no prompt"),
    ({"messages": "text"}, "no prompt"),
    ({"messages": 5}, "wrong type"),
    ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ({"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "no prompt"),
    ({"prompt": [user(""), assistant("a"), user("p")]}, "empty text"),
    ('{"prompt": "half \\ud800"}', "broken text"),
    ('["p"]', "wrong type"),
]


def test_rows_without_a_usable_prompt_are_listed_with_line_and_reason(load, write_rows, tmp_path):
    rows = [*questions(2), *(row for row, _ in BAD_ROWS), {"prompt": "last"}]
    loaded = load(write_rows("x.jsonl", rows), quarantine_max_share=0.9)
    assert quarantined(tmp_path) == [(place, reason) for place, (_, reason) in enumerate(BAD_ROWS, start=3)]
    assert [prompt.row_id for prompt in prompts(loaded.train)] == ["x.jsonl:1", "x.jsonl:2", f"x.jsonl:{len(rows)}"]
    assert loaded.report.sources[0].bad == dict(Counter(reason for _, reason in BAD_ROWS))
    assert "quarantine.jsonl" in "\n".join(loaded.report.lines())


def test_the_listed_detail_says_what_was_found(load, write_rows, tmp_path):
    load(write_rows("x.jsonl", [*questions(1), *(BAD_ROWS[n][0] for n in (1, 6, 8))]), quarantine_max_share=0.9)
    details = [json.loads(line)["detail"] for line in (tmp_path / "run" / "quarantine.jsonl").open()]
    assert details == [
        "none of prompt, messages and chosen is there; the row has: question",
        "the prompt ends with a message from 'system', expected 'user'",
        "there is no prompt column, and messages is a plain text, not a conversation",
    ]


def test_too_many_bad_rows_stop_the_run_and_the_limit_is_the_share_of_rows(load, write_rows):
    path = write_rows("x.jsonl", [*questions(19), {"prompt": ""}])
    with pytest.raises(DataError, match=r"1 of 20 rows are bad \(5.0%; allowed: 4.0%\)(.|\n)*x\.jsonl:20: empty text"):
        load(path, quarantine_max_share=0.04)
    assert len(load(path, quarantine_max_share=0.05).train) == 19


def test_a_prompt_that_the_template_drops_is_a_bad_row(load, write_rows, tmp_path):
    template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}|{% endif %}{% endfor %}"
    rows = [{"prompt": "tea?"}, {"prompt": [system("own"), user("rain?")]}]
    load(write_rows("x.jsonl", rows), template=template, quarantine_max_share=0.5)
    assert quarantined(tmp_path) == [(2, "template fault")]


def test_a_run_without_any_prompt_left_is_refused(load, write_rows):
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows"):
        load(write_rows("empty.jsonl", []))
    bad = write_rows("bad.jsonl", [{"prompt": ""}] * 2)
    with pytest.raises(DataError, match=r"bad\.jsonl has no usable prompt\n  2 x empty text"):
        load(bad, quarantine_max_share=0.9)
    path = write_rows("x.jsonl", questions(3))
    with pytest.raises(DataError, match=r"no training prompts are left: see data\.eval_share and the weights"):
        load(RowSource(path=str(path), weight=0.1))


# ---------------------------------------------------------------------------------------------- over length


@pytest.fixture
def long_and_short(write_rows):
    return write_rows("x.jsonl", [{"prompt": LONG + "and the tea?"}, {"prompt": "short?"}])


def test_long_prompts_are_dropped_counted_and_listed_unless_told_otherwise(load, long_and_short, tmp_path):
    loaded = load(long_and_short, max_tokens=60, quarantine_max_share=0.0)
    assert texts(loaded.train) == ["short?"]
    report = loaded.report.sources[0]
    assert (report.rows, report.items, report.dropped, report.bad) == (2, 1, 1, {})
    assert quarantined(tmp_path) == [(1, "over length, dropped")]
    assert "1 dropped as too long" in report.line()


def test_the_limit_itself_is_not_too_long(load, long_and_short):
    size = int(load(long_and_short).train.lengths.max())
    assert len(load(long_and_short, max_tokens=size).train) == 2
    assert len(load(long_and_short, max_tokens=size - 1).train) == 1


@pytest.mark.parametrize("reader", ["tokenizer", "base_tokenizer"])
def test_a_long_prompt_can_be_cut_from_the_left_and_keeps_its_bos_and_its_messages(
    load, long_and_short, request, reader
):
    reader = request.getfixturevalue(reader)
    whole = load(long_and_short, reader=reader).train.prompt(0)
    loaded = load(long_and_short, reader=reader, max_tokens=40, over_length="truncate_prompt_left")
    prompt = loaded.train.prompt(0)
    kept = 40 if reader.bos_token is None else 39
    assert len(prompt.tokens) == 40
    np.testing.assert_array_equal(prompt.tokens[-kept:], whole.tokens[-kept:])
    assert (prompt.tokens[0] == reader.bos_token_id) == (reader.bos_token is not None)
    assert (prompt.messages, prompt.text) == (whole.messages, LONG + "and the tea?")
    assert loaded.report.sources[0].truncated == 1
    assert loaded.train.lengths[:, 0].tolist() == [40, len(loaded.train.prompt(1).tokens)]


def test_a_long_prompt_can_stop_the_run(load, long_and_short):
    with pytest.raises(DataError, match=r"x\.jsonl:1: \d+ tokens, the limit is 60; raise data\.max_tokens"):
        load(long_and_short, max_tokens=60, over_length="error")


def test_where_all_prompts_are_dropped_the_way_out_is_named(load, write_rows):
    with pytest.raises(DataError, match=r"no usable prompt\n  1 x over length, dropped\n(.|\n)*raise data\.max_tokens"):
        load(write_rows("x.jsonl", [{"prompt": LONG}]), max_tokens=60)


# -------------------------------------------------------------------------------------------------- repeats


def test_the_first_of_equal_prompts_is_kept_over_all_sources_and_the_others_are_counted(load, write_rows):
    one = write_rows("one.jsonl", [{"prompt": "tea?"}, {"prompt": "rain?"}, {"prompt": " tea?\n"}])
    two = write_rows("two.jsonl", [{"messages": [user("rain?"), assistant("yes")]}, {"prompt": "why?"}])
    loaded = load(one, two)
    assert [prompt.row_id for prompt in prompts(loaded.train)] == ["one.jsonl:1", "one.jsonl:2", "two.jsonl:2"]
    assert texts(loaded.train) == ["tea?", "rain?", "why?"]
    assert [(part.rows, part.items, part.repeated) for part in loaded.report.sources] == [(3, 2, 1), (2, 1, 1)]
    assert "3 rows (3 prompt text), 2 prompts, 1 repeats passed over" in loaded.report.sources[0].line()


def test_a_source_that_only_repeats_another_one_adds_nothing(load, write_rows):
    one, two = write_rows("one.jsonl", questions(3)), write_rows("two.jsonl", questions(2))
    loaded = load(one, RowSource(path=str(two), weight=5))
    assert loaded.train.source_index.tolist() == [0, 0, 0]
    assert loaded.report.sources[1].repeated == 2


def test_repeats_are_kept_on_request_and_stay_on_one_side_of_the_split(load, write_rows):
    path = write_rows("x.jsonl", questions(20) * 3)
    loaded = load(path, deduplicate=False, eval_share=0.3)
    assert len(loaded.train) + len(loaded.evals) == 60
    assert set(Counter(texts(loaded.evals)).values()) == {3}
    assert not set(texts(loaded.train)) & set(texts(loaded.evals))
    assert loaded.report.sources[0].repeated == 0


def test_repeats_among_eval_prompts_count_once_and_shared_prompts_are_a_warning(load, write_rows):
    train = write_rows("train.jsonl", questions(4))
    evals = write_rows("eval.jsonl", [*questions(1), *questions(3, word="rain") * 2])
    loaded = load(train, eval=(str(evals),))
    assert (len(loaded.train), len(loaded.evals)) == (4, 4)
    assert loaded.report.sources[1].repeated == 3
    assert "warning: 1 prompts of the eval sources are also trained on" in loaded.report.lines()


# ------------------------------------------------------------------------------------ splitting and mixing


def test_held_out_prompts_are_never_trained_on_and_depend_on_the_seed(load, write_rows):
    path = write_rows("x.jsonl", questions(100))
    held_out = []
    for seed in (0, 0, 1):
        loaded = load(path, eval_share=0.2, seed=seed)
        held_out.append(set(texts(loaded.evals)))
        assert not set(texts(loaded.train)) & held_out[-1]
        assert (len(loaded.train), len(loaded.evals)) == (80, 20)
        assert not np.intersect1d(loaded.train.prompt_keys, loaded.evals.prompt_keys).size
    assert held_out[0] == held_out[1]
    assert len(held_out[0] & held_out[2]) < 15
    assert "eval: 20 prompts of 20 prompts held out of the training sources" in loaded.report.lines()


def test_the_prompts_of_pairs_are_split_as_the_pairs_are(load, write_rows, make_rows, tokenizer, tmp_path):
    path = write_rows("x.jsonl", make_rows(50))
    config = DataConfig(train=str(path), eval_share=0.2)
    pairs = load_preferences(config, chat_format(tokenizer, None), cache_dir=tmp_path / "cache")
    loaded = load(path, eval_share=0.2, system_prompt="be brief")
    assert loaded.evals.prompt_keys.tolist() == pairs.evals.prompt_keys.tolist()


def test_weights_repeat_and_sample_whole_sources(load, write_rows):
    paths = [str(write_rows(f"{word}.jsonl", questions(20, word))) for word in ("tea", "rain", "sun")]
    sources = [RowSource(path=path, weight=weight) for path, weight in zip(paths, (2, 0.5, 1), strict=True)]
    data = load(*sources).train
    assert np.bincount(data.source_index).tolist() == [40, 10, 20]
    counts = Counter(texts(data))
    assert {counts[row["prompt"]] for row in questions(20, "tea")} == {2}
    assert sorted(counts[row["prompt"]] for row in questions(20, "rain")) == [0] * 10 + [1] * 10
    assert data.source(0).endswith("tea.jsonl")


def test_the_number_of_prompts_can_be_limited(load, write_rows):
    path = write_rows("x.jsonl", questions(50))
    small, large = (set(texts(load(path, max_train_prompts=count).train)) for count in (10, 30))
    assert (len(small), len(large)) == (10, 30)
    assert small < large
    assert set(texts(load(path, max_train_prompts=10, seed=1).train)) != small
    limited = load(path, eval_share=0.5, max_eval_prompts=7)
    assert (len(limited.train), len(limited.evals)) == (43, 7)


# ------------------------------------------------------------------------------------ fingerprint and cache


def test_the_fingerprint_names_content_order_template_tokenizer_and_system_prompt(load, write_rows, base_tokenizer):
    rows = questions(20)
    path = write_rows("x.jsonl", rows)
    same = load(path).train.fingerprint
    assert load(path).train.fingerprint == load(path, deduplicate=False).train.fingerprint == same
    unlike_in_answers_alone = CHATML_TEMPLATE.replace("<|im_end|>\\n'", "<|im_end|>\\n' if loop.length else ''")
    assert unlike_in_answers_alone != CHATML_TEMPLATE
    others = [
        load(path, reader=base_tokenizer),
        load(path, template="plain"),
        load(path, template="chatml"),
        load(path, template=unlike_in_answers_alone),
        load(path, system_prompt=""),
        load(path, system_prompt="be brief"),
        load(path, max_train_prompts=19),
        load(path, max_train_prompts=19, seed=1),
        load(path, eval_share=0.1),
        load(write_rows("y.jsonl", rows[::-1])),
        load(write_rows("z.jsonl", [*rows[:-1], {"prompt": "other?"}])),
    ]
    assert len({same, *(loaded.train.fingerprint for loaded in others)}) == 12


def test_the_fingerprint_names_a_system_prompt_that_is_cut_from_all_tokens(load, write_rows):
    options = {"max_tokens": 20, "over_length": "truncate_prompt_left"}
    path = write_rows("x.jsonl", [{"prompt": LONG}])
    one, other = (load(path, system_prompt=text, **options).train for text in ("be kind", "be brief"))
    np.testing.assert_array_equal(one.prompt(0).tokens, other.prompt(0).tokens)
    assert one.prompt(0).messages != other.prompt(0).messages
    assert one.fingerprint != other.fingerprint


def test_other_rows_left_after_repeats_have_another_fingerprint(load, write_rows):
    path = write_rows("x.jsonl", [{"prompt": "tea?"}, {"prompt": "tea?"}, {"prompt": "rain?"}])
    options = {"max_train_prompts": 2}
    fingerprints = set()
    for seed in range(8):  # some of these draw the same places of both
        for deduplicate in (True, False):
            train = load(path, deduplicate=deduplicate, seed=seed, **options).train
            fingerprints.add((train.fingerprint, *(prompt.row_id for prompt in prompts(train))))
    by_fingerprint = Counter(fingerprint for fingerprint, *_ in fingerprints)
    assert set(by_fingerprint.values()) == {1}


def test_a_second_load_takes_tokens_and_messages_from_the_cache(load, write_rows, monkeypatch):
    path = write_rows("x.jsonl", [*questions(5), *questions(2)])
    first = load(path)
    monkeypatch.setattr(ChatFormat, "tokenize_turns", lambda *_: pytest.fail("tokenized again"))
    again = load(path)
    assert [part.cached for part in again.report.sources] == [True]
    for one, other in zip(prompts(first.train), prompts(again.train), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert (one.row_id, one.messages, one.text) == (other.row_id, other.messages, other.text)


# ---------------------------------------------------------------------------------------------- real data


def test_the_alpaca_pairs_give_their_prompts(load, real_data):
    loaded = load(real_data("alpaca_eval_pairs_id_test.jsonl.gz"), eval_share=0.1)
    source = loaded.report.sources[0]
    assert source.items + source.repeated + source.dropped == source.rows == 324
    assert len(set(texts(loaded.train)) | set(texts(loaded.evals))) == source.items


# ------------------------------------------------------------------------------------------------ recipes


def test_a_recipe_section_names_sources_columns_and_limits():
    overrides = ["train=[a, {path: b, weight: 0.5}]", "columns.prompt=question", "max_tokens=64"]
    config = load_config(PromptDataConfig, (), overrides, program="t")
    assert config.train_sources == (RowSource(path="a"), RowSource(path="b", weight=0.5))
    assert (config.columns.prompt, config.max_tokens, config.over_length) == ("question", 64, "drop")
    assert PromptDataConfig(train="a").max_tokens == 512


@pytest.mark.parametrize("override", ["max_tokens=1", "max_train_prompts=0", "over_length=cut", "columns.label=x"])
def test_values_that_mean_nothing_are_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(PromptDataConfig, (), ["train=a", override], program="t")
