"""The stage as users start it: real processes, DeepSpeed, files."""

import json
import math
import os
import signal
import time

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward.score import load_scorer
from rlhf.models.manifest import read_manifest

pytestmark = pytest.mark.dist
NOT_COMPARED = ("time/", "padding_share", "margin/residual", "margin/transport_cost")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tiny_model, tiny_pairs):
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}, head_init_scale: 10, lora: {{rank: 4, alpha: 8, dropout: 0.1}}}}\n"
        f"data: {{train: {tiny_pairs}, eval_share: 0.2, cache_dir: {folder}/cache}}\n"
        "margin: {kind: ot, queue_pairs: 12}\n"
        "optim: {learning_rate: 1e-2}\n"
        "train: {global_batch_size: 12, micro_batch_tokens: 300, epochs: 2, evaluate_every: 4, checkpoint_every: 2}\n"
        "engine: {deepspeed: zero2}\n"
    )
    return path


def rows(folder, kind="train"):
    """Rows of metrics.jsonl, without what may differ between equal runs."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [row for row in found if any(name.startswith("eval/") for name in row) == (kind == "eval")]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)} for row in wanted]


def arguments(recipe, output, *overrides):
    return ["-m", "reward", "--config", str(recipe), f"output={output}", *overrides]


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            assert math.isclose(left[name], value, rel_tol=tolerance, abs_tol=tolerance), (right["step"], name)


GLOBAL = ("margin.queue_pairs=0", "margin.scope=global_batch", "model.lora.dropout=0", "train.max_steps=4")


@pytest.fixture
def one_rank(tmp_path_factory, recipe, run_ranks):
    """The folder of a finished run on one rank; made once."""
    folder = recipe.parent / "one_rank"
    if not (folder / "final").is_dir():
        run_ranks(arguments(recipe, folder, *GLOBAL, "engine.deepspeed=zero1"), ranks=1)
    return folder


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, ["engine.deepspeed=zero2"]),
        (2, ["engine.deepspeed=zero3"]),
        (1, ["engine.kind=local", "train.micro_batch_tokens=100000"]),
    ],
    ids=["2 ranks zero2", "2 ranks zero3", "1 rank plain torch, one micro-batch"],
)
def test_ranks_stages_and_packing_give_one_curve(run_ranks, recipe, one_rank, tmp_path, ranks, changes):
    run_ranks(arguments(recipe, tmp_path / "run", *GLOBAL, *changes), ranks=ranks)
    assert_close(rows(tmp_path / "run"), rows(one_rank), 2e-4)
    assert_close(rows(tmp_path / "run", "eval"), rows(one_rank, "eval"), 2e-4)
    moved = [row["loss"] for row in rows(one_rank)]
    assert max(moved) - min(moved) > 0.02, "the curves agree because nothing was trained"


def kill_after(processes, folder, step):
    """Kill -9 all ranks once the checkpoint of ``step`` is there and a later step is logged."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        metrics = folder / "metrics.jsonl"
        done = metrics.exists() and f'"step": {step + 1},' in metrics.read_text()
        if done and (folder / "checkpoints" / f"step-{step:08d}").is_dir():
            break
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_killed_and_resumed_equals_never_stopped(run_ranks, start_ranks, recipe, tmp_path):
    run_ranks(arguments(recipe, tmp_path / "straight"))
    processes = start_ranks(arguments(recipe, tmp_path / "killed"), 2)
    kill_after(processes, tmp_path / "killed", 4)
    newest = max((tmp_path / "killed" / "checkpoints").glob("step-????????"))
    weights = max(newest.rglob("*optim_states.pt"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-100])  # and the newest checkpoint is damaged, too
    outputs = run_ranks(arguments(recipe, tmp_path / "killed"))
    assert f"{newest} is damaged" in outputs[0]
    assert "resuming from" in outputs[0]
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    assert rows(tmp_path / "killed", "eval") == rows(tmp_path / "straight", "eval")
    finals = [torch_weights(tmp_path / name / "final") for name in ("killed", "straight")]
    assert all(torch.equal(finals[0][name], value) for name, value in finals[1].items())


def torch_weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_final_is_a_plain_model_with_its_manifest(one_rank):
    final = one_rank / "final"
    manifest = read_manifest(final)
    assert manifest.stage == "reward" and manifest.rewards.count > 0
    assert manifest.margin_statistics["margin/mean"] > 0
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    messages = [{"role": "user", "content": "the sun"}, {"role": "assistant", "content": "is good"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids[-1] == tokenizer.eos_token_id
    model = AutoModelForSequenceClassification.from_pretrained(final)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model(torch.tensor([ids])).logits.shape == (1, 1)
    assert not (final / "adapter_config.json").exists()
    load_scorer(final)  # which refuses a tokenizer that is not the manifest's


def test_bad_settings_leave_an_earlier_run_as_it_was(run_ranks, recipe, one_rank, tmp_path):
    """Every refusal: one message that names the thing, exit code 2, and final/ untouched."""
    before = {path: path.stat().st_mtime_ns for path in (one_rank / "final").iterdir()}
    changes = {
        "optim.learning_rate=0.5": "optim: ",
        "data.train=no_such_file.jsonl": "no_such_file.jsonl",
        "train.resume=never": "train.resume = never",
    }
    for change, message in changes.items():
        (output,) = run_ranks(arguments(recipe, one_rank, *GLOBAL, change), ranks=1, expect=2)
        assert message in output
        assert "Traceback" not in output
    assert {path: path.stat().st_mtime_ns for path in (one_rank / "final").iterdir()} == before
