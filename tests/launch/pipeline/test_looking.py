"""Looking writes nothing, needs no right to write, and what is not permitted is one line."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch import stages
from launch.cli import main
from rlhf.core.files import naming_disk_faults


def content(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("words", [["status"], ["run", "--dry-run"]])
def test_who_looks_at_a_pipeline_writes_nothing(toys, monkeypatch, words):
    data = toys.folder / "rows.jsonl"
    data.write_text("1")
    toys.write({"a": {"set": {"data": str(data)}}, "b": {"set": {"source": "${stages.a.final}"}}})
    before = content(toys.folder)
    assert main(["pipeline", *words, str(toys.path)]) == 0
    assert content(toys.folder) == before
    assert toys.run() == 0
    data.write_text("2")  # so that there is something to remember
    before = content(toys.folder)
    assert main(["pipeline", *words, str(toys.path)]) == 0
    assert content(toys.folder) == before


def test_a_dry_run_names_what_no_stage_makes_and_is_not_there(toys, capsys, monkeypatch):
    reading = replace(stages.STAGES["toy"], reads={"data": stages.FILE, "source": stages.FOLDER})
    monkeypatch.setitem(stages.STAGES, "toy", reading)
    data = toys.folder / "rows.jsonl"
    second = {"source": "${stages.a.final}", "data": str(toys.path)}
    toys.write({"a": {"set": {"data": str(data)}}, "b": {"set": second}})
    look = ["pipeline", "run", "--dry-run", str(toys.path)]
    assert main(look) == 2
    said = capsys.readouterr()
    assert "waiting" in said.out and f"a.data: {data}: no such file" in said.err and said.err.count("\n") == 1
    assert main([*look, "--only", "b"]) == main([*look, "--no-doctor"]) == main(["pipeline", "status", look[-1]]) == 0
    data.write_text("1")
    assert main(look) == 0


@pytest.mark.parametrize("folder", ["/sys/kernel/run", "/proc/1/run"])
def test_an_output_that_may_not_be_written_to_is_one_line(toys, capsys, folder):
    toys.write({"a": {}}, output=folder)
    assert main(["pipeline", "run", str(toys.path), "--no-doctor", "--ranks", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"output = {folder}: cannot be written to: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "name", "said"),
    [
        (13, "/home/her/run/a/config.yaml", "/home/her/run/a/config.yaml: Permission denied"),
        (30, "scores/.x.jsonl.tmp-12-00ff00ff", "scores: Read-only file system"),
        (1, ".run.old-7-0123abcd", ".: Operation not permitted"),
    ],
)
def test_what_this_user_may_not_do_is_one_line(toys, capsys, monkeypatch, number, name, said):
    """A folder of a colleague, or of a mount for reading: names that only last for a moment say nothing."""
    toys.write({"a": {}})

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr("launch.pipeline.overview.status_table", refuse)
    assert main(["pipeline", "status", str(toys.path)]) == 2
    assert capsys.readouterr().err == f"{said}\n"


def test_a_file_that_a_run_may_not_write_is_named(tmp_path):
    with pytest.raises(Exception, match=r"^/sys/kernel/x: .*; mend the rights"), naming_disk_faults(tmp_path):
        Path("/sys/kernel/x").write_text("")
