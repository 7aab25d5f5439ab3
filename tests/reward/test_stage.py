"""The stage as users start it: real processes, DeepSpeed, files."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward.score import load_scorer
from rlhf.models.manifest import read_manifest

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tiny_model, tiny_pairs):
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}, head_init_scale: 10, lora: {{rank: 4, alpha: 8, dropout: 0.1}}}}\n"
        f"data: {{train: {tiny_pairs}, eval_share: 0.2, cache_dir: {folder}/cache}}\n"
        "margin: {kind: ot, parameters: {queue_pairs: 12}}\n"
        "optim: {learning_rate: 1e-2}\n"
        "train: {global_batch_size: 12, micro_batch_tokens: 300, epochs: 2, evaluate_every: 4, checkpoint_every: 2}\n"
        "engine: {deepspeed: zero2}\n"
    )
    return path


def arguments(recipe, output, *overrides):
    return ["-m", "reward", "--config", str(recipe), f"output={output}", *overrides]


GLOBAL = (
    "margin.parameters={scope: global_batch, queue_pairs: 0}",
    "model.lora.dropout=0",
    "train.max_steps=4",
)


@pytest.fixture(scope="session")
def one_rank(recipe, run_ranks):
    """The folder of a finished run on one rank, started as users start it."""
    folder = recipe.parent / "one_rank"
    run_ranks(arguments(recipe, folder, *GLOBAL, "engine.deepspeed=zero1"), ranks=1, cold=True)
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
def test_ranks_stages_and_packing_give_one_curve(run_ranks, runs, recipe, one_rank, tmp_path, ranks, changes):
    run_ranks(arguments(recipe, tmp_path / "run", *GLOBAL, "train.publish=none", *changes), ranks=ranks)
    runs.assert_close(runs.rows(tmp_path / "run"), runs.rows(one_rank), 2e-4)
    runs.assert_close(runs.rows(tmp_path / "run", "eval"), runs.rows(one_rank, "eval"), 2e-4)
    moved = [row["loss"] for row in runs.rows(one_rank)]
    assert max(moved) - min(moved) > 0.02, "the curves agree because nothing was trained"


def test_single_items_and_margins_say_what_the_summaries_say(one_rank):
    rows = read_lines(one_rank / "held_out.jsonl")
    evaluation = json.loads((one_rank / "evaluation.json").read_text())
    assert len(rows) == evaluation["accuracy"]["pairs"] == len({row["row"] for row in rows})
    assert sum(row["value"] for row in rows) / len(rows) == pytest.approx(evaluation["accuracy"]["value"])
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    assert sum(gaps) / len(gaps) == pytest.approx(evaluation["mean_gap"])
    told = [gap for gap, row in zip(gaps, rows, strict=True) if "prompt" in row]
    assert {min(gaps), max(gaps), min(gaps, key=abs)} <= set(told)
    steps = {row["step"]: row for row in read_lines(one_rank / "metrics.jsonl") if "margin/mean" in row}
    margins = read_lines(one_rank / "margins.jsonl")
    assert [row["step"] for row in margins] == [*steps] and all(len(row["similarity"]) == 12 for row in margins)
    for row in margins:
        assert sum(row["margin"]) / 12 == pytest.approx(steps[row["step"]]["margin/mean"], rel=1e-3)
        assert sum(row["gap"]) / 12 == pytest.approx(steps[row["step"]]["gap"], rel=1e-3, abs=1e-5)


def test_a_run_folder_says_where_and_on_what_it_was_made(one_rank):
    environment = json.loads((one_rank / "environment.json").read_text())
    assert [rank["device"] for rank in environment["ranks"]] == ["cuda" if torch.cuda.is_available() else "cpu"]
    assert environment["packages"]["torch"] == torch.__version__
    data = json.loads((one_rank / "data.json").read_text())
    assert data["train"]["fingerprint"] == read_manifest(one_rank / "final").training_data
    assert data["eval"]["items"] == len(read_lines(one_rank / "held_out.jsonl"))
    assert any(line.startswith("template:") for line in data["report"])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.full
def test_killed_and_resumed_equals_never_stopped(run_ranks, start_ranks, runs, recipe, tmp_path):
    run_ranks(arguments(recipe, tmp_path / "straight"))
    processes = start_ranks(arguments(recipe, tmp_path / "killed"), 2)
    runs.kill_when(processes, lambda: runs.step_is_saved(tmp_path / "killed", 4))
    newest = max((tmp_path / "killed" / "checkpoints").glob("step-????????"))
    weights = max(newest.rglob("*optim_states.pt"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-100])  # and the newest checkpoint is damaged, too
    outputs = run_ranks(arguments(recipe, tmp_path / "killed"))
    assert f"{newest} is damaged" in outputs[0]
    assert "resuming from" in outputs[0]
    assert runs.rows(tmp_path / "killed") == runs.rows(tmp_path / "straight")
    assert runs.rows(tmp_path / "killed", "eval") == runs.rows(tmp_path / "straight", "eval")
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
