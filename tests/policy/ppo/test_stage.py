"""The stage as users start it: real processes, DeepSpeed, files."""

import json
import math
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy.ppo.__main__ import main
from policy.ppo.config import WatchConfig
from policy.ppo.stage import run
from rlhf.core.errors import ConfigError
from rlhf.core.files import RUN_FILES
from rlhf.models.manifest import MANIFEST_NAME, read_manifest
from rlhf.train.done import read_completion

pytestmark = pytest.mark.dist

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
WORKER = str(HERE / "workers" / "killed.py")
RULES = {"PYTHONPATH": f"{ROOT}:{HERE}"}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tiny_model, prompts_file, reward_folder, short_template):
    """14 responses a step in three minibatches; one held-out prompt, so that one of two ranks has none."""
    folder = tmp_path_factory.mktemp("ppo_recipe")
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"policy: {{path: {tiny_model}}}\n"
        f"reward: {{path: {reward_folder}}}\n"
        f"data: {{train: {prompts_file}, eval_share: 0.2, max_eval_prompts: 1, cache_dir: {folder}/cache,"
        f" template: {json.dumps(short_template)}}}\n"
        "rollout: {prompts: 7, samples: 2, max_new_tokens: 8, stop: [e], written: 3}\n"
        "kl: {coefficient: 0.1, controller: adaptive, target: 0.2, horizon: 100}\n"
        "critic: {optim: {learning_rate: 3e-3, schedule: constant, warmup_share: 0}}\n"
        "loss: {epochs: 1}\n"
        "ema: 0.5\n"
        "watch: {second: {function: 'rules:needs_a_response'}}\n"
        "optim: {learning_rate: 3e-3, schedule: constant, warmup_share: 0}\n"
        "train: {global_batch_size: 6, micro_batch_tokens: 200, max_steps: 3, evaluate_every: 2, checkpoint_every: 2,"
        " evaluate_first: false, tensorboard: false}\n"
        "engine: {deepspeed: zero2}\n"
    )
    return path


def arguments(recipe, output, *overrides):
    return ["--config", str(recipe), f"output={output}", *overrides]


@pytest.fixture(scope="session")
def one_rank(recipe, run_ranks):
    """The folder of a finished run on one rank by DeepSpeed, started as users start it where no home can be written."""
    folder = recipe.parent / "one_rank"
    given = arguments(recipe, folder, "engine.deepspeed=zero0", "train.publish=none")
    run_ranks(["-m", "policy.ppo", *given], ranks=1, cold=True, HOME="/proc/1", **RULES)
    return folder


def local(recipe, output, *overrides):
    """Arguments of :func:`main` for one rank of plain torch in this process."""
    return arguments(recipe, output, "engine.kind=local", *overrides)


@pytest.fixture(scope="session")
def local_run(recipe):
    """The folder of a finished and published run in this process."""
    assert main(local(recipe, recipe.parent / "local_run")) == 0
    return recipe.parent / "local_run"


TIMED = ("time/", "memory/", "tokens/s", "rollouts/s")
"""What differs from run to run."""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_single_responses_say_what_the_evaluation_says(local_run):
    rows, found = lines(local_run / "held_out.jsonl"), json.loads((local_run / "evaluation.json").read_text())
    assert len(rows) == found["prompts"]
    for name, value in (("value", found["reward"]["value"]), ("score", found["score"]["value"]), ("kl", found["kl"])):
        assert sum(row[name] for row in rows) / len(rows) == pytest.approx(value, abs=1e-6)
    assert all(row["prompt"] and "response" in row and "step" not in row for row in rows)


ZERO = {
    "zero1": ["engine.deepspeed=zero1"],
    "zero2, smaller batches": ["engine.deepspeed=zero2", "train.micro_batch_tokens=60", "rollout.batch_rows=3"],
    "zero3, gathered once": ["engine.deepspeed=zero3", "rollout.gather=once"],
    "zero3, all sharded, never gathered": [
        "engine.deepspeed=zero3", "rollout.gather=never", "reference.placement=zero3", "reward.placement=zero3"
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def two_ranks(recipe, run_ranks):
    """``two_ranks(name)``: the folder of a finished run on two ranks with the settings of that name in ZERO."""

    def get(name: str) -> Path:
        folder = recipe.parent / name
        if not (folder / "evaluation.json").exists():
            run_ranks(["-m", "policy.ppo", *arguments(recipe, folder, "train.publish=none", *ZERO[name])], **RULES)
        return folder

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO)
def test_two_ranks_of_any_zero_stage_give_the_curve_of_one(runs, one_rank, two_ranks, name):
    folder = two_ranks(name)
    runs.assert_close(runs.rows(folder), runs.rows(one_rank), 3e-4)
    runs.assert_close(runs.rows(folder, "eval"), runs.rows(one_rank, "eval"), 3e-4)
    assert texts_of(folder) == texts_of(one_rank)
    assert max(row["kl_k3"] for row in runs.rows(one_rank)) > 0.01, "the curves agree because nothing was trained"


def test_two_ranks_hand_over_to_one_in_the_middle(run_ranks, runs, recipe, one_rank, two_ranks):
    """Policy and critic under ZeRO-2, the average, the KL controller; rollouts of step 3 are drawn already."""
    name = "zero2, smaller batches"
    folder = recipe.parent / "handed over"
    shutil.copytree(two_ranks(name), folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    given = arguments(recipe, folder, "train.publish=none", *ZERO[name])
    (said,) = run_ranks(["-m", "policy.ppo", *given], ranks=1, **RULES)
    assert said.count("2 ranks then, 1 now") == 2 and "at step 2, written on 2 rank(s)" in said
    runs.assert_close(runs.rows(folder), runs.rows(one_rank), 3e-4)
    runs.assert_close(runs.rows(folder, "eval"), runs.rows(one_rank, "eval"), 3e-4)
    assert texts_of(folder) == texts_of(one_rank)


def test_plain_torch_gives_the_curve_of_deepspeed(runs, one_rank, local_run):
    runs.assert_close(runs.rows(local_run), runs.rows(one_rank), 3e-4)
    runs.assert_close(runs.rows(local_run, "eval"), runs.rows(one_rank, "eval"), 3e-4)
    assert texts_of(local_run) == texts_of(one_rank)


def texts_of(folder):
    return [row["response"] for row in lines(folder / "rollouts.jsonl")]


KILLS = [("generation", 2), ("scoring", 3), ("policy", 4), ("critic", 5), ("saving", 6)]
"""Checkpoints are of steps 2, 4 and 6."""

DRAWN = {"generation": {1, 2}, "scoring": {2, 3}, "policy": {4}, "critic": {5}, "saving": {6}, "none": {7}}
"""Steps drawn by the run that is killed in that phase. Step 3 is scored again but not drawn again; so is step 4."""


@pytest.mark.slow
def test_killed_in_every_phase_equals_never_stopped(runs, run_ranks, start_ranks, recipe, tmp_path):
    straight, killed = (
        arguments(recipe, tmp_path / name, "train.max_steps=7", "train.epochs=2", "train.publish=none")
        for name in ("straight", "killed")
    )
    first, _ = run_ranks([WORKER, "never", "0", *straight], **RULES)
    assert drawn_in(first) == set(range(1, 8))
    for phase, step in KILLS:
        ranks = start_ranks([WORKER, phase, str(step), *killed], 2, **RULES)
        said, _ = (rank.communicate(timeout=600)[0] for rank in ranks)
        assert ranks[0].returncode == -signal.SIGKILL, (phase, said)
        assert drawn_in(said) == DRAWN[phase], phase
    said, _ = run_ranks([WORKER, "never", "0", *killed], **RULES)
    assert "resuming from" in said and drawn_in(said) == DRAWN["none"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for kind in ("train", "eval"):
        assert runs.rows(killed, kind) == runs.rows(straight, kind)
    assert lines(killed / "rollouts.jsonl") == lines(straight / "rollouts.jsonl")
    finals = [weights_in(folder / "checkpoints" / "step-00000007" / "policy") for folder in (killed, straight)]
    assert all(torch.equal(finals[0][name], value) for name, value in finals[1].items())


def weights_in(folder: Path) -> dict:
    """Of a model under ZeRO-2 in a checkpoint."""
    return torch.load(folder / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)["module"]


def drawn_in(output: str) -> set[int]:
    return {int(step) for step in re.findall(r"drawing in step (\d+)", output)}


def test_final_is_a_plain_model_that_writes(local_run):
    final = local_run / "final"
    manifest = read_manifest(final)
    assert manifest.stage == "ppo" and manifest.loss["advantage"]["estimator"] == "gae"
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    messages = [{"role": "user", "content": "the sun"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.shape[1]


def test_the_run_folder_tells_what_was_done(one_rank):
    config, critic = (one_rank / name for name in ("config.yaml", "deepspeed_critic.json"))
    assert "coefficient: 0.1" in config.read_text()
    assert json.loads(critic.read_text())["zero_optimization"]["stage"] == 0
    evaluation = json.loads((one_rank / "evaluation.json").read_text())
    assert evaluation["prompts"] == 1 and math.isfinite(evaluation["kl_k3"])
    assert [row["step"] for row in lines(one_rank / "rollouts.jsonl")] == [1] * 3 + [2] * 3 + [3] * 3


def test_the_published_weights_are_the_average_of_the_chosen_step(local_run, tiny_model):
    step = json.loads((local_run / "evaluation.json").read_text())["step"]
    average = local_run / "checkpoints" / f"step-{step:08d}" / "average" / "rank00000.pt"
    final, start = (
        list(AutoModelForCausalLM.from_pretrained(path).parameters()) for path in (local_run / "final", tiny_model)
    )
    saved = torch.load(average, weights_only=True)
    assert all(torch.equal(value.flatten(), kept) for value, kept in zip(final, saved, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(final, start, strict=True))


def test_a_finished_run_started_again_changes_nothing(capsys, recipe, local_run):
    def written():
        return {path: path.read_bytes() for path in local_run.glob("*.json*") if path.name not in RUN_FILES}

    before, done = written(), read_completion(local_run)
    assert main(local(recipe, local_run)) == 0
    assert "resuming from" in capsys.readouterr().out
    assert written() == before
    assert done.stage == "ppo" and done.step == 3 and done == read_completion(local_run)


@pytest.mark.parametrize("change", ["kl.coefficient=0.2", "rollout.samples=3", "critic.optim.learning_rate=1e-5"])
def test_other_settings_are_another_run(capsys, recipe, local_run, change):
    before = {path: path.stat().st_mtime_ns for path in (local_run / "final").iterdir()}
    assert main(local(recipe, local_run, change)) == 2
    error = capsys.readouterr().err
    section = change.split(".")[0]
    assert "belongs to another run:" in error and f"\n  {section}: " in error
    assert {path: path.stat().st_mtime_ns for path in (local_run / "final").iterdir()} == before


@pytest.mark.parametrize("change", ["train.micro_batch_tokens=90", "rollout.written=1", "rollout.batch_rows=2"])
def test_what_has_no_effect_on_the_numbers_may_change(recipe, local_run, change):
    assert main(local(recipe, local_run, "train.publish=none", change)) == 0


# One rank in this process: refusals, and ways to end.


def test_a_run_by_a_server_that_goes_away_for_a_while_is_that_of_its_model(
    recipe, local_run, serving, reward_folder, tmp_path, caplog
):
    first = serving(reward_folder)
    port, own, passes, again = first.server_address[1], first.batcher._score, [], []

    def goes_away() -> None:
        first.shutdown()
        first.finish()
        while "Connection refused" not in caplog.text:
            time.sleep(0.02)
        again.append(serving(reward_folder, port=port))

    def score(rows):
        passes.append(len(rows))
        if len(passes) == 3:
            threading.Thread(target=goes_away).start()
            time.sleep(0.3)  # until nothing more is taken
        return own(rows)

    first.batcher._score = score
    served = ("reward.path=[]", f"reward.url={first.url}", f"critic.path={reward_folder}", "train.publish=none")
    assert main(local(recipe, tmp_path / "served", *served)) == 0
    assert again and again[0].batcher.counts.rows > 0 and first.batcher.counts.rows > 0
    assert f"reward.url: {first.url}: ConnectError: [Errno 111] Connection refused; it is asked again" in caplog.text
    pairs = zip(lines(local_run / "metrics.jsonl"), lines(tmp_path / "served" / "metrics.jsonl"), strict=True)
    for here, there in pairs:
        same = {name: value for name, value in here.items() if not name.startswith(TIMED)}
        assert {name: there[name] for name in same} == pytest.approx(same, rel=1e-3, abs=1e-4)


def test_help_and_dry_run(capsys, recipe):
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    assert "advantage.estimator" in capsys.readouterr().out
    assert main(["--config", str(recipe), "--dry-run", "kl.coefficient=0.25"]) == 0
    assert "coefficient: 0.25" in capsys.readouterr().out
    assert main(["--config", str(recipe), "kl.coeficient=0.25"]) == 2
    assert "did you mean kl.coefficient" in capsys.readouterr().err


REFUSALS = {
    "it raises": ("rules:raises", "rules:raises failed on 14 responses: RuntimeError: the scoring service is down"),
    "too few scores": ("rules:one_too_few", "rules:one_too_few gave 13 scores for 14 responses"),
    "no numbers": ("rules:no_numbers", "rules:no_numbers failed on 14 responses: ValueError"),
    "nothing": ("rules:nothing", "rules:nothing failed on 14 responses: TypeError"),
    "no function": ("rules:A_NUMBER", "rules:A_NUMBER: expected a function"),
    "no such function": ("rules:no_such", "reward rules:no_such: expected module:function"),
    "never a number": ("rules:always_not_a_number", "3 steps in a row (up to step 3) had a value that was not finite"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bad_reward_function_ends_with_one_message(capsys, recipe, tmp_path, name):
    """Anything but a message would be an exception here."""
    function, message = REFUSALS[name]
    changes = ["reward.path=[]", f"reward.function={function}", "data.eval_share=0"]
    assert main(local(recipe, tmp_path, *changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count(message) == 1 and "Traceback" not in error


def test_models_that_do_not_fit_end_with_one_message(capsys, recipe, local_run, tmp_path):
    cases = {
        "the ppo stage published it, it is no reward model": [f"reward.path={local_run / 'final'}"],
        "was trained on another form of text": ["data.template=plain"],
        "nothing: no tokenizer can be loaded from here": [f"critic.path={tmp_path / 'nothing'}"],
    }
    for message, changes in cases.items():
        assert main(local(recipe, tmp_path, *changes)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("role", ["reference", "critic"])
def test_a_model_with_another_tokenizer_is_refused(capsys, recipe, foreign_model, tmp_path, role):
    assert main(local(recipe, tmp_path, f"{role}.path={foreign_model}")) == 2
    assert f"{role}.path = {foreign_model} has another tokenizer than policy.path" in capsys.readouterr().err


def test_a_tripped_wire_ends_the_run_with_its_best_checkpoint(tiny_config, alone, caplog):
    config = replace(
        tiny_config,
        watch=WatchConfig(action="best", kl_budget=0.05),
        train=replace(tiny_config.train, max_steps=9, evaluate_every=0, publish="best", evaluate_first=True),
    )
    run(config, alone)
    rows = lines(config.output / "metrics.jsonl")
    steps = [row["step"] for row in rows if "kl" in row]
    assert 1 < steps[-1] < 9 and "taking the best checkpoint" in caplog.text
    chosen = json.loads((config.output / "evaluation.json").read_text())
    selections = {row["step"]: row["eval/selection"] for row in rows if "eval/selection" in row}
    assert len(selections) == 2 and selections[steps[-1]] < -1e5, "the end is over the budget"
    assert selections[chosen["step"]] == max(selections.values()) == chosen["selection"]
    assert chosen["step"] == 0 and chosen["kl"] == pytest.approx(0, abs=1e-5)
    assert "no step was as good as the start of the run" in caplog.text
    assert (config.output / "final" / MANIFEST_NAME).is_file()


def test_a_policy_over_its_budget_is_not_published_without_a_word(tiny_config, alone, caplog):
    config = replace(
        tiny_config,
        watch=WatchConfig(action="none", kl_budget=1e-3),
        train=replace(tiny_config.train, max_steps=2, evaluate_every=0, publish="last"),
    )
    found = run(config, alone)
    assert found.kl > 1e-3
    assert re.search(r"is \d+\.\d+ nats per response from the reference, beyond watch\.kl_budget = 0\.001", caplog.text)
    assert "train.publish=best with" in caplog.text


def test_the_best_step_needs_held_out_prompts(tiny_config, alone):
    data = replace(tiny_config.data, eval=(), eval_share=0.0)
    train = replace(tiny_config.train, evaluate_first=True, publish="best")
    config = replace(tiny_config, data=data, watch=WatchConfig(action="best"), train=train)
    with pytest.raises(ConfigError, match=r"watch\.action = best: there are no held-out prompts"):
        run(config, alone)
