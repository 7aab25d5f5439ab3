"""Importing POT, where other array libraries are installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ("jax", "cupy", "tensorflow")


USES = {
    "a plan": "import torch; from reward.transport import sinkhorn_plan; "
    "sinkhorn_plan(torch.rand(3, 4), epsilon=0.5, max_iterations=20)",
    "the import": "import rlhf.core.pot",
}


@pytest.mark.parametrize("use", USES)
def test_no_other_array_library_is_imported_with_pot(use, tmp_path):
    for name in LIBRARIES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    found = f"sorted(set(sys.modules) & {set(LIBRARIES)})"
    command = [sys.executable, "-c", f"import sys; {USES[use]}; assert 'ot' in sys.modules; print({found})"]
    alone = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), done.stderr[-2000:]
