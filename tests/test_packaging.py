"""What a wheel holds: the folders of the project, and no more."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {"rlhf", "reward", "policy", "launch", "ds_configs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source") / "tree"
    source.mkdir()
    for name in TOP_LEVEL:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "launch" / "__pycache__").mkdir()
    (source / "launch" / "__pycache__" / "cli.cpython-311.pyc").touch()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    script = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    (source / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True, text=True)
    assert "would be ignored" not in done.stderr, "pip shows a user fifty lines of warnings for each folder of data"
    (path,) = (source / "dist").glob("*.whl")
    assert path.name.startswith("margin_rlhf-")
    return zipfile.ZipFile(path)


def test_top_level_names(wheel):
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == TOP_LEVEL
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


@pytest.mark.parametrize(
    "name",
    [
        "ds_configs/train_zero3.json",
        "launch/doctor/constraints.txt",
        "launch/recipes/quickstart_reward.yaml",
        "launch/report/templates/page.html.j2",
        "launch/report/templates/page.css",
        "launch/report/templates/page.js",
        "launch/quickstart/chat.jinja",
        "launch/quickstart/sentiment_pairs_train.jsonl",
    ],
)
def test_data_files_are_inside(wheel, name):
    assert name in wheel.namelist()


@pytest.mark.parametrize("minor", [10, 15])
def test_a_python_that_will_not_do_is_named_before_anything_is_installed(tmp_path, minor):
    other = tmp_path / f"python3.{minor}"
    version = f"import sys; sys.version_info = (3, {minor}, 4); exec(sys.argv[1])"
    other.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{version}' \"$2\"\n")
    other.chmod(0o755)
    command = ["make", "--directory", str(ROOT), "install", f"PYTHON={other}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and f"is Python 3.{minor}: margin-rlhf needs 3.11 or later, before 3.15" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_what_is_installed_runs_a_shipped_recipe_from_anywhere(wheel, tmp_path):
    installed, folder = tmp_path / "installed", tmp_path / "elsewhere"
    wheel.extractall(installed)
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def rlhf(*words: str) -> str:
        command = [sys.executable, "-P", "-c", "import sys; from launch.cli import main; sys.exit(main())", *words]
        given = environment | {"PYTHONPATH": str(installed)}
        return subprocess.run(command, cwd=folder, env=given, check=True, capture_output=True, text=True).stdout

    rlhf("init", "mine", "--recipe", "quickstart")
    assert "sentiment_pairs_train.jsonl" in {path.name for path in (folder / "mine").iterdir()}
    assert "waiting" in rlhf("pipeline", "status", "shipped:quickstart")
    assert "waiting" in rlhf("pipeline", "status", "mine/quickstart.yaml")
