"""The plugin that counts CPU seconds, and what is skipped for want of a package, in test runs of their own."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
BURN = """
import subprocess, sys, time
import pytest
from tests.lacking import imported, lacking

def burn(seconds=0.6):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """``suite(source, *options)``: the result of a run with the plugin and a limit of 0.3 CPU seconds."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("CI", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    dist\n")
    pytester.makeconftest("import tests.cost\ntests.cost.LIMIT = 0.3\n")

    def run(source: str, *options: str):
        pytester.makepyfile(test_one=BURN + source)
        return pytester.runpytest_subprocess("-p", "tests.cost", *options)

    return run


def test_a_test_above_the_limit_fails_unless_it_is_marked(suite):
    found = suite("def test_a(): burn()\n@pytest.mark.slow\ndef test_b(): burn()\ndef test_c(): time.sleep(0.6)\n")
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines(["*took 0.* CPU seconds, more than 0.3: mark it slow, or let it do less*"])


def test_what_a_test_starts_and_what_is_set_up_for_it_alone_count(suite):
    child = "import time\nwhile time.process_time() < 0.6: pass"
    found = suite(
        f"def test_a(): subprocess.run([sys.executable, '-c', {child!r}])\n"
        "@pytest.fixture\ndef own(): burn()\n"
        "def test_b(own): pass\n"
    )
    found.assert_outcomes(failed=2)


def test_what_is_set_up_for_several_does_not(suite):
    found = suite(
        "@pytest.fixture(scope='module')\ndef first(): burn()\n"
        "@pytest.fixture(scope='module')\ndef second(request): burn(); request.getfixturevalue('first')\n"
        "def test_a(second): pass\n"
    )
    found.assert_outcomes(passed=1)


@pytest.mark.parametrize("workers", [[], ["-n", "2", "--dist", "loadfile"]], ids=["alone", "two workers"])
def test_the_slowest_files_are_listed_with_their_cpu_seconds(suite, pytester, workers):
    pytester.makepyfile(test_two="def test_quick(): pass\n")
    found = suite("@pytest.mark.slow\ndef test_a(): burn()\n", "--file-times=1", *workers)
    found.assert_outcomes(passed=2)
    found.stdout.re_match_lines([r".*slowest 1 files", r"seconds  CPU s  file", r" +\d+\.\d +[01]\.\d  test_one\.py"])
    found.stdout.no_re_match_line(r" +\d+\.\d +\d+\.\d  test_two\.py")


def test_a_file_stays_on_one_worker_and_so_do_files_that_belong_together(suite, pytester):
    pytester.makeconftest(
        "import os, tests.cost\n"
        "tests.cost.TOGETHER = dict.fromkeys(['test_two.py', 'test_three.py'], 'pair')\n"
        "def pytest_runtest_logreport(report):\n"
        "    if report.when == 'call' and hasattr(report, 'node'):\n"
        "        print('ran', report.node.gateway.id, report.nodeid)\n"
    )
    for name in ("two", "three", "four", "five"):
        pytester.makepyfile(**{f"test_{name}": "def test_a(): pass\ndef test_b(): pass\n"})
    found = suite("def test_nothing(): pass\n", "-n", "2", "--dist", "loadfile", "-s")
    found.assert_outcomes(passed=9)
    ran = [line.partition("ran ")[2].split() for line in found.outlines if "ran gw" in line]
    where = {name.partition("::")[0]: {worker for worker, each in ran if each == name} for _, name in ran}
    assert all(len(workers) == 1 for workers in where.values()) and len(where) == 5
    assert where["test_two.py"] == where["test_three.py"]


def test_what_is_missing_is_skipped_but_fails_where_everything_shall_be_proved(suite, monkeypatch):
    source = "def test_a(): lacking('no slurmctld')\ndef test_b(): imported('no_such_module')\n"
    suite(source).assert_outcomes(skipped=2)
    monkeypatch.setenv("CI", "true")
    found = suite(source)
    found.assert_outcomes(failed=2)
    found.stdout.fnmatch_lines(["*no slurmctld; with CI=true nothing is skipped*", "*no_such_module*"])
