"""What .ci/run does where packages are missing; apt-get, dpkg and make are stand-ins."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "run"


@pytest.fixture
def ci(tmp_path):
    """``ci(CI="true")``: how the script ended, and what make was asked for; apt-get fails, and nothing is installed."""

    def run(*, user: int = 0, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        asked = tmp_path / "asked"
        asked.write_text("")
        programs = {
            "apt-get": "echo 'E: no network' >&2; exit 100",
            "dpkg": "exit 1",
            "id": f"echo {user}",
            "make": f'echo "$@" >> {asked}',
        }
        for name, body in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        given = {name: value for name, value in os.environ.items() if name != "CI"}
        given |= {"PATH": f"{tmp_path}:/usr/bin:/bin", **environment}
        done = subprocess.run([SCRIPT], env=given, capture_output=True, text=True, check=False)
        return done, asked.read_text().split("\n")[:-1]

    return run


def test_without_ci_what_is_missing_is_said_and_all_else_is_tested(ci):
    done, asked = ci()
    assert done.returncode == 0 and asked == ["lint", "resolve", "test-all"]
    assert "E: no network" in done.stdout and "are skipped where those are missing" in done.stdout


@pytest.mark.parametrize(
    ("user", "message"), [(0, "apt-get cannot install slurm-wlm"), (1000, "not root: cannot install slurm-wlm")]
)
def test_with_ci_it_ends_where_a_package_is_missing(ci, user, message):
    done, asked = ci(user=user, CI="true")
    assert done.returncode == 1 and asked == [] and message in done.stdout


def test_it_installs_all_that_tests_would_be_skipped_for():
    (packages,) = re.findall(r"^PACKAGES=\((.*)\)$", SCRIPT.read_text(), flags=re.MULTILINE)
    texts = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name)
    named = set(" ".join(re.findall(r"apt-get install ([a-z -]+) \(\.ci/run does\)", texts)).split())
    assert len(named) >= 4 and named <= {*packages.split()}
    assert {"libaio-dev", "iproute2"} <= {*packages.split()}


@pytest.mark.parametrize(("said", "code"), [("error: dns error: failed to lookup", 0), ("No solution found", 1)])
def test_versions_that_do_not_fit_end_it_and_an_index_that_is_silent_does_not(tmp_path, said, code):
    (function,) = re.findall(r"^try_every_python\(\) \{\n.*?^\}\n", SCRIPT.read_text(), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "make").write_text(f"#!/bin/sh\necho '{said}'\nexit 2\n")
    (tmp_path / "make").chmod(0o755)
    script = f"set -euo pipefail\n{function}try_every_python\necho went on"
    given = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == code and said in done.stdout
    assert ("went on" in done.stdout) == (code == 0)
