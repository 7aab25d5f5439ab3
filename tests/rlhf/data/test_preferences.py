import json

import numpy as np
import pytest

from rlhf.core.errors import DataError
from rlhf.data import tokenizing
from rlhf.data.batching import MicroBatchPlan, collate
from rlhf.data.options import ColumnConfig, DataConfig, SourceConfig
from rlhf.data.preferences import load_preferences
from rlhf.data.templates import ChatFormat, chat_format


@pytest.fixture
def load(tokenizer, tmp_path):
    """Load ``train`` (and other options) with a cache and a run folder of this test's own."""

    def run(train, *, reader=tokenizer, run_folder=tmp_path / "run", **options):
        train = tuple(str(path) if not isinstance(path, SourceConfig) else path for path in train)
        config = DataConfig(train=train, **{"eval_share": 0.0, **options})
        chat = chat_format(reader, config.template)
        return load_preferences(config, chat, run_folder=run_folder, cache_dir=tmp_path / "cache")

    return run


@pytest.fixture
def count_tokenized(monkeypatch):
    """A list that collects the number of texts of each call of the tokenizer."""
    calls = []
    genuine = ChatFormat.tokenize_turns

    def counted(self, rendered):
        calls.append(len(rendered))
        return genuine(self, rendered)

    monkeypatch.setattr(ChatFormat, "tokenize_turns", counted)
    return calls


def row_ids(dataset):
    return [dataset.row_id(index) for index in range(len(dataset))]


def questions(dataset, tokenizer):
    """The prompt text of every pair, both sides."""
    texts = []
    for index in range(len(dataset)):
        pair = dataset.pair(index)
        sides = (pair.chosen, pair.chosen_response_start), (pair.rejected, pair.rejected_response_start)
        texts.append([tokenizer.decode(ids[:start]) for ids, start in sides])
    return texts


def test_a_pair_holds_the_tokens_of_both_rows_and_what_the_file_says(load, write_rows, make_rows, tokenizer):
    rows = make_rows(3)
    data = load([write_rows("pairs.jsonl", rows)]).train
    chat = chat_format(tokenizer, None)
    for index, row in enumerate(rows):
        pair = data.pair(index)
        prompt = [{"role": "user", "content": row["prompt"]}]
        chosen, start = chat.encode(prompt, [{"role": "assistant", "content": row["chosen"]}])
        rejected, _ = chat.encode(prompt, [{"role": "assistant", "content": row["rejected"]}])
        np.testing.assert_array_equal(pair.chosen, chosen)
        np.testing.assert_array_equal(pair.rejected, rejected)
        assert pair.chosen.dtype == np.int32
        assert pair.chosen_response_start == pair.rejected_response_start == start
        assert (pair.margin, pair.chosen_score, pair.rejected_score) == (row["margin"], 0.9, 0.25)
        assert pair.row_id == f"pairs.jsonl:{index + 1}"
        assert data.lengths[index].tolist() == [len(chosen), len(rejected)]
        assert pair.prompt_key == data.prompt_keys[index]
    assert len(data) == 3
    assert data.lengths.dtype == np.int32
    assert data.source(0).endswith("pairs.jsonl")


def test_missing_numbers_are_none_and_nan(load, write_rows):
    data = load([write_rows("pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])]).train
    pair = data.pair(0)
    assert (pair.margin, pair.chosen_score, pair.rejected_score) == (None, None, None)
    assert np.isnan(data.margins).all()
    assert np.isnan(data.scores).all()


def test_a_system_prompt_goes_before_conversations_without_one(load, write_rows, tokenizer):
    system = [{"role": "system", "content": "own"}, {"role": "user", "content": "p"}]
    rows = [{"prompt": prompt, "chosen": [answer("a")], "rejected": [answer("b")]} for prompt in ("p", system)]
    data = load([write_rows("pairs.jsonl", rows)], system_prompt="be brief").train
    (first, _), (second, _) = questions(data, tokenizer)
    assert first.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\np")
    assert second.startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\np")


def answer(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------------------------------------- over length


LONG = "why? " * 60


def test_a_long_prompt_is_cut_from_the_left_by_the_same_amount_on_both_sides(load, write_rows, tokenizer):
    row = {"prompt": LONG + "and the tea?", "chosen": "a long answer about the rain", "rejected": "no"}
    path = write_rows("pairs.jsonl", [row])
    whole = load([path]).train.pair(0)
    loaded = load([path], max_tokens=60)
    pair = loaded.train.pair(0)
    assert loaded.report.sources[0].truncated == 1
    assert len(pair.chosen) == 60
    removed = len(whole.chosen) - 60
    assert len(pair.rejected) == len(whole.rejected) - removed
    np.testing.assert_array_equal(pair.chosen, whole.chosen[removed:])
    np.testing.assert_array_equal(pair.rejected, whole.rejected[removed:])
    assert tokenizer.decode(pair.rejected[pair.rejected_response_start :]) == "no<|im_end|>"


def test_a_cut_prompt_keeps_its_leading_bos(load, write_rows, base_tokenizer):
    row = {"prompt": LONG + "and the tea?", "chosen": "a long answer about the rain", "rejected": "no"}
    pair = load([write_rows("pairs.jsonl", [row])], max_tokens=50, reader=base_tokenizer).train.pair(0)
    assert len(pair.chosen) == 50
    assert pair.chosen[0] == pair.rejected[0] == base_tokenizer.bos_token_id
    text = base_tokenizer.decode(pair.chosen)
    assert text.endswith("and the tea?\n\nAssistant:\na long answer about the rain<|endoftext|>")
    response = base_tokenizer.decode(pair.chosen[pair.chosen_response_start :])
    assert response == "a long answer about the rain<|endoftext|>"


def test_a_response_that_alone_is_too_long_is_a_bad_row(load, write_rows, make_rows):
    rows = [*make_rows(3), {"prompt": "p", "chosen": LONG, "rejected": "no"}]
    loaded = load([write_rows("pairs.jsonl", rows)], max_tokens=60, quarantine_max_share=0.5)
    assert loaded.report.sources[0].bad == {"response too long": 1}
    assert row_ids(loaded.train) == [f"pairs.jsonl:{line}" for line in (1, 2, 3)]


def test_a_response_is_kept_whole_as_long_as_a_word_of_the_prompt_is_left(load, write_rows, tokenizer):
    path = write_rows("pairs.jsonl", [{"prompt": "p", "chosen": LONG, "rejected": "no"}])
    whole = load([path]).train.pair(0)
    size = len(whole.chosen) - whole.chosen_response_start
    behind = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    pair = load([path], max_tokens=size + len(behind) + 1).train.pair(0)
    answer = whole.chosen[whole.chosen_response_start :]
    np.testing.assert_array_equal(pair.chosen[pair.chosen_response_start :], answer)
    assert tokenizer.decode(pair.chosen[: pair.chosen_response_start]).startswith("p<|im_end|>")
    for limit in (size + len(behind), size):
        with pytest.raises(DataError, match=r"nothing is left of the prompt(.|\n)* set data\.over_length=drop"):
            load([path], max_tokens=limit)
    with pytest.raises(DataError, match=rf"a response of {size} tokens, the limit is {size - 1}"):
        load([path], max_tokens=size - 1)


def test_dropped_pairs_are_counted_and_listed_but_not_held_to_be_bad(load, write_rows, make_rows, tmp_path):
    rows = [*make_rows(2), {"prompt": LONG, "chosen": "a", "rejected": "no"}]
    loaded = load([write_rows("pairs.jsonl", rows)], max_tokens=60, over_length="drop", quarantine_max_share=0.0)
    report = loaded.report.sources[0]
    assert (report.rows, report.items, report.dropped, report.bad) == (3, 2, 1, {})
    listed = json.loads((tmp_path / "run" / "quarantine.jsonl").read_text())
    assert (listed["line"], listed["reason"]) == (3, "over length, dropped")


def test_over_length_error_names_the_row_and_leaves_no_cache_entry(load, write_rows, make_rows, tmp_path):
    rows = [*make_rows(2), {"prompt": LONG, "chosen": "a", "rejected": "no"}]
    with pytest.raises(DataError, match=r"pairs\.jsonl:3: \d+ tokens, the limit is 60; raise data\.max_tokens"):
        load([write_rows("pairs.jsonl", rows)], max_tokens=60, over_length="error")
    assert list((tmp_path / "cache").iterdir()) == []


# ----------------------------------------------------------------------------------------------- quarantine


BAD_ROWS = [
    '{"prompt": "p", "chosen": "a"',
    {"prompt": "p", "chosen": "", "rejected": "b"},
    {"prompt": "p", "chosen": "same", "rejected": "same"},
    {"prompt": "p", "chosen": 5, "rejected": "b"},
    '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}',
]


def test_bad_rows_are_listed_with_file_line_and_reason(load, write_rows, make_rows, tmp_path):
    path = write_rows("pairs.jsonl", [*make_rows(2), *BAD_ROWS])
    loaded = load([path], quarantine_max_share=0.8)
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert {row["file"] for row in listed} == {str(path)}
    assert [(row["line"], row["reason"]) for row in listed] == [
        (3, "unreadable row"),
        (4, "empty text"),
        (5, "identical pair"),
        (6, "wrong type"),
        (7, "non-finite number"),
    ]
    assert listed[0]["row_id"] == "pairs.jsonl:3"
    assert len(loaded.train) == 2
    assert "quarantine.jsonl" in "\n".join(loaded.report.lines())


def test_too_many_bad_rows_stop_the_run_and_are_still_listed(load, write_rows, make_rows, tmp_path):
    path = write_rows("pairs.jsonl", [*make_rows(95), *BAD_ROWS])
    with pytest.raises(DataError) as caught:
        load([path], quarantine_max_share=0.04)
    message = str(caught.value)
    assert "5 of 100 rows are bad (5.0%; allowed: 4.0%)" in message
    assert "1 x identical pair" in message
    assert "pairs.jsonl:96: unreadable row: not JSON" in message
    assert str(tmp_path / "run" / "quarantine.jsonl") in message
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 5
    assert len(load([path], quarantine_max_share=0.05).train) == 95


def test_bad_eval_rows_are_not_hidden_by_many_good_training_rows(load, write_rows, make_rows):
    train = write_rows("train.jsonl", make_rows(1000))
    evals = write_rows("eval.jsonl", [*make_rows(5, word="rain"), *BAD_ROWS])
    with pytest.raises(DataError, match=r"data\.eval: 5 of 10 rows are bad"):
        load([train], eval=(str(evals),), quarantine_max_share=0.05)


def test_a_template_that_refuses_rows_puts_them_in_quarantine(load, write_rows, make_rows):
    template = (
        "{% for m in messages %}{% if 'question 1' in m['content'] %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['content'] }}|{% endfor %}"
    )
    loaded = load([write_rows("pairs.jsonl", make_rows(3))], template=template, quarantine_max_share=0.5)
    assert loaded.report.sources[0].bad == {"template fault": 1}
    assert row_ids(loaded.train) == ["pairs.jsonl:1", "pairs.jsonl:3"]


def test_a_source_without_usable_rows_stops_the_run(load, write_rows, make_rows):
    good = write_rows("good.jsonl", make_rows(100))
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows"):
        load([good, write_rows("empty.jsonl", [])])
    with pytest.raises(DataError, match=r"bad\.jsonl has no usable pair\n  1 x wrong type"):
        load([good, write_rows("bad.jsonl", ['"text"'])], quarantine_max_share=0.9)


def test_all_missing_files_are_reported_at_once_and_earlier_output_stays(load, write_rows, make_rows, tmp_path):
    train = write_rows("train.jsonl", [*make_rows(99), BAD_ROWS[0]])
    load([train])
    before = (tmp_path / "run" / "quarantine.jsonl").read_text()
    with pytest.raises(DataError, match=r"data\.train: .*trian\.jsonl(.|\n)*data\.eval: .*evil\.jsonl"):
        load([tmp_path / "trian.jsonl"], eval=(str(tmp_path / "evil.jsonl"),))
    assert (tmp_path / "run" / "quarantine.jsonl").read_text() == before


# ---------------------------------------------------------------------------------------------------- cache


def test_a_second_load_does_not_tokenize_again(load, write_rows, make_rows, count_tokenized, tmp_path):
    path = write_rows("pairs.jsonl", [*make_rows(20), *BAD_ROWS[:1]])
    first = load([path], quarantine_max_share=0.1)
    assert sum(count_tokenized) == 40
    count_tokenized.clear()
    renamed = path.rename(tmp_path / "renamed.jsonl")
    again = load([renamed], quarantine_max_share=0.1, seed=3, flip_labels=0.5)
    assert count_tokenized == []
    assert [part.cached for part in again.report.sources] == [True]
    assert again.report.sources[0].bad == first.report.sources[0].bad
    assert again.train.row_id(0) == "renamed.jsonl:1"
    assert '"file": "' + str(renamed) in (tmp_path / "run" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 300},
        {"over_length": "drop"},
        {"template": "chatml"},
        {"system_prompt": "x"},
        {"columns": ColumnConfig(margin="")},
    ],
)
def test_whatever_decides_on_tokens_makes_another_cache_entry(load, write_rows, make_rows, count_tokenized, change):
    path = write_rows("pairs.jsonl", make_rows(3))
    load([path])
    load([path], **change)
    assert count_tokenized == [6, 6]


def test_another_tokenizer_or_content_makes_another_cache_entry(
    load, write_rows, make_rows, count_tokenized, base_tokenizer
):
    path = write_rows("pairs.jsonl", make_rows(3))
    load([path], template="plain")
    load([path], template="plain", reader=base_tokenizer)
    write_rows("pairs.jsonl", make_rows(4))
    load([path], template="plain")
    assert count_tokenized == [6, 6, 8]


@pytest.mark.parametrize("name", ["tokens.bin", "rows.npy", "bad.jsonl", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "lost"])
def test_a_damaged_cache_entry_is_made_again_with_a_message(load, write_rows, make_rows, tmp_path, name, damage):
    path = write_rows("pairs.jsonl", [*make_rows(20), BAD_ROWS[0]])
    before = load([path], quarantine_max_share=0.1)
    file = next((tmp_path / "cache").iterdir()) / name
    whole = file.read_bytes()
    broken = {"cut": whole[:-3], "changed": whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]}
    file.unlink()
    if damage in broken:
        file.write_bytes(broken[damage])
    after = load([path], quarantine_max_share=0.1)
    assert "were damaged and have been made again" in "\n".join(after.report.lines())
    assert file.read_bytes() == whole
    assert after.train.fingerprint == before.train.fingerprint


def test_tokens_that_another_process_has_put_there_meanwhile_stay(load, write_rows, make_rows, monkeypatch, tmp_path):
    """Two containers on one cache: the slower one must not take away what the other is reading."""
    path, fill, found = write_rows("pairs.jsonl", make_rows(3)), tokenizing._fill, []

    def overtaken(*arguments):
        fill(*arguments)
        if not found:
            found.append(None)
            load([path])
            (folder,) = (tmp_path / "cache").glob("[!.]*")
            found[0] = folder, folder.stat().st_ino

    monkeypatch.setattr(tokenizing, "_fill", overtaken)
    assert len(load([path]).train) == 3
    folder, number = found[0]
    assert folder.stat().st_ino == number and [*(tmp_path / "cache").iterdir()] == [folder]


def test_a_killed_tokenization_leaves_nothing_that_looks_finished(load, write_rows, make_rows, monkeypatch, tmp_path):
    path = write_rows("pairs.jsonl", make_rows(3))

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "_add_chunk", killed)
        with pytest.raises(KeyboardInterrupt):
            load([path])
    assert len(load([path]).train) == 3


def test_a_cache_that_cannot_be_written_is_named(write_rows, make_rows, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    config = DataConfig(train=str(write_rows("pairs.jsonl", make_rows(3))), cache_dir=tmp_path / "file" / "x")
    with pytest.raises(DataError, match=r"file/x: tokens cannot be kept here .* set data\.cache_dir"):
        load_preferences(config, chat_format(tokenizer, None))


# ------------------------------------------------------------------------------------ splitting and mixing


def test_held_out_prompts_are_never_trained_on_whichever_source_they_come_from(load, write_rows, make_rows):
    one = write_rows("one.jsonl", make_rows(60, prompts=20))
    two = write_rows("two.jsonl", make_rows(40, prompts=40))
    loaded = load([one, two], eval_share=0.2)
    assert len(loaded.evals) + len(loaded.train) == 100
    assert 20 <= len(loaded.evals) <= 24
    assert loaded.report.held_out_prompts == len(np.unique(loaded.evals.prompt_keys))
    assert not np.intersect1d(loaded.train.prompt_keys, loaded.evals.prompt_keys).size
    assert set(loaded.evals.source_index.tolist()) == {0, 1}


def test_the_held_out_prompts_depend_on_the_seed_and_hardly_on_added_data(load, write_rows, make_rows):
    one = write_rows("one.jsonl", make_rows(200))
    more = write_rows("more.jsonl", make_rows(210))
    held_out = [
        set(load([path], eval_share=0.2, seed=seed).evals.prompt_keys.tolist())
        for path, seed in [(one, 0), (one, 0), (one, 1), (more, 0)]
    ]
    assert held_out[0] == held_out[1]
    assert len(held_out[0] & held_out[2]) < 20
    assert len(held_out[0] & held_out[3]) > 35


def test_one_prompt_cannot_be_split(load, write_rows, make_rows):
    path = write_rows("one.jsonl", make_rows(10, prompts=1))
    with pytest.raises(DataError, match="all training pairs share one prompt"):
        load([path], eval_share=0.1)
    assert len(load([path], eval_share=0.0).evals) == 0


def test_two_prompts_leave_one_to_train_on(load, write_rows, make_rows):
    loaded = load([write_rows("two.jsonl", make_rows(10, prompts=2))], eval_share=0.9)
    assert (len(loaded.train), len(loaded.evals)) == (5, 5)


def test_prompts_in_both_given_sets_are_counted_in_a_warning(load, write_rows, make_rows):
    train = write_rows("train.jsonl", make_rows(20))
    evals = write_rows("eval.jsonl", [*make_rows(30)[17:], *make_rows(5, word="rain")])
    loaded = load([train], eval=(str(evals),))
    assert loaded.report.shared_prompts == 3
    assert "warning: 3 prompts of the eval sources are also trained on" in loaded.report.lines()
    assert loaded.report.held_out_prompts is None
    assert (len(loaded.train), len(loaded.evals)) == (20, 18)


def test_weights_repeat_and_sample_whole_sources(load, write_rows, make_rows):
    paths = [str(write_rows(f"{word}.jsonl", make_rows(20, word=word))) for word in ("tea", "rain", "sun")]
    sources = [SourceConfig(path=path, weight=w) for path, w in zip(paths, (2.5, 0.25, 1), strict=True)]
    data = load(sources).train
    assert np.bincount(data.source_index).tolist() == [50, 5, 20]
    ids = row_ids(data)
    assert {ids.count(f"tea.jsonl:{line}") for line in range(1, 21)} == {2, 3}
    assert len({row for row in ids if row.startswith("rain")}) == 5


def test_a_smaller_training_sample_is_part_of_a_larger_one(load, write_rows, make_rows):
    path = write_rows("pairs.jsonl", make_rows(50))
    small, large = (row_ids(load([path], max_train_pairs=count).train) for count in (10, 30))
    assert (len(small), len(large)) == (10, 30)
    assert set(small) < set(large)
    assert small == sorted(small, key=lambda row: int(row.split(":")[1]))
    assert set(row_ids(load([path], max_train_pairs=10, seed=1).train)) != set(small)


def test_eval_pairs_can_be_limited(load, write_rows, make_rows):
    train, evals = (
        write_rows("train.jsonl", make_rows(50)),
        write_rows("eval.jsonl", make_rows(50, word="rain")),
    )
    assert len(load([train], eval=(str(evals),), max_eval_pairs=7).evals) == 7
    held_out = load([train], eval_share=0.5, max_eval_pairs=7)
    assert (len(held_out.train), len(held_out.evals)) == (43, 7)


def test_flipping_swaps_the_answers_and_nothing_else(load, write_rows, make_rows):
    path = write_rows("pairs.jsonl", make_rows(50))
    plain, noisy = load([path]).train, load([path], flip_labels=0.2).train
    assert noisy.flipped.sum() == 10
    assert not plain.flipped.any()
    for index in range(50):
        before, after = plain.pair(index), noisy.pair(index)
        swapped = (before.rejected, before.chosen) if noisy.flipped[index] else (before.chosen, before.rejected)
        np.testing.assert_array_equal(after.chosen, swapped[0])
        np.testing.assert_array_equal(after.rejected, swapped[1])
        assert noisy.lengths[index].tolist() == [len(after.chosen), len(after.rejected)]
        assert (after.margin, after.chosen_score) == (before.margin, before.chosen_score)


def test_a_flipped_pair_brings_the_response_starts_of_its_sides(load, write_rows, base_tokenizer):
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %} {% endif %}{% endfor %}"
    rows = [{"prompt": "this", "chosen": "question", "rejected": "! question"}]
    path = write_rows("pairs.jsonl", rows * 4)
    options = {"template": template, "reader": base_tokenizer}
    plain = load([path], **options).train.pair(0)
    noisy = load([path], flip_labels=0.9, **options).train
    assert plain.chosen_response_start != plain.rejected_response_start
    flipped = noisy.pair(int(np.flatnonzero(noisy.flipped)[0]))
    assert flipped.chosen_response_start == plain.rejected_response_start
    assert flipped.rejected_response_start == plain.chosen_response_start


def test_eval_pairs_are_never_flipped_and_repeats_of_a_pair_agree(load, write_rows, make_rows):
    path = write_rows("pairs.jsonl", make_rows(50))
    loaded = load([SourceConfig(path=str(path), weight=3)], flip_labels=0.3, eval_share=0.2)
    assert not loaded.evals.flipped.any()
    labels = {}
    for row, flipped in zip(row_ids(loaded.train), loaded.train.flipped, strict=True):
        labels.setdefault(row, set()).add(bool(flipped))
    assert len(labels) == 40
    assert all(len(found) == 1 for found in labels.values())
    assert sum(True in found for found in labels.values()) == 12


def test_the_fingerprint_names_tokens_order_and_flips(load, write_rows, make_rows, tmp_path):
    path = write_rows("pairs.jsonl", make_rows(30))
    evals = write_rows("eval.jsonl", make_rows(5, word="rain"))
    same = [load([path]), load([path], eval=(str(evals),)), load([path], quarantine_max_share=0.5)]
    assert len({loaded.train.fingerprint for loaded in same}) == 1
    others = [{"flip_labels": 0.1}, {"max_train_pairs": 20}, {"template": "chatml"}, {"eval_share": 0.1}]
    assert len({load([path], **other).train.fingerprint for other in others} | {same[0].train.fingerprint}) == 5


def test_row_ids_of_files_with_one_name_stay_apart(load, write_rows, make_rows):
    one, two = (
        write_rows("1/pairs.jsonl", make_rows(2)),
        write_rows("2/pairs.jsonl", make_rows(2, word="rain")),
    )
    assert row_ids(load([one, two]).train) == [f"{folder}/pairs.jsonl:{n}" for folder in (1, 2) for n in (1, 2)]


def test_the_report_counts_what_was_loaded_flipped_and_left_out(load, write_rows, make_rows):
    report = load([write_rows("pairs.jsonl", [*make_rows(99), BAD_ROWS[1]])], flip_labels=0.1).report
    assert (report.train_items, report.flipped, report.sources[0].bad) == (99, 10, {"empty text": 1})
    assert "100 rows (99 prompt text), 99 pairs, 1 bad: empty text" in report.lines()[1]


# ------------------------------------------------------------------------------------------------ real data


def test_the_alpaca_pairs_load_split_by_prompt(load, real_data):
    loaded = load([real_data("alpaca_eval_pairs_id_test.jsonl.gz")], eval_share=0.1, max_tokens=4096)
    source = loaded.report.sources[0]
    assert (source.rows, source.items, source.shapes) == (324, 324, {"prompt messages": 324})
    assert len(loaded.train) + len(loaded.evals) == 324
    assert not np.intersect1d(loaded.train.prompt_keys, loaded.evals.prompt_keys).size
    assert (loaded.train.scores[:, 0] > loaded.train.scores[:, 1]).all()


def test_pairs_with_close_scores_are_passed_over_in_training_alone(load, write_rows):
    rows = [
        {"prompt": f"p {n}", "chosen": "good", "rejected": "bad", "chosen_score": n / 10, "rejected_score": 0}
        for n in range(10)
    ]
    path = write_rows("pairs.jsonl", rows)
    loaded = load([path], eval=(str(path),), min_score_gap=0.45)
    assert sorted(loaded.train.scores[:, 0].tolist()) == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert len(loaded.evals) == 10
    assert "5 training pairs have scores closer than data.min_score_gap" in loaded.report.lines()
    unscored = write_rows("plain.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}] * 2)
    with pytest.raises(DataError, match="2 training pairs have no scores"):
        load([unscored], min_score_gap=0.45, eval_share=0)


# ------------------------------------------------------------------------------------------ the data's margins


def test_margins_belong_to_their_own_pair_whatever_its_neighbors_have(load, write_rows, make_rows):
    rows = make_rows(6)
    del rows[2]["margin"]
    data = load([write_rows("pairs.jsonl", rows)], eval_share=0.0).train
    assert [data.item(index).margin for index in range(6)] == [0.0, 0.25, None, 0.75, 1.0, 1.25]
    with pytest.raises(DataError, match=r"1 of 6 training pairs have neither a margin nor.* such as pairs\.jsonl:3"):
        data.refuse_missing_margins()
    plan = MicroBatchPlan((1, 2, 3), ((0, 1, 2, 3, 4, 5),), 0)
    margins = collate(data, np.arange(6), plan, 1).margins
    np.testing.assert_array_equal(margins.numpy(), np.array([0.25, np.nan, 0.75], np.float32))


def test_scores_stand_in_for_margins_only_where_no_pair_has_one(load, write_rows, make_rows):
    rows = [{key: value for key, value in row.items() if key != "margin"} for row in make_rows(4)]
    data = load([write_rows("pairs.jsonl", rows)], eval_share=0.0).train
    data.refuse_missing_margins()
    assert [data.item(index).margin for index in range(4)] == pytest.approx([0.65] * 4)


def test_a_row_of_several_bad_pairs_is_one_bad_row(load, write_rows, make_rows):
    long = "a very long answer " * 40
    row = {"prompt": "why?", "chosen": [long + "x", long + "y"], "rejected": [long, long + "z", long + "q"]}
    path = write_rows("several.jsonl", [*make_rows(3), row])
    with pytest.raises(DataError, match=r"1 of 4 rows are bad \(25.0%") as caught:
        load([path], max_tokens=100, over_length="truncate_prompt_left", quarantine_max_share=0.1)
    assert "  1 x response too long" in str(caught.value)
    report = load([path], max_tokens=100, over_length="truncate_prompt_left", quarantine_max_share=0.5).report.sources[
        0
    ]
    assert report.bad == {"response too long": 1}
