"""Importing POT, where other array libraries are installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ("jax", "cupy", "tensorflow")


@pytest.mark.parametrize("module", ["reward.transport", "reward.margin_maker", "policy.preference.task"])
def test_no_other_array_library_is_imported_with_pot(module, tmp_path):
    for name in LIBRARIES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    found = f"sorted(set(sys.modules) & {set(LIBRARIES)})"
    command = [sys.executable, "-c", f"import sys; import {module}; assert 'ot' in sys.modules; print({found})"]
    alone = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), done.stderr[-2000:]
