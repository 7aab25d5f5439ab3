"""The stage as users start it: real processes, DeepSpeed, files."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.models.manifest import read_manifest

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tiny_model, tiny_pairs):
    folder = tmp_path_factory.mktemp("preference_recipe")
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}}}\n"
        f"data: {{train: {tiny_pairs}, eval_share: 0.2, cache_dir: {folder}/cache}}\n"
        "loss: {kind: ot_margin, parameters: {beta: 0.5}, scope: global_batch, nll_weight: 0.1}\n"
        "reference: {shard_pairs: 2}\n"
        "optim: {learning_rate: 3e-3}\n"
        "train: {global_batch_size: 12, micro_batch_tokens: 300, epochs: 2, evaluate_every: 4, checkpoint_every: 2}\n"
        "engine: {deepspeed: zero2}\n"
    )
    return path


def arguments(recipe, output, *overrides):
    return ["-m", "policy.preference", "--config", str(recipe), f"output={output}", *overrides]


SHORT = ("train.max_steps=4",)


@pytest.fixture(scope="session")
def one_rank(recipe, run_ranks):
    """The folder of a finished run on one rank, started as users start it."""
    folder = recipe.parent / "one_rank"
    run_ranks(arguments(recipe, folder, *SHORT, "engine.deepspeed=zero0"), ranks=1, cold=True)
    return folder


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, ["engine.deepspeed=zero1"]),
        (2, ["engine.deepspeed=zero2", "train.micro_batch_tokens=150"]),
        (2, ["engine.deepspeed=zero3"]),
        (2, ["engine.deepspeed=zero3", "reference.kind=live", "reference.placement=zero3"]),
    ],
    ids=["zero1", "zero2, smaller micro-batches", "zero3", "zero3, live sharded reference"],
)
def test_ranks_stages_and_references_give_one_curve(run_ranks, runs, recipe, one_rank, tmp_path, ranks, changes):
    run_ranks(arguments(recipe, tmp_path / "run", *SHORT, "train.publish=none", *changes), ranks=ranks)
    runs.assert_close(runs.rows(tmp_path / "run"), runs.rows(one_rank), 3e-4)
    runs.assert_close(runs.rows(tmp_path / "run", "eval"), runs.rows(one_rank, "eval"), 3e-4)
    moved = [row["loss"] for row in runs.rows(one_rank)]
    assert max(moved) - min(moved) > 0.02, "the curves agree because nothing was trained"


def test_single_items_say_what_the_evaluation_says(one_rank):
    rows = [json.loads(line) for line in (one_rank / "held_out.jsonl").read_text().splitlines()]
    evaluation = json.loads((one_rank / "evaluation.json").read_text())
    assert sum(row["value"] for row in rows) / len(rows) == pytest.approx(evaluation["accuracy"]["value"])
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    assert sum(gaps) / len(gaps) == pytest.approx(evaluation["mean_gap"])
    margins = [json.loads(line) for line in (one_rank / "margins.jsonl").read_text().splitlines()]
    assert [len(row["margin"]) for row in margins] == [12] * 4 and "similarity" not in margins[0]


@pytest.mark.slow
@pytest.mark.full
def test_killed_while_caching_and_while_training_equals_never_stopped(run_ranks, start_ranks, runs, recipe, tmp_path):
    lora = ["model.lora={rank: 4, alpha: 8, dropout: 0.1}", "optim.learning_rate=1e-2"]
    straight = [*lora, f"reference.cache={tmp_path / 'cache_straight'}"]
    run_ranks(arguments(recipe, tmp_path / "straight", *straight))
    killed = arguments(recipe, tmp_path / "killed", *lora, f"reference.cache={tmp_path / 'cache'}")
    shards = tmp_path / "cache" / "train"
    processes = start_ranks(killed, 2)
    runs.kill_when(processes, lambda: len(list(shards.glob("shard-*.npy"))) >= 3)
    before = {path: path.stat().st_mtime_ns for path in shards.glob("shard-*.npy")}
    assert len(before) < 36
    processes = start_ranks(killed, 2)
    runs.kill_when(processes, lambda: runs.step_is_saved(tmp_path / "killed", 4))
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    outputs = run_ranks(killed)
    assert "resuming from" in outputs[0]
    assert runs.rows(tmp_path / "killed") == runs.rows(tmp_path / "straight")
    assert runs.rows(tmp_path / "killed", "eval") == runs.rows(tmp_path / "straight", "eval")
    finals = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict() for name in ("killed", "straight")
    ]
    assert all(torch.equal(finals[0][name], value) for name, value in finals[1].items())


def test_final_is_a_plain_model_that_writes(one_rank):
    final = one_rank / "final"
    assert read_manifest(final).stage == "preference"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    messages = [{"role": "user", "content": "the sun"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.fixture
def other_family(tmp_path, tiny_tokenizer):
    """A model whose tokenizer ends texts with another token."""
    folder = tmp_path / "other"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=340, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_bad_input_gives_one_message_and_leaves_an_earlier_run_as_it_was(
    run_ranks, recipe, one_rank, other_family, tmp_path
):
    before = {path: path.stat().st_mtime_ns for path in (one_rank / "final").iterdir()}
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"prompt": "the sun", "chosen": "good", "rejected": " "}) + "\n")
    eating = tmp_path / "eats.jinja"
    eating.write_text("{{ messages[0]['content'] }}")
    cache = tmp_path / "cache"
    first = arguments(recipe, tmp_path / "first", "train.max_steps=1", "train.publish=none", f"reference.cache={cache}")
    run_ranks(first, ranks=1)
    refusals = {
        "row without a response": ([f"data.train={silent}"], "rejected is empty"),
        "template that eats the response": (
            [f"data.template={eating}"],
            "the template drops or rewrites the response",
        ),
        "reference from another tokenizer": ([f"reference.path={other_family}"], "has another tokenizer"),
        "cache of other data": ([f"reference.cache={cache}", "data.max_tokens=60"], "max_tokens: 1024 in the cache"),
    }
    for name, (changes, message) in refusals.items():
        (output,) = run_ranks(arguments(recipe, one_rank, *SHORT, *changes), ranks=1, expect=2)
        assert message in output, name
        assert "Traceback" not in output, name
    assert {path: path.stat().st_mtime_ns for path in (one_rank / "final").iterdir()} == before
