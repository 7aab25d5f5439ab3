import pytest

from rlhf.core.intervals import wilson_interval
from rlhf.data.doctor import Ruler, examine, reasons, serious_faults, shared_prompts
from rlhf.data.options import ColumnConfig, SourceConfig
from rlhf.data.templates import chat_format

IN_CHARACTERS = Ruler(columns=ColumnConfig(), chat=None, max_tokens=1024)


def look(*paths, ruler=IN_CHARACTERS):
    return examine([SourceConfig(path=str(path)) for path in paths], ruler)


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_duplicates_and_contradictions_are_told_apart(write_rows):
    rows = [
        pair("p", "a", "b"),
        pair("p", "a", "b"),
        pair("p", "b", "a"),
        pair("q", "b", "a"),
        pair("p", "a", "c"),
    ]
    found = look(write_rows("x.jsonl", rows))
    assert found.duplicates() == [["x.jsonl:1", "x.jsonl:2"]]
    [sides] = found.contradictions()
    assert sorted(sides) == [["x.jsonl:1", "x.jsonl:2"], ["x.jsonl:3"]]
    assert found.contradictory_share() == pytest.approx(3 / 5)


def test_contradictions_across_sources_are_found(write_rows):
    found = look(write_rows("x.jsonl", [pair("p", "a", "b")]), write_rows("y.jsonl", [pair("p", "b", "a")]))
    assert len(found.contradictions()) == 1


def test_bad_rows_are_grouped_by_reason_most_frequent_first(write_rows):
    rows = ["{", pair("p", "", "b"), pair("p", "a", " "), pair("p", "a", "b")]
    found = look(write_rows("x.jsonl", rows))
    assert {reason: [row.line for row in group] for reason, group in reasons(found.bad).items()} == {
        "empty text": [2, 3],
        "unreadable row": [1],
    }
    assert list(reasons(found.bad)) == ["empty text", "unreadable row"]
    assert (found.rows, found.usable, found.bad_share()) == (4, 1, 0.75)


def test_lengths_and_length_bias_are_counted_in_characters_without_a_tokenizer(write_rows):
    rows = [pair("ppp", "aaaa", "b"), pair("p", "a", "bb"), pair("p", "ccc", "d"), pair("p", "e", "f")]
    found = look(write_rows("x.jsonl", rows))
    assert found.unit == "characters"
    assert found.longer_wins() == (2, 3)
    assert found.quantiles() == {"prompt": [1, 3, 3, 3], "chosen": [3, 4, 4, 4], "rejected": [1, 2, 2, 2]}


def test_a_tokenizer_measures_in_tokens_and_finds_what_is_too_long(write_rows, tokenizer):
    chat = chat_format(tokenizer, None)
    rows = [pair("p", "a", "b"), pair("why? " * 40, "a", "b"), pair("p", "a", "why? " * 40)]
    found = look(write_rows("x.jsonl", rows), ruler=Ruler(columns=ColumnConfig(), chat=chat, max_tokens=50))
    ids, start = chat.encode([{"role": "user", "content": "p"}], [{"role": "assistant", "content": "a"}])
    assert found.lengths[0] == (start, len(ids) - start, 2)
    assert (found.cut, found.too_long) == (2, 1)


def test_rows_that_the_template_refuses_are_bad_and_the_others_keep_their_lengths(write_rows, tokenizer):
    template = (
        "{% for m in messages %}{% if m['content'] == 'p' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['content'] }}|{% endfor %}"
    )
    ruler = Ruler(columns=ColumnConfig(), chat=chat_format(tokenizer, template), max_tokens=50)
    found = look(write_rows("x.jsonl", [pair("p", "a", "b"), pair("q", "cc", "d")]), ruler=ruler)
    assert [(row.line, row.reason) for row in found.bad] == [(1, "template fault")]
    assert found.usable == len(found.pairs) == 1


def test_scores_that_contradict_the_label_are_listed(write_rows):
    rows = [
        pair("p", "a", "b", chosen_score=1, rejected_score=0),
        pair("q", "a", "b", chosen_score=0, rejected_score=1),
        pair("r", "a", "b", margin=1),
    ]
    found = look(write_rows("x.jsonl", rows))
    assert (found.with_scores, found.with_margin, found.against_scores) == (2, 1, ["x.jsonl:2"])


def test_data_is_unfit_for_each_of_the_documented_reasons(write_rows, make_rows):
    good = look(write_rows("good.jsonl", make_rows(100)))
    other = look(write_rows("other.jsonl", make_rows(10, word="rain")))
    assert serious_faults(good, other, 0.01) == []
    empty = look(write_rows("empty.jsonl", ["{"]))
    assert serious_faults(empty, None, 1.0) == ["train: there is no usable pair"]
    bad = look(write_rows("bad.jsonl", [*make_rows(98), "{", "{"]))
    assert serious_faults(bad, None, 0.01) == ["train: 2.0% of the rows are bad, allowed are 1.0%"]
    assert serious_faults(bad, None, 0.02) == []
    both = look(write_rows("both.jsonl", [*make_rows(98), pair("p", "a", "b"), pair("p", "b", "a")]))
    assert serious_faults(other, both, 0.01) == ["eval: 2.0% of the pairs contradict each other"]
    leak = look(write_rows("leak.jsonl", [*make_rows(10, word="rain"), *make_rows(2), *make_rows(2)]))
    assert shared_prompts(good, leak) == (2, 4)
    assert serious_faults(good, leak, 0.01) == [
        "2 eval prompts (4 of 14 eval pairs) are also in the training data"
    ]


def test_the_alpaca_pairs_are_balanced_in_length(real_data):
    found = look(real_data("alpaca_eval_pairs_train.jsonl.gz"))
    low, high = wilson_interval(*found.longer_wins())
    assert (found.rows, found.usable) == (3115, 3115)
    assert low < 0.5 < high
