"""Recipes are read, shown and refused without torch: that takes seconds, and on all ranks of a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "scipy", "ot", "matplotlib")
RECIPES = Path(__file__).parents[1] / "launch" / "recipes"
STAGES = {
    "reward": "quickstart_reward.yaml",
    "policy.sft": "sft_smollm2.yaml",
    "policy.preference": "quickstart_preference.yaml",
    "policy.ppo": "quickstart_ppo.yaml",
}
EVALUATION = ["output=o", "reference=r", "prompts=p", "reward=m:f"]

# Runs what follows as ``python -m`` would, and tells how it ended and what was imported meanwhile.
PROBE = """
import json, runpy, sys
name, sys.argv[1:] = sys.argv[1], sys.argv[2:]
code = None
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
print(json.dumps({"code": code or 0, "imported": sorted(sys.modules)}), file=sys.stderr)
"""


def started(module: str, *arguments: str) -> tuple[dict, str]:
    """How ``python -m module arguments`` ended, and all that it printed."""
    command = [sys.executable, "-c", PROBE, module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    *errors, last = done.stderr.strip().splitlines()
    end = json.loads(last)
    heavy = [name for name in HEAVY if name in end["imported"]]
    return {"code": end["code"], "heavy": heavy}, done.stdout + "\n".join(errors)


@pytest.mark.parametrize(("module", "recipe"), STAGES.items())
def test_a_dry_run_imports_no_torch(module, recipe):
    end, printed = started(module, "--config", str(RECIPES / recipe), "--dry-run")
    assert end == {"code": 0, "heavy": []}
    assert "engine:" in printed


@pytest.mark.parametrize("module", [*STAGES, "policy.evaluation", "launch.importing"])
def test_help_imports_no_torch(module):
    end, printed = started(module, "--help")
    assert end == {"code": 0, "heavy": []}
    assert "settings (key=default, type)" in printed


@pytest.mark.parametrize(("module", "recipe"), STAGES.items())
def test_a_misspelled_setting_is_refused_without_torch(module, recipe):
    wrong = ("engine.kinds=x", "loss.parameterz=1")
    end, printed = started(module, "--config", str(RECIPES / recipe), *wrong[: 1 if module == "policy.sft" else 2])
    assert end == {"code": 2, "heavy": []}
    assert "did you mean engine.kind?" in printed


def test_an_evaluation_is_shown_and_refused_without_torch():
    end, printed = started("policy.evaluation", *EVALUATION, "--dry-run")
    assert end == {"code": 0, "heavy": []} and "reference: r" in printed
    end, printed = started("policy.evaluation", *EVALUATION, "sampling.topp=1")
    assert end == {"code": 2, "heavy": []} and "did you mean sampling.top_p?" in printed


QUICKSTART = str(RECIPES / "quickstart.yaml")
CLUSTER = ("--profile", str(RECIPES.parent / "clusters" / "example.yaml"))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("pipeline", "run", QUICKSTART, "--dry-run"), 0, "evaluate"),
        (("pipeline", "status", QUICKSTART), 0, "evaluate"),
        (("pipeline", "run", QUICKSTART, "reward.engine.kinds=x"), 2, "did you mean engine.kind?"),
        (("slurm", "render", "pipeline", "--config", QUICKSTART, *CLUSTER), 0, "#SBATCH"),
        (("plan", "reward", "--config", str(RECIPES / "quickstart_reward.yaml"), "loss.kind=bsrr"), 2, "mean bsr?"),
        (("plan", "pipeline", "--config", QUICKSTART, "reward.optim.rate=1"), 2, "optim."),
        (
            (
                "sweep",
                "preference",
                "--output",
                "o",
                "--config",
                str(RECIPES / "quickstart_preference.yaml"),
                "loss.kind=sigmoid,ipoo",
            ),
            2,
            "did you mean ipo?",
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_what_a_command_shows_or_refuses_of_a_recipe_needs_no_torch(arguments, code, text):
    end, printed = started("launch.cli", *arguments)
    assert end == {"code": code, "heavy": []}
    assert text in printed


def test_a_launcher_counts_devices_and_finds_a_port_without_torch(tmp_path):
    script = tmp_path / "counts.py"
    script.write_text(
        "from launch.jobs.launcher import Machine, stage_command\n"
        "from launch.stages import STAGES\n"
        "print(stage_command(STAGES['reward'], [], Machine()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert "--slots" in done.stdout
    assert not {"torch", "deepspeed"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    ("module", "unused"),
    [("reward.stage", {"ot"}), ("reward.reload_check", {"ot", "peft"}), ("policy.reload_check", {"ot", "peft"})],
)
def test_a_process_imports_adapters_and_transport_only_when_it_uses_them(module, unused):
    """POT brings scipy's statistics along, which margins other than ot have no use for. (Schedules bring peft.)"""
    command = [sys.executable, "-c", f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    imported = json.loads(done.stdout.splitlines()[-1])
    assert "torch" in imported
    assert not (unused | {"datasets", "matplotlib", "tensorboard"}) & set(imported)


@pytest.mark.parametrize("arguments", [(), ("pipeline",), ("plan",), ("slurm",), ("sweep",)], ids=" ".join)
def test_help_of_the_commands_imports_no_torch(arguments):
    end, printed = started("launch.cli", *arguments, "--help")
    assert end == {"code": 0, "heavy": []}
    assert "usage: rlhf" in printed
