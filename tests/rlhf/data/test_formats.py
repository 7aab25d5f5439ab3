"""Files as they come: packed, mislabeled, wrapped, empty; they are read, or the cause is named."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.core.errors import DataError
from rlhf.data.messages import BadRow
from rlhf.data.options import ColumnConfig, RowSource, SourceConfig
from rlhf.data.records import to_records
from rlhf.data.sources import open_source

ROWS = [{"prompt": f"question {number}", "chosen": "täa", "rejected": "b"} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = "prompt,chosen,rejected\n" + "".join(f"question {number},täa,b\n" for number in range(3))


def zst(content):
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def rows_of(path):
    return [row.value for row in open_source(SourceConfig(path=str(path))).rows()]


@pytest.mark.parametrize("packed", PACKERS)
def test_packed_files_are_read_by_their_name_and_without_it(tmp_path, packed):
    for name, content in (("x.jsonl", LINES), ("x.csv", CSV.encode()), ("x.json", json.dumps(ROWS).encode())):
        for path in (tmp_path / f"{name}{packed}", tmp_path / name):
            path.write_bytes(PACKERS[packed](content))
            assert rows_of(path) == ROWS


@pytest.mark.parametrize("packed", PACKERS)
def test_a_packed_file_that_is_none_or_is_cut_short_is_named(tmp_path, packed):
    path = tmp_path / f"x.jsonl{packed}"
    path.write_bytes(LINES)
    with pytest.raises(DataError, match=rf"x\.jsonl\{packed}: .* not packed: it does not begin as \{packed} files do"):
        rows_of(path)
    path.write_bytes(PACKERS[packed](LINES * 200)[:-20])
    with pytest.raises(DataError, match=rf"x\.jsonl\{packed}: the compressed file is damaged or cut short"):
        rows_of(path)


def test_tabs_separate_the_cells_of_a_tsv_file(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text(CSV.replace(",", "\t"))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("x.csv", CSV.replace(",", ";").encode(), "separated by semicolons, expected commas"),
        ("x.csv", CSV.replace(",", "\t").encode(), r"separated by tabs, expected commas; name it \.tsv"),
        ("x.tsv", CSV.encode(), r"separated by commas, expected tabs; name it \.csv"),
        ("x.jsonl", LINES.decode().encode("utf-16"), "UTF-16; make it UTF-8"),
        ("x.csv", CSV.encode("utf-16-le"), "UTF-16 without its mark"),
        ("x.json", json.dumps(ROWS).encode("utf-16-be"), "UTF-16 without its mark"),
        ("x.json", json.dumps({"version": 1, "data": ROWS}).encode(), r"they stand in 'data'.*jq '\.data'"),
        ("x.json", json.dumps({"made": {"by": "me"}, "pairs": ROWS}, indent=1).encode(), "they stand in 'pairs'"),
        ("x.json", json.dumps({"prompt": ["a", "b"], "chosen": ["c", "d"]}).encode(), "an object of columns"),
        ("x.json", json.dumps({"prompt": {"0": "a"}, "chosen": {"0": "c"}}).encode(), "an object of columns"),
        ("x.json", "".join(json.dumps(row, indent=1) + "\n" for row in ROWS).encode(), "objects take several lines"),
        ("x.jsonl", "".join(json.dumps(row, indent=1) + "\n" for row in ROWS).encode(), "an object takes several"),
        ("x.jsonl", json.dumps(ROWS).encode(), r"one JSON array; name it \.json"),
        ("x.jsonl", json.dumps(ROWS, indent=1).encode(), r"one JSON array; name it \.json"),
        ("x.jsonl", b"PAR1" + b"x" * 50, r"a parquet file; name it \.parquet"),
        ("x.csv", b"PK\x03\x04" + b"x" * 50, "a zip archive or a spreadsheet"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("x.parquet", b"", "the file is empty"),
        ("x.arrow", b"", "the file is empty"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_the_cause(tmp_path, name, content, cause):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: (.|\n)*{cause}"):
        rows_of(path)


def test_a_single_row_in_a_json_file_is_a_row(tmp_path):
    path = tmp_path / "x.json"
    messages = [{"role": "user", "content": "rain?"}, {"role": "assistant", "content": "Yes."}]
    for row in (ROWS[0], {"messages": messages}, {"conversations": messages, "id": 1, "source": "x", "n": 0}):
        path.write_text(json.dumps(row))
        assert rows_of(path) == [row]


def test_tables_are_read_without_the_datasets_library(tmp_path):
    expected = [{"chosen": [{"role": "assistant", "content": "a"}], "n": 1}, {"chosen": None, "n": None}]
    table = pyarrow.Table.from_pylist(expected)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    for name, start in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with start(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for path in tmp_path.iterdir():
        assert rows_of(path) == expected


# ------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    """A function that fills a folder with one row in every file of these names."""

    def fill(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"file": name}) + "\n")
        return tmp_path / "data"

    return fill


def files_of(folder, **options):
    return [row.value["file"] for row in open_source(SourceConfig(path=str(folder), **options)).rows()]


def test_a_split_is_known_by_its_whole_name(folder):
    names = [f"{split}-00000-of-00001.jsonl" for split in ("train_prefs", "train_sft", "test_prefs")]
    path = folder(*names)
    assert files_of(path, split="train_prefs") == names[:1]
    assert files_of(path, split="test_prefs") == names[2:]
    with pytest.raises(DataError, match=r"several splits begin with 'train' \(train_prefs, train_sft\); set split"):
        files_of(path)
    with pytest.raises(DataError, match="there is no split 'train'; set split to one of: test_prefs, train_prefs"):
        files_of(path, split="train")


def test_shards_of_the_only_training_split_are_read_together(folder):
    names = ["train_prefs-00000-of-00002.jsonl", "train_prefs-00001-of-00002.jsonl"]
    assert files_of(folder(*names, "test_prefs-00000-of-00001.jsonl")) == names


def test_a_split_of_any_name_can_be_asked_for_and_one_that_is_nowhere_is_refused(folder):
    path = folder("raw-00000-of-00001.jsonl", "filtered-00000-of-00001.jsonl")
    assert files_of(path, split="raw") == ["raw-00000-of-00001.jsonl"]
    for split in (None, "nonsense"):
        with pytest.raises(DataError, match="set split to one of: filtered, raw"):
            files_of(path, split=split)


def test_a_split_is_refused_where_no_file_is_named_after_one(folder):
    path = folder("a.jsonl", "b.jsonl")
    assert files_of(path) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="there is no split 'test': no file or folder in it is named so"):
        files_of(path, split="test")
    with pytest.raises(DataError, match="there is no split 'test' in a single file"):
        files_of(path / "a.jsonl", split="test")
    with pytest.raises(DataError, match="a pattern names its files itself"):
        files_of(path / "*.jsonl", split="test")


def test_held_out_data_alone_is_not_taken_for_training_data(folder):
    path = folder("test-00000-of-00001.jsonl")
    with pytest.raises(DataError, match="there is no split 'train'; set split to one of: test"):
        files_of(path)
    assert files_of(path, split="test") == ["test-00000-of-00001.jsonl"]


def test_files_and_splits_that_are_not_read_are_named(folder):
    path = folder("train/a.jsonl", "train/b.txt", "test/c.jsonl", "README.md", "train/.hidden", "d.xlsx")
    source = open_source(SourceConfig(path=str(path)))
    assert [row.value["file"] for row in source.rows()] == ["train/a.jsonl"]
    assert source.notices == (
        "note: files that are not read: d.xlsx, train/b.txt",
        "note: splits that are not read: test",
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl", "rows.csv"])
@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (POINTER, "pointer of a file in Git LFS"),
        (b"<!DOCTYPE html><html>", "page of HTML"),
        (b"<html>\n", "page of HTML"),
        (b"PK\x03\x04rest", "zip archive"),
    ],
)
def test_a_file_of_another_kind_is_named_whatever_it_is_called(tmp_path, name, start, kind):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(DataError, match=rf"{name}: expected .*, but the file is .*{kind}"):
        list(open_source(RowSource(path=str(tmp_path / name))).rows())


def test_links_to_nothing_are_named_alone_and_in_a_folder(tmp_path):
    """As in a folder of the hub's cache of which not all has been downloaded."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    for name in ("more.parquet", "rest.parquet"):
        (tmp_path / name).symlink_to(f"blobs/{name}")
    with pytest.raises(DataError, match=r"more\.parquet: a link to blobs/more\.parquet, which is not there"):
        open_source(RowSource(path=str(tmp_path / "more.parquet")))
    with pytest.raises(DataError, match=r"\.parquet: a link to blobs/.*, which is not there, nor are those of 1 more"):
        open_source(RowSource(path=str(tmp_path)))


def test_decimals_of_a_table_are_numbers(tmp_path):
    table = pyarrow.Table.from_pylist([{"prompt": "a", "chosen": "b", "rejected": "c", "margin": Decimal("1.5")}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    [row] = open_source(RowSource(path=str(tmp_path / "rows.parquet"))).rows()
    [record], _ = to_records(row.value, ColumnConfig(), row_id="x:1", source="x")
    assert record.margin == 1.5
    with pytest.raises(BadRow, match=r"non-finite number: margin is 10{39}$"):
        to_records({**row.value, "margin": 10**400}, ColumnConfig(), row_id="x:1", source="x")


def tar(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("rows.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (tar(LINES), "a tar archive; unpack it"),
        (gzip.compress(tar(LINES)), "a tar archive; unpack it"),
        (b"\x04\x22\x4d\x18\x64\x40\xa7" + LINES, "packed by lz4"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7-Zip archive"),
        (b"SQLite format 3\x00", "a database of SQLite"),
        (pickle.dumps(ROWS), "a pickle of Python"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.json"])
def test_files_of_other_kinds_are_named_whatever_they_are_called(tmp_path, content, named, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: expected text in UTF-8, but the file is {named}"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize(
    "doubled",
    ['{"prompt": "q", "chosen": "a", "chosen": "b"}', '{"prompt": [{"role": "a", "content": "", "role": "b"}]}'],
)
def test_a_key_that_stands_twice_makes_a_bad_row(tmp_path, doubled):
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES + doubled.encode() + b"\n")
    *good, bad = open_source(SourceConfig(path=str(path))).rows()
    assert [row.value for row in good] == ROWS
    assert re.fullmatch(r"the key '(chosen|role)' stands twice in an object", bad.fault)
    path = tmp_path / "x.json"
    path.write_text(f"[{doubled}]")
    with pytest.raises(DataError, match=r"x\.json: not a valid JSON array \(the key '\w+' stands twice in an object\)"):
        rows_of(path)


def test_a_column_that_stands_twice_is_refused_and_one_without_a_name_is_not(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,chosen,chosen\na,b,c\n")
    with pytest.raises(DataError, match=r"x\.csv: there are two columns 'chosen'; rename one"):
        rows_of(path)
    path.write_text("prompt,chosen,,\na,b,,\n")
    assert rows_of(path) == [{"prompt": "a", "chosen": "b", "": ""}]


def test_lines_that_end_as_on_old_macs_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES.replace(b"\n", b"\r"))
    with pytest.raises(DataError, match=r"x\.jsonl: its lines end with CR alone"):
        rows_of(path)
    path.write_bytes(LINES.replace(b"\n", b"\r\n"))
    assert rows_of(path) == ROWS
    path.write_bytes(LINES.splitlines()[0] + b"\r")  # one row
    assert rows_of(path) == ROWS[:1]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path, name):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "chosen", "chosen"])
    if name == "x.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.OSFile(str(tmp_path / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(DataError, match=rf"{name}: there are two columns 'chosen'"):
        rows_of(tmp_path / name)
