import json

import numpy as np
import pytest

from rlhf.config import load_config
from rlhf.core.errors import ConfigError, DataError
from rlhf.data.batching import collate, plan_micro_batches
from rlhf.data.examples import load_examples, partners
from rlhf.data.options import ExampleColumns, ExampleDataConfig, RowSource
from rlhf.data.templates import ChatFormat, chat_format

LONG = "why? " * 60
FORGETFUL = (  # as templates of reasoning models do: earlier answers lose what stands before the bar
    "{% for m in messages %}{{ m['role'] }}: "
    "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(tokenizer, tmp_path):
    """Load ``rows`` as conversations (or another kind) with a cache and a run folder of this test's own."""

    def run(*train, kind="conversation", reader=tokenizer, **options):
        train = tuple(str(path) if not isinstance(path, RowSource) else path for path in train)
        config = ExampleDataConfig(train=train, cache_dir=tmp_path / "cache", **{"eval_share": 0.0, **options})
        return load_examples(config, chat_format(reader, config.template), kind=kind, run_folder=tmp_path / "run")

    return run


@pytest.fixture
def count_tokenized(monkeypatch):
    """A list that collects the number of texts of each call of the tokenizer."""
    calls = []
    genuine = ChatFormat.tokenize_turns
    monkeypatch.setattr(
        ChatFormat, "tokenize_turns", lambda self, rendered: calls.append(len(rendered)) or genuine(self, rendered)
    )
    return calls


def answers(count, prompts=None):
    """Rows with labels over ``prompts`` different prompts."""
    return [
        {
            "prompt": f"question {number % (prompts or count)} about tea?",
            "completion": f"answer number {number}" + " and rain" * (number % 3),
            "label": number % 2 == 0,
        }
        for number in range(count)
    ]


def row_ids(dataset):
    return [dataset.row_id(index) for index in range(len(dataset))]


def learned(tokenizer, row):
    """The stretches of text that a row's mask selects."""
    edges = np.flatnonzero(np.diff(np.r_[False, row.response, False]))
    return [tokenizer.decode(row.tokens[begin:end]) for begin, end in edges.reshape(-1, 2)]


# --------------------------------------------------------------------------------------------- conversations


def test_every_assistant_turn_is_learned_with_its_end_token_and_nothing_else(load, write_rows, tokenizer):
    messages = [user("tea?"), assistant("hot"), user("why?"), assistant("cold rain")]
    data = load(write_rows("chats.jsonl", [{"messages": messages}]), template="chatml").train
    pieces = [
        ("<|im_start|>user\ntea?<|im_end|>\n<|im_start|>assistant\n", False),
        ("hot<|im_end|>", True),
        ("\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n", False),
        ("cold rain<|im_end|>", True),
    ]
    ids = [tokenizer(text)["input_ids"] for text, _ in pieces]
    item = data.item(0)
    [row] = item.rows
    assert row.tokens.tolist() == [token for piece in ids for token in piece]
    assert row.response.tolist() == [flag for piece, (_, flag) in zip(ids, pieces, strict=True) for _ in piece]
    assert (item.row_id, item.label, data.labels) == ("chats.jsonl:1", None, None)
    assert data.lengths.tolist() == [[len(row.tokens)]]
    assert data.lengths.dtype == np.int32


@pytest.mark.parametrize("reader", ["tokenizer", "base_tokenizer"])
@pytest.mark.parametrize("answer", ["Because 12 + 30 = 42.", [assistant("näïve ☕ \n")]])
def test_a_prompt_with_a_completion_has_the_tokens_and_the_mask_of_a_pair(load, write_rows, request, reader, answer):
    reader = request.getfixturevalue(reader)
    [row] = load(write_rows("x.jsonl", [{"prompt": "why?", "completion": answer}]), reader=reader).train.item(0).rows
    response = [assistant(answer)] if isinstance(answer, str) else answer
    ids, start = chat_format(reader, None).encode([user("why?")], response)
    np.testing.assert_array_equal(row.tokens, ids)
    np.testing.assert_array_equal(row.response, np.arange(len(ids)) >= start)


def test_one_assistant_turn_at_the_end_of_messages_is_a_prompt_with_a_completion(load, write_rows):
    rows = [{"messages": [user("why?"), assistant("so")]}, {"prompt": "why?", "completion": "so"}]
    data = load(write_rows("x.jsonl", rows)).train
    (one,), (other,) = data.item(0).rows, data.item(1).rows
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.response, other.response)
    assert data.prompt_keys[0] == data.prompt_keys[1]


def test_assistant_turns_of_a_prompt_are_not_learned(load, write_rows, tokenizer):
    prompt = [user("tea?"), assistant("hot"), user("why?")]
    completion = [assistant("cold"), user("so?"), assistant("rain")]
    data = load(write_rows("x.jsonl", [{"prompt": prompt, "completion": completion}])).train
    assert learned(tokenizer, data.item(0).rows[0]) == ["cold<|im_end|>", "rain<|im_end|>"]


def test_what_stands_behind_the_last_assistant_turn_is_left_out(load, write_rows, tokenizer):
    messages = [user("tea?"), assistant("hot"), user("thanks")]
    data = load(write_rows("x.jsonl", [{"conversations": messages}]), template="chatml").train
    text = "<|im_start|>user\ntea?<|im_end|>\n<|im_start|>assistant\nhot<|im_end|>"
    assert tokenizer.decode(data.item(0).rows[0].tokens) == text


def test_a_system_prompt_goes_first_and_moves_no_turn(load, write_rows, tokenizer):
    row = {"prompt": [user("tea?"), assistant("hot"), user("why?")], "completion": "cold"}
    [got] = load(write_rows("x.jsonl", [row]), system_prompt="be brief").train.item(0).rows
    assert tokenizer.decode(got.tokens).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntea?")
    assert learned(tokenizer, got) == ["cold<|im_end|>"]


def test_a_template_that_rewrites_or_drops_earlier_turns_puts_rows_in_quarantine(load, write_rows, tmp_path):
    thought = [user("tea?"), assistant("hm|hot"), user("why?"), assistant("hm|cold")]
    plain = [user("tea?"), assistant("hot"), user("why?"), assistant("hm|cold")]
    path = write_rows("x.jsonl", [{"messages": thought}, {"messages": plain}])
    loaded = load(path, template=FORGETFUL, quarantine_max_share=0.5)
    assert loaded.report.sources[0].bad == {"template fault": 1}
    listed = json.loads((tmp_path / "run" / "quarantine.jsonl").read_text())
    assert (listed["file"], listed["line"]) == (str(path), 1)
    assert "shows message 2 (assistant), or what stands before it, in another way" in listed["detail"]
    assert row_ids(loaded.train) == ["x.jsonl:2"]
    hides_users = "{% for m in messages %}{% if m['role'] != 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"2 x template fault(.|\n)*drops or rewrites the prompt: the user message"):
        load(path, template=hides_users, quarantine_max_share=0.5)


# ------------------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": [', "unreadable row"),
        ({"messages": [user("tea?")]}, "no assistant answer"),
        ({"messages": [assistant("tea")]}, "no prompt"),
        ({"messages": "tea"}, "wrong type"),
        ({"messages": [user("tea?"), {"role": "assistant", "content": 5}]}, "wrong type"),
        ({"messages": [user("tea?"), assistant(" ")]}, "empty text"),
        ({"prompt": "p", "completion": " "}, "empty text"),
        ({"prompt": "p", "completion": [user("q"), assistant("a")]}, "no assistant answer"),
        ({"prompt": "p", "completion": [assistant("a"), user("q")]}, "no assistant answer"),
        ({"completion": "a"}, "no prompt"),
        ({"prompt": "p"}, "missing column"),
        ({"question": "p", "answer": "a"}, "missing column"),
    ],
)
def test_a_bad_conversation_is_left_out_with_its_reason(load, write_rows, row, reason):
    rows = [{"prompt": "p", "completion": "a"}, row]
    assert load(write_rows("x.jsonl", rows), quarantine_max_share=0.5).report.sources[0].bad == {reason: 1}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "p", "completion": "a"}, "missing label", "the row has: prompt, completion"),
        ({"prompt": "p", "completion": "a", "label": None}, "missing label", "null"),
        ({"prompt": "p", "completion": "a", "label": "maybe"}, "wrong type", "the text 'maybe', expected true"),
        ({"prompt": "p", "completion": "a", "label": 0.5}, "wrong type", "a number (0.5)"),
        ({"prompt": "p", "completion": "a", "label": [True]}, "wrong type", "a list"),
        ({"messages": [user("p"), assistant("a")], "label": True}, "missing column", "completion is null or absent"),
    ],
)
def test_a_bad_labeled_row_is_left_out_with_its_reason(load, write_rows, row, reason, detail):
    path = write_rows("x.jsonl", [*answers(2), row])
    report = load(path, kind="unpaired", quarantine_max_share=0.5).report
    [left_out] = report.sources[0].left_out
    assert (left_out.line, left_out.reason) == (3, reason)
    assert detail in left_out.detail


def test_too_many_bad_rows_stop_the_run_and_are_still_listed(load, write_rows, tmp_path):
    path = write_rows("x.jsonl", [*answers(18), {"messages": []}, {"prompt": "p"}])
    with pytest.raises(DataError, match=r"2 of 20 rows are bad \(10\.0%; allowed: 9\.0%\)(.|\n)*x\.jsonl:19"):
        load(path, quarantine_max_share=0.09)
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 2
    assert len(load(path, quarantine_max_share=0.1).train) == 18


# ---------------------------------------------------------------------------------------------- over length


def test_a_long_conversation_is_cut_on_the_left_and_a_turn_without_its_beginning_is_not_learned(
    load, write_rows, tokenizer
):
    messages = [user("tea?"), assistant(LONG), user("so?"), assistant("hot"), user("why?"), assistant("cold")]
    path = write_rows("x.jsonl", [{"messages": messages}])
    [whole] = load(path).train.item(0).rows
    loaded = load(path, max_tokens=60)
    [row] = loaded.train.item(0).rows
    np.testing.assert_array_equal(row.tokens, whole.tokens[-60:])
    assert learned(tokenizer, row) == ["hot<|im_end|>", "cold<|im_end|>"]
    assert loaded.report.sources[0].truncated == 1
    assert loaded.train.lengths.tolist() == [[60]]


def test_a_cut_conversation_keeps_its_leading_bos(load, write_rows, base_tokenizer):
    path = write_rows("x.jsonl", [{"messages": [user(LONG), assistant("hot"), user("why?"), assistant("cold")]}])
    [row] = load(path, max_tokens=50, reader=base_tokenizer).train.item(0).rows
    assert (len(row.tokens), row.tokens[0]) == (50, base_tokenizer.bos_token_id)
    assert learned(base_tokenizer, row) == ["hot<|endoftext|>", "cold<|endoftext|>"]


def test_a_last_response_that_alone_is_too_long_is_a_bad_row(load, write_rows):
    rows = [{"messages": [user("tea?"), assistant("hot"), user("why?"), assistant(text)]} for text in ("so", LONG)]
    report = load(write_rows("x.jsonl", rows), max_tokens=60, quarantine_max_share=0.5).report
    assert report.sources[0].bad == {"response too long": 1}


def test_long_rows_can_be_dropped_or_stop_the_run(load, write_rows):
    path = write_rows("x.jsonl", [*answers(2), {"prompt": LONG, "completion": "a"}])
    loaded = load(path, max_tokens=60, over_length="drop")
    assert (loaded.report.sources[0].dropped, len(loaded.train)) == (1, 2)
    with pytest.raises(DataError, match=r"x\.jsonl:3: \d+ tokens, the limit is 60; raise data\.max_tokens"):
        load(path, max_tokens=60, over_length="error")


# ------------------------------------------------------------------------------------------------- unpaired


def test_a_labeled_row_has_the_tokens_of_a_pair_and_its_label(load, write_rows, tokenizer):
    rows = answers(3)
    data = load(write_rows("x.jsonl", rows), kind="unpaired").train
    assert data.labels.tolist() == [True, False, True]
    for index, row in enumerate(rows):
        item = data.item(index)
        ids, start = chat_format(tokenizer, None).encode([user(row["prompt"])], [assistant(row["completion"])])
        np.testing.assert_array_equal(item.rows[0].tokens, ids)
        np.testing.assert_array_equal(item.rows[0].response, np.arange(len(ids)) >= start)
        assert item.label is row["label"]
        assert data.lengths[index].tolist() == [len(one.tokens) for one in item.rows]


def test_labels_may_be_truth_values_numbers_or_texts(load, write_rows):
    labels = [True, False, 1, 0, 1.0, "true", "False", "1", " 0 "]
    rows = [{"prompt": f"p{n}", "response": "a", "label": label} for n, label in enumerate(labels)]
    expected = [True, False, True, False, True, True, False, True, False]
    assert load(write_rows("x.jsonl", rows), kind="unpaired").train.labels.tolist() == expected


def test_a_csv_file_and_other_column_names_will_do(load, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("q,a,good\nwhy?,so,true\ntea?,hot,0\n")
    columns = ExampleColumns(prompt="q", completion="a", label="good")
    assert load(path, kind="unpaired", columns=columns).train.labels.tolist() == [True, False]


def test_a_mismatched_row_is_the_own_prompt_with_a_response_to_another_prompt(load, write_rows, tokenizer):
    rows = answers(12, prompts=5)
    data = load(write_rows("x.jsonl", rows), kind="unpaired").train
    brought = []
    for index, row in enumerate(rows):
        own, mismatched = data.item(index).rows
        prompt, [response] = mismatched.tokens[~mismatched.response], learned(tokenizer, mismatched)
        np.testing.assert_array_equal(prompt, own.tokens[~own.response])
        others = [other["completion"] for other in rows if other["prompt"] != row["prompt"]]
        brought.append(response.removesuffix("<|im_end|>"))
        assert brought[-1] in others
    assert sorted(brought) == sorted(row["completion"] for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_partners_share_a_prompt_only_where_one_prompt_has_more_than_half_of_the_rows(seed):
    generator = np.random.default_rng(seed)
    for count, kinds in [(2, 2), (7, 2), (30, 3), (31, 30), (9, 1)]:
        keys = generator.integers(0, kinds, count).astype(np.uint64)
        found = partners(keys, seed)
        assert sorted(found.tolist()) == list(range(count))
        assert (found != np.arange(count)).all()
        most = np.bincount(keys.astype(int)).max()
        assert (keys[found] == keys).sum() == max(0, 2 * most - count)


def test_partners_depend_on_the_seed():
    keys = np.arange(50, dtype=np.uint64)
    assert partners(keys, 0).tolist() == partners(keys, 0).tolist()
    assert (partners(keys, 0) != partners(keys, 1)).mean() > 0.8


def test_a_mismatched_row_that_is_too_long_loses_the_start_of_its_prompt(load, write_rows, base_tokenizer):
    rows = [
        {"prompt": "why? " * 9 + "tea?", "completion": "so", "label": True},
        {"prompt": "rain?", "completion": "and " * 30 + "so", "label": False},
    ]
    path = write_rows("x.jsonl", rows)
    whole = load(path, kind="unpaired", reader=base_tokenizer).train
    size = int(whole.lengths[1, 0])
    cut = load(path, kind="unpaired", reader=base_tokenizer, max_tokens=size).train
    before, after = whole.item(0).rows[1], cut.item(0).rows[1]
    assert len(before.tokens) > size == len(after.tokens) == cut.lengths[0, 1]
    assert after.tokens[0] == base_tokenizer.bos_token_id
    np.testing.assert_array_equal(after.tokens[1:], before.tokens[len(before.tokens) - size + 1 :])
    assert learned(base_tokenizer, after) == learned(base_tokenizer, before)
    assert cut.fingerprint != whole.fingerprint


def test_a_lone_labeled_row_is_refused(load, write_rows):
    with pytest.raises(DataError, match="one training row is left"):
        load(write_rows("x.jsonl", answers(1)), kind="unpaired")
    with pytest.raises(DataError, match=r"one evaluation row is left.*change data\.eval_share"):
        load(write_rows("x.jsonl", answers(10)), kind="unpaired", eval_share=0.1)


def test_answers_to_one_prompt_are_mismatched_with_each_other_and_counted(load, write_rows):
    loaded = load(write_rows("x.jsonl", answers(4, prompts=1)), kind="unpaired")
    assert "4 training examples are mismatched with an answer to their own prompt" in "\n".join(loaded.report.notes)
    assert "2 of 4 training examples have a desirable answer" in loaded.report.notes


def test_items_make_a_batch_of_rows_and_mismatched_rows_with_labels(load, write_rows):
    data = load(write_rows("x.jsonl", answers(4)), kind="unpaired").train
    indices = np.array([3, 0, 2])
    [[plan]] = plan_micro_batches(data.lengths[indices], token_budget=4000, ranks=1, length_buckets=2)
    batch = collate(data, indices, plan, 2)
    assert batch.rows_per_item == 2
    assert batch.labels.tolist() == data.labels[batch.indices.numpy()].tolist()


# ---------------------------------------------------------------------------------------------------- cache


def test_a_second_load_takes_the_tokens_from_the_cache_and_the_kinds_do_not_share_them(
    load, write_rows, count_tokenized
):
    path = write_rows("x.jsonl", [*answers(9), {"prompt": "p"}])
    first = load(path, quarantine_max_share=0.1)
    again = load(path, quarantine_max_share=0.1, seed=3, max_train_rows=5)
    assert count_tokenized == [9]
    assert again.report.sources[0].cached
    assert again.report.sources[0].bad == first.report.sources[0].bad == {"missing column": 1}
    assert not load(path, kind="unpaired", quarantine_max_share=0.1).report.sources[0].cached


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 300}, {"template": "chatml"}, {"system_prompt": "x"}, {"columns": ExampleColumns(label="")}],
)
def test_whatever_decides_on_tokens_makes_another_cache_entry(load, write_rows, count_tokenized, change):
    path = write_rows("x.jsonl", answers(3))
    load(path)
    load(path, **change)
    assert count_tokenized == [3, 3]


@pytest.mark.parametrize("name", ["tokens.bin", "rows.npy", "bad.jsonl", "meta.json"])
def test_a_damaged_cache_entry_is_made_again_with_a_message(load, write_rows, tmp_path, name):
    path = write_rows("x.jsonl", [*answers(9), {"prompt": "p"}])
    before = load(path, quarantine_max_share=0.1)
    file = next((tmp_path / "cache").iterdir()) / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    after = load(path, quarantine_max_share=0.1)
    assert "were damaged and have been made again" in "\n".join(after.report.lines())
    assert file.read_bytes() == whole
    assert after.train.fingerprint == before.train.fingerprint


def test_the_fingerprint_names_tokens_order_and_pairing(load, write_rows):
    path = write_rows("x.jsonl", answers(30))
    same = [load(path, kind="unpaired", **change) for change in ({}, {"quarantine_max_share": 0.5})]
    assert same[0].train.fingerprint == same[1].train.fingerprint
    changes = [{"seed": 1}, {"max_train_rows": 20}, {"template": "chatml"}, {"max_tokens": 36}, {"eval_share": 0.1}]
    names = {load(path, kind="unpaired", **change).train.fingerprint for change in changes}
    assert len(names | {same[0].train.fingerprint}) == 6


# ------------------------------------------------------------------------------------ splitting and mixing


def test_held_out_prompts_are_never_trained_on(load, write_rows):
    loaded = load(write_rows("x.jsonl", answers(60, prompts=20)), kind="unpaired", eval_share=0.2)
    assert (len(loaded.train), len(loaded.evals)) == (48, 12)
    assert loaded.report.held_out_prompts == 4
    assert not np.intersect1d(loaded.train.prompt_keys, loaded.evals.prompt_keys).size
    assert "eval: 12 examples of 4 prompts held out of the training sources" in loaded.report.lines()


def test_conversations_that_begin_alike_are_held_out_together(load, write_rows):
    rows = [
        {"messages": [user(f"tea {n % 10}?"), assistant(f"hot {n}"), user("why?"), assistant("so")]} for n in range(40)
    ]
    loaded = load(write_rows("x.jsonl", rows), eval_share=0.3)
    assert (len(loaded.train), len(loaded.evals)) == (28, 12)
    assert not np.intersect1d(loaded.train.prompt_keys, loaded.evals.prompt_keys).size


def test_weights_repeat_and_limits_sample_rows(load, write_rows):
    one, two = write_rows("one.jsonl", answers(10)), write_rows("two.jsonl", answers(20))
    sources = RowSource(path=str(one), weight=2.5), RowSource(path=str(two), weight=0.5)
    mixed = load(*sources).train
    assert np.bincount(mixed.source_index).tolist() == [25, 10]
    assert mixed.source(0).endswith("one.jsonl")
    small, large = (set(row_ids(load(two, max_train_rows=count).train)) for count in (5, 12))
    assert (len(small), len(large)) == (5, 12)
    assert small < large
    assert len(load(one, eval=str(two), max_eval_rows=7).evals) == 7


def test_the_report_speaks_of_examples(load, write_rows):
    rows = [*answers(3), {"messages": [user("a?"), assistant("b")]}]
    report = load(write_rows("x.jsonl", rows)).report
    assert "4 rows (1 conversations, 3 prompt text), 4 examples" in report.lines()[1]
    assert report.train_items == 4


# -------------------------------------------------------------------------------------------------- options


def test_a_recipe_names_sources_by_path_or_section_and_columns_for_all():
    overrides = ["train=[a, {path: b, weight: 0.5}]", "columns.completion=answer", "max_eval_rows=9"]
    config = load_config(ExampleDataConfig, (), overrides, program="t")
    assert config.train_sources == (RowSource(path="a"), RowSource(path="b", weight=0.5))
    assert (config.columns.completion, config.max_eval_rows) == ("answer", 9)


@pytest.mark.parametrize("override", ["train=[{path: a, columns: {label: x}}]", "max_train_pairs=3", "eval_share=1"])
def test_what_only_pairs_have_and_values_out_of_range_are_refused(override):
    with pytest.raises(ConfigError):
        load_config(ExampleDataConfig, (), ["train=a", override], program="t")
