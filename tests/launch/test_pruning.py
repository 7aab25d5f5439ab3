"""``rlhf prune``: what may go is shown, and goes only when asked; a live run and a published model are safe."""

import itertools
import os
from pathlib import Path

import pytest

from launch.cli import main
from launch.pruning import KINDS, find_needless
from launch.runs import NOTES, put_aside_from, put_aside_names
from rlhf.core.owner import owning


def put(path: Path, size: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


@pytest.fixture
def runs(tmp_path):
    """A pipeline: reward is finished and was done before, ppo is half done, and a process died while writing."""
    folder = tmp_path / "pipeline"
    for name in ("reward", "reward.before", "ppo"):
        put(folder / name / "config.yaml")
        put(folder / name / "checkpoints" / "step-00000003" / "weights.bin", 10_000)
    put(folder / "reward" / "done.json")
    put(folder / "reward" / "final" / "config.json")
    put(folder / "ppo" / ".final.tmp-12-00ff00ff" / "model.safetensors", 5_000)
    put(folder / "ppo" / ".status.json.tmp-12-00ff00ff", 10)
    put(tmp_path / "elsewhere" / "precious", 10)
    (folder / "reward" / "data").symlink_to(tmp_path / "elsewhere")
    return folder


def names(found, folder):
    return {str(each.path.relative_to(folder)): each.kind for each in found}


def test_what_may_go_is_found_by_kind(runs):
    found = find_needless(runs)
    assert names(found, runs) == {
        "ppo/.final.tmp-12-00ff00ff": "leftovers",
        "ppo/.status.json.tmp-12-00ff00ff": "leftovers",
        "reward.before": "before",
        "reward/checkpoints": "checkpoints",
    }
    assert {each.size for each in found} == {5_000, 10, 11_000, 10_000}
    assert names(find_needless(runs / "ppo"), runs / "ppo").keys() == {
        ".final.tmp-12-00ff00ff",
        ".status.json.tmp-12-00ff00ff",
    }


def test_nothing_goes_unasked(runs, capsys):
    before = sorted(runs.rglob("*"))
    assert main(["prune", str(runs)]) == 0
    said = capsys.readouterr().out
    assert "reward.before" in said and "nothing was removed" in said
    assert sorted(runs.rglob("*")) == before


def test_what_is_asked_for_goes_and_the_rest_stays(runs, capsys):
    assert main(["prune", str(runs), "--delete", "--keep", "before"]) == 0
    assert "removed 3 of 3" in capsys.readouterr().out
    assert (runs / "reward.before" / "checkpoints").is_dir() and (runs / "ppo" / "checkpoints").is_dir()
    assert not (runs / "reward" / "checkpoints").exists() and (runs / "reward" / "final" / "config.json").is_file()
    assert (runs / "reward" / "data" / "precious").is_file()
    assert main(["prune", str(runs), *(f"--keep={kind}" for kind in KINDS)]) == 0
    assert "nothing that no run needs" in capsys.readouterr().out


def test_where_a_run_is_at_work_nothing_is_touched(runs, capsys):
    before = sorted(runs.rglob("*"))
    with owning(runs / "ppo", "policy.ppo"):
        assert main(["prune", str(runs), "--delete"]) == 2
    assert f"policy.ppo, process {os.getpid()}" in capsys.readouterr().err
    assert sorted(runs.rglob("*")) == before


def test_a_pipeline_at_work_is_named_by_its_folder_where_it_can_be_stopped(runs, capsys):
    with owning(runs, "a pipeline", place=runs / NOTES):
        assert main(["prune", str(runs.parent)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{runs}: a pipeline, process {os.getpid()}") and f"touch {runs}/STOP" in said


def test_so_is_a_call_on_one_of_its_stages(runs, capsys):
    with owning(runs, "a pipeline with --only ppo", place=runs / NOTES / "owners" / "ppo"):
        assert main(["prune", str(runs.parent)]) == 2
    assert capsys.readouterr().err.startswith(f"{runs}: a pipeline with --only ppo, process {os.getpid()}")


def test_every_earlier_run_of_a_stage_may_go(runs):
    stage = runs / "reward"
    first, second, third = itertools.islice(put_aside_names(stage), 3)
    assert first.name == "reward.before" and put_aside_from(third) == stage
    for path in (second, third):
        put(path / "config.yaml")
    found = names(find_needless(runs), runs)
    assert [found[path.name] for path in (first, second, third)] == ["before"] * 3


@pytest.mark.parametrize("missing", ["done.json", "final/config.json"])
def test_checkpoints_of_what_is_not_published_stay(runs, missing):
    (runs / "reward" / missing).unlink()
    assert "reward/checkpoints" not in names(find_needless(runs), runs)


def test_a_folder_called_before_that_is_no_earlier_run_stays(runs):
    put(runs / "notes.before" / "a.txt")
    put(runs / "alone.before" / "config.yaml")
    assert {"notes.before", "alone.before"}.isdisjoint(names(find_needless(runs), runs))


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["prune", str(tmp_path / "none")]) == 2
    assert "none: no folder" in capsys.readouterr().err
