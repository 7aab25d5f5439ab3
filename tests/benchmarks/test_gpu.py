import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import OUT_OF_TIME, PARTS, main
from benchmarks.gpu.cells import Cell, Result, Runner
from benchmarks.gpu.table import HEADS, table
from benchmarks.gpu.training import useful_flops
from benchmarks.gpu.world import TOY, World

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def world(tmp_path, tiny_model, tiny_pairs) -> World:
    found = World(
        work=tmp_path,
        tokenizer=tiny_model,
        rows={"pairs": str(tiny_pairs)},
        prompts=ROOT / "launch" / "quickstart" / "prompts_train.jsonl",
        trl_ppo="",
        toy=True,
    )
    found.write()
    return found


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.dist
def test_every_part_runs_at_toy_size_and_says_what_it_skipped(world, tmp_path):
    """As on a GPU machine: the script, all parts, one table; TRL beside ours computes the same."""
    options = ["--toy", "--tokenizer", str(world.tokenizer), "--prompts", str(world.prompts), "--minutes", "20"]
    options += ["--rows", f"pairs={world.rows['pairs']}", "--output", str(tmp_path / "found.json")]
    told = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert {result["part"] for result in results} == {"material", *PARTS}
    skipped = [result for result in results if result["skipped"]]
    assert {result["part"] for result in skipped} == {"rollouts", "profile", "training"}, "what needs a GPU, or a TRL"
    assert "--trl-ppo" in next(result["skipped"] for result in skipped if result["name"] == "ppo, trl")
    assert all("GPU" in result["skipped"] for result in skipped if result["part"] != "rollouts")
    found = {result["name"]: result["figures"] for result in results if result["figures"]}
    for stage in ("reward", "dpo"):
        ours, theirs = (found[f"{stage}, pairs, 128 tokens, {side}"]["losses"] for side in ("ours", "trl"))
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert found[f"{stage}, pairs, 128 tokens, ours"]["computed_tokens"] < 1  # the prompt of a pair counts once
    assert min(result["figures"]["syncs"] for result in results if result["part"] == "syncs") > 0
    assert "NOT THE SAME WORK" not in told.stdout and "DIFFERS" not in told.stdout
    assert "| skipped: needs a TRL with PPOTrainer" in told.stdout


def test_what_would_not_end_in_time_is_not_begun_and_said_to_be_skipped(world, capsys, monkeypatch):
    for name in ("margin", "limit"):
        monkeypatch.setitem(PARTS, name, 0.0)
    monkeypatch.setattr("benchmarks.gpu.__main__.warm_up", lambda: None)
    options = ["--toy", "--tokenizer", str(world.tokenizer), "--prompts", str(world.prompts), "--minutes", "1"]
    assert main(["limit", "margin", *options, "--rows", f"pairs={world.rows['pairs']}"]) == 0
    found = capsys.readouterr().out
    assert found.count("| limit |") == 1 and found.count("pairs | ") == 2  # what was left of the minute was theirs
    assert main(["limit", "margin", *options, "--minutes", "0.16", "--rows", f"pairs={world.rows['pairs']}"]) == 0
    assert OUT_OF_TIME in capsys.readouterr().out


def test_what_does_not_match_is_left_out_and_what_was_printed_is_kept(world, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.gpu.__main__.warm_up", lambda: None)
    options = ["--toy", "--tokenizer", str(world.tokenizer), "--prompts", str(world.prompts), "--minutes", "1"]
    options += ["--rows", f"pairs={world.rows['pairs']}", "--logs", str(tmp_path / "logs")]
    assert main([*options, "--only", "margin: optimal"]) == 0
    found = capsys.readouterr().out
    assert "| margin |" in found and not any(f"| {part} |" in found for part in PARTS if part != "margin")
    assert len(list((tmp_path / "logs").glob("*.log"))) == 2


def test_a_measurement_that_fails_hangs_or_dies_does_not_end_the_others(world):
    runner, cells = Runner(world), f"{__name__}"
    assert runner.run(Cell(part="limit", name="a", function=f"{cells}:fails", seconds=1), 20).failed == (
        "ValueError: too wide"
    )
    assert "exit code 3" in runner.run(Cell(part="limit", name="a", function=f"{cells}:dies", seconds=1), 20).failed
    assert "ended" in runner.run(Cell(part="limit", name="a", function=f"{cells}:hangs", seconds=1), 0.5).failed
    assert runner.run(Cell(part="limit", name="a", function=f"{cells}:works", seconds=1), 20).figures == {"a": 1}


def fails(world: World) -> dict:
    raise ValueError("too wide")


def dies(world: World) -> dict:
    os._exit(3)


def hangs(world: World) -> dict:
    import time

    time.sleep(600)
    return {}


def works(world: World) -> dict:
    return {"a": 1}


def test_a_table_tells_ratios_to_trl_of_the_same_case_and_losses_that_differ():
    asked = {"stage": "reward", "rows": "hh", "tokens": 128, "checkpointing": False}
    figures = {"useful_tflops": 40.0, "padding": 0.0, "computed_tokens": 0.7, "peak_gib": 10.0, "at_once": 8}
    figures |= {"planned_gib": 9.0, "step_seconds": [0.9, 1.1]}
    results = [
        Result(
            part="limit",
            name="l",
            arguments={},
            figures=dict.fromkeys(("tflops", "square_tflops", "up_tflops", "down_tflops"), 80.0),
        ),
        Result(
            part="training",
            name="ours",
            arguments=asked | {"side": "ours"},
            figures=figures | {"pairs_per_second": 30.0, "losses": [0.7, 0.6]},
        ),
        Result(
            part="training",
            name="trl",
            arguments=asked | {"side": "trl"},
            figures=figures | {"pairs_per_second": 10.0, "losses": [0.7, 0.7], "peak_gib": 40.0},
        ),
        Result(part="margin", name="m", arguments={}, figures={"seconds_64": 0.002}),
        Result(part="rollouts", name="ppo, trl", arguments={}, skipped="no wheel"),
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(results)]
    assert {len(line) for line in (lines[0], *lines[2:])} == {len(HEADS)}
    ours = dict(zip(HEADS, lines[3], strict=True))
    assert ours["of the limit"] == "50%"
    assert ours["times TRL"] == "3.00, memory 0.25"
    assert "losses differ by 1.0e-01: NOT THE SAME WORK" in ours["remarks"]
    assert "planned 9 GiB, 0.90 of the peak" in ours["remarks"]
    assert lines[5][-1] == "0.09% of a reward step"  # 2 ms beside 64 pairs at 30 a second
    assert lines[6][-1] == "skipped: no wheel"


def test_useful_operations_of_a_pair_are_those_of_its_parameters(world):
    """Against the parameters that Transformers counts, six operations a token for training and two for a reference."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=False, **TOY.model))
    inner = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    world.policy.mkdir(parents=True)
    (world.policy / "config.json").write_text(json.dumps({"vocab_size": 100}))
    assert useful_flops(world, "reward", prompt=5, answers=7) == 6 * inner * 12
    head = model.lm_head.weight.numel()
    assert useful_flops(world, "dpo", prompt=5, answers=7) == 8 * (inner * 12 + head * 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["everything"], "everything: there is no such part; there are parity"),
        (["--rows", "pairs"], "--rows pairs: expected NAME=FILE"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["--only", "("], "'(' is no regular expression"),
    ],
)
def test_wrong_arguments_are_named(world, wrong, message, capsys):
    options = ["--tokenizer", str(world.tokenizer), "--prompts", str(world.prompts)]
    with pytest.raises(SystemExit) as ended:
        main([*options, "--rows", f"pairs={world.rows['pairs']}", *wrong])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
