"""Files of benchmarks in their published formats; texts are made up."""

import gzip
import json
import os
from pathlib import Path

import pytest

from reward.benchmarks.items import read_items
from rlhf.core.errors import DataError
from rlhf.data.options import ColumnConfig

DATA = Path(os.environ.get("MARGIN_RLHF_DATA", Path(__file__).parents[3].parent / "shared" / "data"))

ROWS = {
    "rewardbench": {"id": 7, "prompt": "Say hi.", "chosen": "hi", "rejected": "no", "subset": "donotanswer"},
    "rewardbench2": {
        "id": "tied:3",
        "prompt": "A color?",
        "chosen": ["red", "blue"],
        "rejected": ["dog", "cat", "cow"],
        "num_correct": 2,
        "subset": "Ties",
    },
    "rm-bench": {
        "id": "a",
        "subset": "safety",
        "prompt": "Why?",
        "chosen": ["so", "so it is", "* so"],
        "rejected": ["no", "no it is", "* no"],
        "domain": "safety-refuse",
    },
    "judgebench": {
        "pair_id": "p",
        "source": "mmlu-pro-law",
        "question": "2 + 2?",
        "response_A": "5",
        "response_B": "4",
        "label": "B>A",
    },
    "ppe": {"question_id": "q", "prompt": "Hello", "response_1": "bah", "response_2": "hello", "winner": "model_b"},
    "pairs": {"prompt": "Say hi.", "chosen": "hi", "rejected": "no"},
    "hh": {
        "chosen": "\n\nHuman: Say hi.\n\nAssistant: hi",
        "rejected": "\n\nHuman: Say hi.\n\nAssistant: no",
    },
}


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(name, folder, *rows, **columns):
    items, note = read_items(name, write(folder, *rows), None, ColumnConfig(**columns))
    return items, note


def texts(item):
    return [answer[-1]["content"] for answer in item.answers]


@pytest.mark.parametrize(
    ("name", "identity", "subset", "answers", "right"),
    [
        ("rewardbench", "7", "donotanswer", ["hi", "no"], 1),
        ("rewardbench2", "tied:3", "Ties", ["red", "blue", "dog", "cat", "cow"], 2),
        ("rm-bench", "a", "safety", ["so", "so it is", "* so", "no", "no it is", "* no"], 3),
        ("judgebench", "p", "knowledge", ["4", "5"], 1),
        ("ppe", "q", "all", ["hello", "bah"], 1),
    ],
)
def test_a_row_is_a_prompt_with_its_right_answers_first(tmp_path, name, identity, subset, answers, right):
    (item,), note = read(name, tmp_path, ROWS[name])
    assert (item.id, item.subset, texts(item), item.right, note) == (identity, subset, answers, right, "")
    prompt = ROWS[name].get("prompt", ROWS[name].get("question"))
    assert [dict(message) for message in item.prompt] == [{"role": "user", "content": prompt}]
    assert all(answer[-1]["role"] == "assistant" for answer in item.answers)


@pytest.mark.parametrize("name", ["pairs", "hh"])
def test_pairs_are_read_as_for_training_and_named_by_their_line(tmp_path, name):
    items, _ = read(name, tmp_path, ROWS[name], {**ROWS[name]})
    assert [(item.id, texts(item)) for item in items] == [
        ("rows.jsonl:1", ["hi", "no"]),
        ("rows.jsonl:2", ["hi", "no"]),
    ]


def test_a_column_of_pairs_names_their_subset(tmp_path):
    items, _ = read("pairs", tmp_path, {**ROWS["pairs"], "kind": "greeting"}, group="kind")
    assert items[0].subset == "greeting"


@pytest.mark.parametrize(
    ("row", "annotated"),
    [
        ({"chosen": "a", "rejected": "b", "chosen_score": 4, "rejected_score": 1.5}, (4.0, 1.5)),
        ({"chosen": "a", "rejected": "b"}, None),
        (
            {"answers": [{"text": "b", "score": 2}, {"text": "a", "score": 9}, {"text": "c", "score": 3}]},
            (9.0, 2.0, 3.0),
        ),
        ({"answers": [{"text": "b", "rank": 2}, {"text": "a", "rank": 1}]}, None),
    ],
)
def test_scores_of_an_annotator_stay_with_their_answers(tmp_path, row, annotated):
    ((item,), _) = read("pairs", tmp_path, {"prompt": "p", **row})
    assert item.annotated == annotated and texts(item)[: item.right] == ["a"]


def test_messages_are_prompts_and_answers_too(tmp_path):
    row = {
        **ROWS["rewardbench"],
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "chosen": [{"role": "assistant", "content": "yes"}],
    }
    (item,), _ = read("rewardbench", tmp_path, row)
    assert [message["content"] for message in item.prompt] == ["a", "b", "c"] and texts(item) == ["yes", "no"]


def test_ids_that_come_twice_are_told_apart(tmp_path):
    items, _ = read("rewardbench", tmp_path, ROWS["rewardbench"], {**ROWS["rewardbench"], "subset": "hep-go"})
    assert len({item.id for item in items}) == 2


def test_ties_of_people_do_not_count(tmp_path):
    items, note = read("ppe", tmp_path, ROWS["ppe"], {**ROWS["ppe"], "winner": "tie (bothbad)"})
    assert len(items) == 1 and note == ""


def test_many_answers_with_their_truth_are_ppe_as_well(tmp_path):
    row = {"question_id": 1, "prompt": "2 + 2?", "scores": [False, True, True]}
    (item,), _ = read("ppe", tmp_path, row | {f"response_{n}": str(n) for n in (1, 2, 3)})
    assert (texts(item), item.right) == (["2", "3", "1"], 2)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("rewardbench", {"subset": None}, r"subset is null.*a row of rewardbench has prompt, chosen"),
        ("rewardbench", {"prompt": 3}, r"prompt is a number \(3\), expected text or messages"),
        ("rewardbench2", {"rejected": []}, r"rejected is a list; expected text, or a list of texts"),
        ("rewardbench", {"chosen": ["a", "b", "c"]}, r"3 chosen and 1 rejected answers, expected one of each"),
        ("rewardbench2", {"subset": "Math"}, r"2 chosen and 3 rejected answers, expected 1 and 3"),
        ("rewardbench2", {"id": 4}, r"id = '4' of the subset Ties: expected ref:NUMBER"),
        ("rm-bench", {"chosen": ["one"]}, r"1 chosen and 3 rejected answers, expected 3 styles of each"),
        ("judgebench", {"label": "tie"}, r"label = 'tie', expected A>B or B>A"),
        ("ppe", {"winner": "me"}, r"winner = 'me', expected model_a, model_b or tie"),
    ],
)
def test_a_row_of_another_shape_is_named_with_file_line_and_what_was_expected(tmp_path, name, change, told):
    with pytest.raises(DataError, match=rf"rows\.jsonl.*rows\.jsonl:1: (?s:.*){told}"):
        read(name, tmp_path, ROWS[name] | change)
    with pytest.raises(DataError, match=r"1 of 3 rows are not as .* has them, and its numbers are those of all rows"):
        read(name, tmp_path, ROWS[name], ROWS[name] | change, ROWS[name])


def test_the_rows_of_another_benchmark_are_refused(tmp_path):
    for name in ROWS:
        for other in ROWS.keys() - {name, "pairs", "hh"}:
            with pytest.raises(DataError, match=f"is one of {other}"):
                read(other, tmp_path, ROWS[name])


def test_pairs_that_cannot_be_used_are_left_out_and_said(tmp_path):
    items, note = read("pairs", tmp_path, ROWS["pairs"], {**ROWS["pairs"], "rejected": "hi"})
    assert len(items) == 1
    assert "1 of 2 rows are not as pairs has them and were left out" in note and "rows.jsonl:2: identical pair" in note


def test_no_file_and_no_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="benchmark = pairs: set data to a file"):
        read_items("pairs", None, None, ColumnConfig())
    with pytest.raises(DataError, match="no rows"):
        read("pairs", tmp_path)


def test_published_files_are_read_whole():
    if not DATA.is_dir():
        pytest.skip(f"no published data: MARGIN_RLHF_DATA = {DATA}")
    items, note = read_items("rm-bench", str(DATA / "rm_bench_chat.json.gz"), None, ColumnConfig())
    assert (len(items), note, {item.right for item in items}) == (129, "", {3})
    path = DATA / "hh_harmless_base_test.jsonl.gz"
    items, note = read_items("hh", str(path), None, ColumnConfig())
    with gzip.open(path) as lines:
        count = sum(1 for _ in lines)
    assert 0.97 * count < len(items) <= count
    assert (len(items) < count) == bool(note)
