"""Looking writes nothing, needs no right to write, and what is not permitted is one line."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize("folder", ["/sys/kernel/run", "/proc/1/run"])
def test_an_output_that_may_not_be_written_to_is_one_line(toys, capsys, folder):
    toys.write({"a": {}}, output=folder)
    assert main(["pipeline", "run", str(toys.path), "--no-doctor", "--ranks", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"output = {folder}: cannot be written to: ") and said.count("\n") == 1


def test_a_folder_of_a_colleague_is_one_line(toys, capsys, monkeypatch):
    toys.write({"a": {}})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/home/her/run/a/config.yaml")

    monkeypatch.setattr("launch.pipeline.overview.status_table", refuse)
    assert main(["pipeline", "status", str(toys.path)]) == 2
    assert capsys.readouterr().err == "/home/her/run/a/config.yaml: Permission denied\n"


def test_a_file_that_a_run_may_not_write_is_named(tmp_path):
    with pytest.raises(Exception, match=r"^/sys/kernel/x: .*; mend the rights"), naming_disk_faults(tmp_path):
        Path("/sys/kernel/x").write_text("")
