import json
import time
from pathlib import Path

import pytest

from launch.cli import main
from launch.doctor import checks, collectives, run_checks
from launch.doctor.checks import Check
from launch.doctor.finding import Finding
from launch.doctor.subject import Subject
from launch.stages import Stage


def only(findings):
    (finding,) = findings
    return finding


# ---- all-reduce


@pytest.mark.dist
def test_two_real_ranks_add_up_a_tensor_at_a_measured_rate():
    finding = only(collectives.all_reduce(Subject(ranks=2)))
    assert finding.status == "ok", finding
    found = finding.values
    assert (found["ranks"], found["nodes"], found["backend"], found["correct"]) == (2, 1, "gloo", True)
    # Of two ranks each sends and receives every byte once.
    assert found["bus_gb_per_second"] == pytest.approx(found["bytes"] / found["seconds"] / 1e9)
    assert found["bus_gb_per_second"] > 0 and 0 < found["latency_seconds"] < found["seconds"]
    assert f"{found['bus_gb_per_second']:.2f} GB/s" in finding.text


@pytest.mark.dist
def test_ranks_that_do_not_meet_in_time_are_a_failure():
    finding = only(collectives.all_reduce(Subject(ranks=2, seconds=0.5)))
    assert finding.status == "failure" and "the ranks did not meet within 0.5 s" in finding.text
    assert "GLOO_SOCKET_IFNAME" in finding.remedy or "NCCL_DEBUG" in finding.remedy


@pytest.mark.dist
def test_ranks_that_crash_are_a_failure_with_their_last_words(monkeypatch):
    monkeypatch.setattr(collectives, "MODULE", Stage(name="all-reduce", module="rlhf.no_such_module", config=""))
    finding = only(collectives.all_reduce(Subject(ranks=2)))
    assert finding.status == "failure" and "no_such_module" in finding.text


def test_a_wrong_sum_and_missing_nodes_are_failures():
    measured = {
        "ranks": 2,
        "nodes": 1,
        "backend": "nccl",
        "bytes": 2**20,
        "seconds": 0.1,
        "bus_gb_per_second": 0.01,
        "latency_seconds": 0.001,
        "correct": True,
    }
    two_nodes = collectives.Machine(hosts={"a": 1, "b": 1})
    assert collectives._judged(measured, collectives.Machine()).status == "ok"
    lost = collectives._judged(measured, two_nodes)
    assert lost.status == "failure" and "only 1 of 2 nodes took part" in lost.text and lost.remedy
    wrong = collectives._judged(measured | {"correct": False}, collectives.Machine())
    assert wrong.status == "failure" and "the sum is wrong" in wrong.text and wrong.remedy


def test_nothing_is_started_on_nodes_that_cannot_be_used(tmp_path):
    finding = only(collectives.all_reduce(Subject(hostfile=tmp_path / "none")))
    assert finding.status == "warning" and finding.text.startswith("not tried")


def test_ranks_are_not_tried_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    finding = only(collectives.all_reduce(Subject(ranks=2, output=tmp_path / "file" / "run")))
    assert finding.status == "warning" and f"not tried: {tmp_path}/file cannot be written to" in finding.text
    assert "the check of the disk" in finding.remedy


# ---- all checks


def test_a_check_that_breaks_is_a_finding_and_the_others_are_made(monkeypatch):
    def broken(subject):
        raise RuntimeError("no such thing")
        yield

    fine = Check("fine", lambda subject: [Finding("ok", "well")], quick=True)
    monkeypatch.setattr(checks, "CHECKS", (Check("odd", broken, quick=True), fine))
    odd, well = run_checks(Subject(), quick=True)
    assert odd.status == "failure" and "RuntimeError: no such thing" in odd.text and odd.remedy
    assert well.status == "ok"


def test_quick_checks_are_quick_and_look_at_what_fails_runs(tmp_path):
    import torch  # noqa: F401  # a pipeline has it anyway

    began = time.monotonic()
    findings = run_checks(Subject(ranks=1, output=tmp_path / "run"), quick=True)
    assert time.monotonic() - began < 3
    made = [*dict.fromkeys(each.check for each in findings)]
    assert made == ["versions", "DeepSpeed ops", "devices", "host memory", "shared memory", "disk"]
    assert not (tmp_path / "run").exists()


def test_every_finding_that_is_not_ok_has_a_remedy(no_programs, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", [each for each in checks.CHECKS if each.name != "all-reduce"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = run_checks(Subject(ranks=1000, hostfile=tmp_path / "none", output=tmp_path))
    assert {each.check for each in findings if each.status != "ok"} >= {"build tools", "devices", "hostfile"}
    assert all(each.remedy for each in findings if each.status != "ok")


# ---- the command


@pytest.fixture
def found(monkeypatch):
    """``found(check=finding, ...)``: what the machine of the command is like."""

    def set_findings(**findings: Finding) -> None:
        made = [Check(name, lambda subject, each=each: [each], quick=True) for name, each in findings.items()]
        monkeypatch.setattr(checks, "CHECKS", made)

    return set_findings


def test_failures_alone_make_the_exit_status(found, capsys):
    found(disk=Finding("ok", "roomy"), hub=Finding("warning", "silent", "wait"))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok       disk: roomy",
        "warning  hub: silent",
        "           remedy: wait",
        "ready: 1 ok, 1 warning(s)",
    ]
    found(disk=Finding("failure", "full", "free some"))
    assert main(["doctor", "--quick"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "not ready: 1 failure(s), 0 warning(s)"


def test_findings_are_printed_as_json(found, capsys):
    found(disk=Finding("ok", "roomy", values={"free_bytes": 5}))
    assert main(["doctor", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"check": "disk", "status": "ok", "text": "roomy", "remedy": None, "values": {"free_bytes": 5}}


def test_a_recipe_says_where_and_what_the_run_writes(capsys, tiny_recipe, tmp_path):
    recipe = [*tiny_recipe, "--set", f"output={tmp_path}/file/run"]
    (tmp_path / "file").touch()
    assert main(["doctor", "--quick", *recipe]) == 1
    assert f"failure  disk: {tmp_path}/file/run: cannot be written to" in capsys.readouterr().out


def test_a_pipeline_is_checked_for_all_its_stages(capsys, tiny_recipe, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        f"output: {tmp_path}/two\n"
        "stages:\n"
        f"  first: {{kind: reward, recipe: {tiny_recipe[1]}}}\n"
        f"  second: {{kind: reward, recipe: {tiny_recipe[1]}, set: {{optim: {{learning_rate: 1e-3}}}}}}\n"
    )

    def needed(*arguments: str) -> int:
        assert main(["doctor", "--quick", "--json", *arguments]) == 0
        disk = [row for row in json.loads(capsys.readouterr().out) if row["check"] == "disk"]
        return disk[0]["values"]["needed_bytes"]

    assert needed("--config", str(path)) == 2 * needed(*tiny_recipe) > 0


def test_a_recipe_that_is_refused_ends_before_the_checks(capsys, tiny_recipe):
    assert main(["doctor", *tiny_recipe, "--set", "optim.learning_rte=1"]) == 2
    assert "did you mean optim.learning_rate?" in capsys.readouterr().err
    assert main(["doctor", "--config", str(Path("no") / "such.yaml")]) == 2
