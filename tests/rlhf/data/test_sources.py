import gzip
import json

import datasets
import pytest

from rlhf.core.errors import DataError
from rlhf.data.options import SourceConfig
from rlhf.data.sources import open_source, row_names

ROWS = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
MESSAGES = [{"chosen": [{"role": "assistant", "content": f"c{n}"}]} for n in range(3)]


def read(path, **options):
    return list(open_source(SourceConfig(path=str(path), **options)).rows())


def values(path, **options):
    return [row.value for row in read(path, **options)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_json_lines_are_read_with_their_line_numbers(write_rows, name):
    path = write_rows(name, [ROWS[0], "", ROWS[1], ROWS[2]])
    assert [(row.line, row.value) for row in read(path)] == [(1, ROWS[0]), (3, ROWS[1]), (4, ROWS[2])]


def test_a_json_array_is_read_with_row_numbers(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + json.dumps(ROWS, indent=1))
    assert [(row.line, row.value) for row in read(path)] == list(enumerate(ROWS, start=1))


def test_mixed_types_and_broken_lines_spoil_their_own_row_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [b'{"chosen": 1}', b'{"chosen": "a"', b'{"chosen": "\xff"}', b'["list"]', b'{"chosen": "z"}']
    path.write_bytes(b"\n".join(lines))
    rows = read(path)
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1].fault.startswith("not JSON: Expecting ',' delimiter at column")
    assert rows[2].fault.startswith("not UTF-8")
    assert [row.fault for row in rows if row.line in (1, 4, 5)] == [None] * 3


def test_csv_rows_carry_the_line_where_they_begin(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'chosen,rejected\n"two\nlines",b\nonly one cell\n7,\xff\n"a, b",c\n')
    rows = read(path)
    assert [row.line for row in rows] == [2, 4, 5, 6]
    assert rows[0].value == {"chosen": "two\nlines", "rejected": "b"}
    assert rows[1].fault == "1 cells, but the header has 2"
    assert rows[2].fault == "not UTF-8"
    assert rows[3].value["chosen"] == "a, b"


def test_parquet_arrow_and_saved_folders_are_read_through_datasets(tmp_path):
    table = datasets.Dataset.from_list(MESSAGES)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (tmp_path / "rows.parquet", arrow, tmp_path / "saved", tmp_path / "splits"):
        assert [(row.line, row.value) for row in read(path)] == list(enumerate(MESSAGES, start=1))
    assert values(tmp_path / "splits", split="test") == MESSAGES[:1]


def test_a_folder_without_split_names_is_read_whole_in_order(write_rows):
    folder = write_rows("data/b.jsonl", ROWS[1:]).parent
    write_rows("data/a.jsonl.gz", ROWS[:1])
    write_rows("data/.hidden/c.jsonl", ROWS)
    (folder / "README.md").write_text("not rows")
    assert values(folder) == ROWS


def test_a_folder_with_split_names_gives_the_wanted_split_only(write_rows):
    folder = write_rows("data/train-00000-of-00001.jsonl", ROWS[:2]).parent
    write_rows("data/test-00000-of-00001.jsonl", ROWS[2:])
    assert values(folder) == ROWS[:2]
    assert values(folder, split="test") == ROWS[2:]
    with pytest.raises(DataError, match=r"no split 'dev'; set split to one of: test, train"):
        read(folder, split="dev")
    write_rows("data/more.jsonl", ROWS)
    with pytest.raises(DataError, match=r"named after a split, but more\.jsonl is not"):
        read(folder)


def test_a_glob_takes_what_matches(write_rows):
    folder = write_rows("a1.jsonl", ROWS[:1]).parent
    write_rows("a2.jsonl", ROWS[1:])
    write_rows("b.jsonl", ROWS)
    assert values(folder / "a*.jsonl") == ROWS
    with pytest.raises(DataError, match="no file matches"):
        read(folder / "c*.jsonl")


def test_a_missing_file_is_named_with_its_nearest_neighbor(write_rows):
    path = write_rows("pairs_train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"pair_train\.jsonl: no such file or folder; did you mean .*pairs_train"):
        read(path.with_name("pair_train.jsonl"))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        read(path.parent / "nowhere" / "x.jsonl")


def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match=r"rows\.txt: unknown kind of file; known are \.jsonl"):
        read(tmp_path / "rows.txt")


def test_an_unreachable_hub_name_says_that_both_places_were_tried(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'someone/pairs' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"no such local file or folder .* from the hub failed: ConnectionError"):
        read("someone/pairs")


def test_a_hub_dataset_is_asked_for_subset_and_split(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source(SourceConfig(path="someone/pairs", subset="small", split="test"))
    assert asked == [(("someone/pairs", "small"), {"split": "test"})]
    assert source.files == ("someone/pairs/small[test]",)
    assert [row.value for row in source.rows()] == ROWS


def test_damaged_files_are_named(tmp_path, write_rows):
    whole = write_rows("cut.jsonl.gz", [{"n": number} for number in range(1000)])
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: the compressed file is damaged or cut short"):
        read(whole)
    for name in ("plain.json.gz", "x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes(b"[] but not that format")
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)
    for content in ('[{"a": 1}, {"a": ]', "[" * 100_000 + "]" * 100_000):
        (tmp_path / "array.json").write_text(content)
        with pytest.raises(DataError, match=r"array\.json: not a valid JSON array .* save it as jsonl"):
            read(tmp_path / "array.json")


def test_the_digest_follows_the_content_and_not_the_name(write_rows):
    def digest(path):
        return open_source(SourceConfig(path=str(path))).digest()

    one, same, other = (
        write_rows(name, rows) for name, rows in [("a.jsonl", ROWS), ("b.jsonl", ROWS), ("c.jsonl", ROWS[:1])]
    )
    assert digest(one) == digest(same)
    assert digest(one) != digest(other)
    packed = one.with_name("a.jsonl.gz")
    packed.write_bytes(gzip.compress(one.read_bytes()))
    assert digest(packed) != digest(one)


def test_row_names_are_as_short_as_they_can_be():
    assert row_names(["/x/a.jsonl", "/x/b.jsonl", "/x/b.jsonl"]) == {
        "/x/a.jsonl": "a.jsonl",
        "/x/b.jsonl": "b.jsonl",
    }
    assert row_names(["/x/1/a.jsonl", "/x/2/a.jsonl"]) == {
        "/x/1/a.jsonl": "1/a.jsonl",
        "/x/2/a.jsonl": "2/a.jsonl",
    }
