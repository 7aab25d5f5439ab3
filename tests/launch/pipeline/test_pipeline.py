"""The ``rlhf pipeline`` command with real stages: a tiny model from pairs to a compared policy, under deepspeed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = ("sft", "reward", "preference", "ppo")
TRAIN = {"global_batch_size": 16, "micro_batch_tokens": 4096, "evaluate_every": 0, "tensorboard": False}
SHORT = {"train": TRAIN | {"checkpoint_every": 1, "max_steps": 3, "publish": "last"}, "engine": {"deepspeed": "zero2"}}


def write_recipe(folder: Path, model: Path, pairs: Path) -> Path:
    data = {"train": str(pairs), "cache_dir": str(folder / "cache"), "max_tokens": 96, "template": "chatml"}
    start = {"model": {"path": "${stages.sft.final}"}}
    own = {key: value for key, value in data.items() if key != "template"}
    stages = {
        "sft": {"set": {"model": {"path": str(model)}, "data": data | {"columns": {"completion": "chosen"}}, **SHORT}},
        "reward": {"set": {**start, "data": own, "margin": {"kind": "ot"}, **SHORT}},
        "preference": {"set": {**start, "data": own, "loss": {"kind": "apo_hinge_zero"}, **SHORT}},
        "ppo": {
            "set": {
                "policy": {"path": "${stages.preference.final}"},
                "reward": {"path": "${stages.reward.final}"},
                "data": own | {"max_eval_prompts": 4, "max_tokens": 64},
                "rollout": {"prompts": 16, "max_new_tokens": 8},
                "kl": {"coefficient": 0.05},
                **SHORT,
            }
        },
        "evaluate": {
            "set": {
                "reference": "${stages.sft.final}",
                "policies": {"ppo": "${stages.ppo.final}"},
                "prompts": str(pairs),
                "reward": "${stages.reward.final}",
                "sampling": {"samples": 1, "max_new_tokens": 8},
            }
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "run"), "stages": stages}, sort_keys=False))
    return path


def start(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "pipeline", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen, expect: int = 0, timeout: float = 900) -> str:
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == expect, output
    return output


def published(folder: Path) -> dict[str, bytes]:
    """The weights of every stage."""
    finals = {name: folder / name / "final" for name in PUBLISHED}
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name, final in finals.items()
        for path in final.glob("*.safetensors")
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, tiny_pairs):
    return write_recipe(tmp_path_factory.mktemp("pipeline"), tiny_model, tiny_pairs)


@pytest.fixture(scope="module")
def finished(recipe):
    """The folder of a run that nothing disturbed, and what it said."""
    output = finish(start("run", str(recipe), "--ranks", "2"))
    return recipe.parent / "run", output


def test_a_pipeline_leads_from_pairs_to_a_compared_policy(finished):
    folder, output = finished
    assert published(folder).keys() >= {f"{name}/model.safetensors" for name in PUBLISHED}
    rows = json.loads((folder / "evaluate" / "evaluation.json").read_text())["policies"]
    assert [row["name"] for row in rows] == ["reference", "ppo"]
    assert "Fresh samples for held-out prompts" in output and "done, after" in output


def test_every_rank_has_a_log_of_its_own(finished):
    folder, _ = finished
    names = {path.name for path in (folder / "logs" / "reward").iterdir()}
    assert names == {"launcher.log", "rank0.log", "rank1.log"}
    assert "step 3/3" in (folder / "logs" / "reward" / "rank0.log").read_text()


def test_a_finished_pipeline_does_nothing_and_says_where_it_stands(finished, recipe):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    began = time.monotonic()
    finish(start("run", str(recipe), "--ranks", "2"))
    assert time.monotonic() - began < 40
    assert [path for path, seen in before.items() if path.stat().st_mtime_ns != seen] == []
    status = finish(start("status", str(recipe)))
    assert status.count("finished") == 5


def test_one_setting_of_a_stage_redoes_that_stage_and_what_follows(finished, recipe):
    status = finish(start("status", str(recipe), "ppo.kl.coefficient=0.2"))
    lines = {line.split("│")[1].strip(): line for line in status.splitlines() if line.startswith("│")}
    assert "to redo" in lines["ppo"] and "kl.coefficient was 0.05 and is 0.2" in " ".join(status.split())
    assert all("finished" in lines[name] for name in ("sft", "reward", "preference"))
    assert "waiting" in lines["evaluate"]


@pytest.mark.full
def test_a_pipeline_killed_in_every_stage_publishes_the_same_models(finished, recipe, processes_of, tmp_path):
    """Kill -9 of the pipeline alone, or of it and all that it started; benchmarks/killed_pipeline.py draws moments."""
    folder = tmp_path / "killed"
    for number, stage in enumerate(PUBLISHED):
        process = start("run", str(recipe), "--ranks", "2", f"output={folder}")
        deadline = time.monotonic() + 300
        while not any((folder / stage / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        victims = [process.pid, *(processes_of(folder) if number % 2 else [])]
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()
    finish(start("run", str(recipe), "--ranks", "2", f"output={folder}"))
    assert published(folder) == published(finished[0])


@pytest.mark.full
def test_a_signal_stops_the_whole_tree_and_the_next_run_goes_on(recipe, processes_of, tmp_path):
    folder = tmp_path / "stopped"
    settings = [str(recipe), "--ranks", "2", f"output={folder}", "sft.train.max_steps=2000", "sft.train.epochs=2000"]
    process = start("run", *settings)
    log = folder / "logs" / "sft" / "rank0.log"
    deadline = time.monotonic() + 300
    while not (folder / "sft" / "checkpoints").is_dir() or not any((folder / "sft" / "checkpoints").iterdir()):
        assert time.monotonic() < deadline and process.poll() is None, log.read_text() if log.exists() else ""
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = finish(process, expect=75, timeout=300)
    assert "the same command goes on from there" in output
    assert processes_of(folder) == []
    status = finish(start("status", *settings[:1], *settings[3:]))
    assert "half done" in status
