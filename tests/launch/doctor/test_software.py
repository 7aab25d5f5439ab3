import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from launch.doctor import software
from launch.doctor.subject import Subject
from launch.runs import PipelineStage
from launch.stages import STAGES
from policy.generation.options import SamplingConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def no_other_builds(monkeypatch, tmp_path):
    """What other programs of this machine build just now is no finding of a test."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def installed_as(monkeypatch, *requirements: str) -> None:
    monkeypatch.setattr(software, "_requirements", lambda: [Requirement(each) for each in requirements])


# ---- versions


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert len(pinned) > 50
    assert software.tested_versions() == {name.lower(): version for name, version in pinned}


def test_all_versions_as_tested_are_one_line(monkeypatch):
    installed_as(monkeypatch, "torch>=2.8", "numpy")
    found = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    monkeypatch.setattr(software, "tested_versions", lambda: {k: v.partition("+")[0] for k, v in found.items()})
    (finding,) = software.versions(Subject())
    assert finding.status == "ok" and f"torch {found['torch']}: all 2 packages as tested" in finding.text


def test_other_versions_than_the_tested_ones_are_a_warning_that_names_both(monkeypatch):
    installed_as(monkeypatch, "torch>=2.8", "numpy")
    monkeypatch.setattr(software, "tested_versions", lambda: {"torch": "1.2.3"})
    (finding,) = software.versions(Subject())
    assert finding.status == "warning"
    assert f"torch {importlib.metadata.version('torch')} (1.2.3)" in finding.text
    assert re.search(r"pip install -c \S+/constraints.txt torch$", finding.remedy)


def test_a_package_that_is_too_old_or_missing_is_a_failure_with_the_command(monkeypatch):
    installed_as(monkeypatch, "torch>=99", "no-such-package>=1")
    old, missing, *_ = software.versions(Subject())
    assert old.status == missing.status == "failure"
    assert old.text == f"torch {importlib.metadata.version('torch')}: expected >=99"
    assert old.remedy.startswith("pip install -c ") and old.remedy.endswith(" torch")
    assert (missing.text, missing.remedy) == (
        "no-such-package is not installed",
        "pip install 'no-such-package>=1'",
    )


# ---- what compiles ops


def test_missing_build_tools_are_warnings_with_how_to_get_them(no_programs):
    compiler, ninja = software.tools(Subject())
    assert compiler.status == ninja.status == "warning"
    assert compiler.text.startswith("a C++ compiler is missing") and "apt install g++" in compiler.remedy
    assert ninja.remedy.startswith("pip install ninja")


def test_an_op_that_cannot_be_compiled_fails_only_the_recipe_that_needs_it(no_programs, stage):
    def async_io(*overrides: str):
        return next(each for each in software.ops(Subject(stages=(stage(*overrides),))) if "async_io" in each.text)

    needed = async_io("engine.deepspeed=zero3_nvme", f"engine.nvme_path={no_programs}")
    assert needed.status == "failure" and "missing a C++ compiler" in needed.text
    assert "install what is missing, or take zero3_offload" in needed.remedy
    assert async_io().status == "ok" and "not needed by this recipe" in async_io().text


def test_without_a_recipe_ops_that_cannot_be_compiled_are_warnings(no_programs):
    assert [each.status for each in software.ops(Subject())] == ["warning", "warning"]


def test_a_configuration_that_is_refused_is_a_failure(stage):
    (finding,) = software.ops(Subject(stages=(stage("engine.deepspeed=zero9"),)))
    assert finding.status == "failure" and "zero9: no such DeepSpeed configuration" in finding.text


@pytest.mark.parametrize("name", ["cpu_adam", "pin_memory"])
def test_the_lock_of_a_killed_build_is_named_with_the_command_to_remove_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / name).mkdir()
    lock = tmp_path / name / "lock"
    lock.touch()
    finding = next(iter(software.ops(Subject())))
    assert finding.status == "warning" and finding.remedy == f"if no build runs: rm {lock}"


# ---- vLLM


def test_a_recipe_that_wants_vllm_fails_where_there_is_none_and_others_do_not_ask(stage):
    wanted = SimpleNamespace(rollout=SamplingConfig(backend="vllm"))
    (finding,) = software.vllm(Subject(stages=(PipelineStage(stage=STAGES["ppo"], config=wanted),)))
    assert finding.status == "failure"
    assert "rollout.backend = vllm" in finding.text and finding.text.endswith("has no vLLM")
    assert finding.remedy.startswith("install vLLM 0.28 or later with pip install 'margin-rlhf[vllm]'")
    assert not list(software.vllm(Subject(stages=(stage(),))))
