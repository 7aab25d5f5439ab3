"""What is done again, and what only if somebody asks for it: code and libraries that change, long work, settings."""

from dataclasses import replace

import pytest

from launch.cli import main
from launch.jobs.launcher import Machine
from launch.pipeline import fingerprint, state
from launch.pipeline.run import PipelineRun, RunOptions
from launch.pipeline.state import load_remembering
from rlhf.core.errors import ConfigError, UserError

CHAIN = {"a": {"set": {"number": 1, "steps": 4}}, "b": {"set": {"number": 10, "source": "${stages.a.final}"}}}


@pytest.fixture
def half_done(training_toys, monkeypatch):
    """Stage a has died at its third step."""
    training_toys.write(CHAIN)
    monkeypatch.setenv("TOY_KILL_AT", "3")
    assert training_toys.run() == 1
    assert len((training_toys.folder / "out" / "a" / "checkpoints").read_text()) == 2
    training_toys.said  # noqa: B018
    return training_toys


def other_code(monkeypatch) -> str:
    monkeypatch.setattr(fingerprint, "code_digest", lambda package: "other")
    return "the code of"


def other_library(name: str):
    def change(monkeypatch) -> str:
        versions = dict(fingerprint._versions())
        monkeypatch.setattr(fingerprint, "_versions", lambda: versions | {name: "9.9"})
        return f'{name} was "{versions[name]}" and is "9.9"'

    return change


CHANGES = {"code": other_code, "torch": other_library("torch"), "deepspeed": other_library("deepspeed")}


@pytest.mark.parametrize("what", CHANGES)
def test_a_half_done_stage_goes_on_with_a_warning_where_only_code_or_a_library_has_changed(
    half_done, monkeypatch, what
):
    words = CHANGES[what](monkeypatch)
    assert half_done.run() == 0
    said = half_done.said
    assert "warning: a goes on from its checkpoints although " in said and words in said
    assert len((half_done.folder / "out" / "a" / "checkpoints").read_text()) == 4 and half_done.starts("a") == 2
    assert not list((half_done.folder / "out").glob("a.before*"))


@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_stage_is_done_again_unless_any_code_will_do(toys, monkeypatch, what):
    toys.write(CHAIN)
    assert toys.run() == 0
    toys.said  # noqa: B018
    words = CHANGES[what](monkeypatch)
    assert toys.run(any_code=True) == 0 and toys.starts("a") == 1
    assert toys.run() == 0 and toys.starts("a") == 2
    assert "a: done again: " in (said := toys.said) and words in said


def test_markers_of_a_version_that_did_not_record_libraries_still_count(toys, monkeypatch):
    toys.write(CHAIN)
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "_versions", dict)
        assert toys.run() == 0
    path = toys.folder / "out" / ".pipeline" / "a.json"
    path.write_text(path.read_text().replace('"versions": {}', '"others": {}'))
    assert toys.run() == 0 and toys.starts("a") == 1


@pytest.mark.parametrize("state_of_a", ["finished", "half done"])
def test_long_work_is_done_again_only_if_asked_for(training_toys, monkeypatch, state_of_a):
    toys = training_toys
    toys.write(CHAIN)
    monkeypatch.setenv("TOY_KILL_AT", "3" if state_of_a == "half done" else "never")
    toys.run()
    monkeypatch.delenv("TOY_KILL_AT")
    monkeypatch.setattr(state, "LONG_WORK_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"a has worked for .*: number was 1 and is 2; to have that: --redo a\n"):
        toys.run("a.number=2")
    assert toys.starts("a") == 1 and not list((toys.folder / "out").glob("a.before*"))
    assert toys.run("a.number=2", redo=("a",)) == 0
    assert (toys.number("a"), toys.number("b")) == (2, 12), "what builds on it is part of what was asked for"
    assert (toys.folder / "out" / "a.before" / "checkpoints").is_file()


def test_redo_does_a_finished_stage_once_more_and_no_other(toys):
    toys.write(CHAIN | {"c": {}})
    assert toys.run() == 0
    assert toys.run(redo=("a",)) == 0
    assert [toys.starts(name) for name in "abc"] == [2, 1, 1], "a gave b the same number"
    with pytest.raises(ConfigError, match="no stage d"):
        toys.run(redo=("d",))


# Settings of earlier calls


def run(toys, *words: str) -> int:
    """As the command does it."""
    pipeline = load_remembering(toys.path, words)
    return toys.run(*pipeline.overrides)


def test_settings_of_an_earlier_call_are_remembered_until_they_are_given_anew_or_forgotten(toys):
    toys.write(CHAIN, vars={"n": 5})
    assert run(toys, "a.number=2", "b.number=20") == 0
    assert run(toys) == 0
    assert [toys.starts(name) for name in "ab"] == [1, 1] and toys.number("b") == 22
    assert run(toys, "a.number=3") == 0 and toys.number("b") == 23
    pipeline = load_remembering(toys.path, [])
    assert pipeline.remembered == ("b.number=20", "a.number=3")
    assert load_remembering(toys.path, [], forget=True).named("a").config.number == 1


def test_what_is_remembered_belongs_to_its_recipe_and_its_folder(toys, tmp_path):
    toys.write(CHAIN)
    assert run(toys, "a.number=2") == 0
    assert load_remembering(toys.path, [f"output={tmp_path}/other"]).remembered == ()
    copy = toys.path.with_name("copy.yaml")
    copy.write_text(toys.path.read_text())
    assert load_remembering(copy, []).remembered == ()


def test_a_remembered_setting_that_no_longer_fits_the_recipe_says_where_it_comes_from(toys):
    toys.write(CHAIN | {"c": {}})
    assert run(toys, "c.number=2") == 0
    toys.write(CHAIN)
    with pytest.raises(ConfigError, match=r"with c.number=2 of an earlier call; --forget leaves that out"):
        load_remembering(toys.path, [])


def test_the_command_says_what_it_remembers(toys, capsys):
    toys.write({"a": {"set": {"number": 1}}})
    words = ["pipeline", "run", str(toys.path), "--no-doctor", "--ranks", "1"]
    assert main([*words, "a.number=2"]) == 0 and main(words) == 0
    assert "as an earlier call said: a.number=2 (--forget leaves that out)" in capsys.readouterr().out
    assert main([*words, "--forget"]) == 0
    assert toys.number("a") == 1


@pytest.mark.parametrize("given", ["a.meets=[/a/b]", "a.meets=[b]"])
def test_brackets_in_what_is_remembered_are_shown_as_they_are(toys, given):
    toys.write({"a": {}})
    pipeline = replace(toys.load(), remembered=(given,))
    assert PipelineRun(pipeline, RunOptions(machine=Machine(ranks=1), doctor=False), toys.console).run() == 0
    assert f"as an earlier call said: '{given}' (--forget leaves that out)" in toys.said
