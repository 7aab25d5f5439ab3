import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.stages import STAGES, read_stage, training
from rlhf.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
RECIPES = [
    path for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")) if "\nstages:" not in path.read_text()
]


def printed(capsys, *arguments: str, expect: int = 0) -> tuple[str, str]:
    assert main(["ds", *map(str, arguments)]) == expect
    found = capsys.readouterr()
    return found.out, found.err


def shown(capsys, *arguments: str) -> dict:
    return json.loads(printed(capsys, "show", *arguments)[0])


# ---- show


@pytest.mark.dist
def test_show_prints_what_the_run_saves(capsys, run_ranks, tiny_recipe, tmp_path):
    output = tmp_path / "run"
    settings = [f"output={output}", "engine.deepspeed=zero3_hpz", "train.max_steps=1", "optim.max_grad_norm=2"]
    run_ranks(["-m", "reward", *tiny_recipe, *settings, "train.publish=none"], 2)
    text, _ = printed(capsys, "show", *tiny_recipe, *settings, "--ranks", "2")
    assert text.strip() == (output / "deepspeed.json").read_text().strip()


def test_nothing_but_json_is_printed(tiny_recipe):
    command = [sys.executable, "-m", "launch.cli", "ds", "show", *tiny_recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["zero_optimization"]["stage"] == 2


def test_a_configuration_on_the_command_line_comes_before_that_of_the_recipe(capsys, tiny_recipe):
    assert shown(capsys, *tiny_recipe)["zero_optimization"]["stage"] == 2
    clipping = "optim.max_grad_norm=0.5"
    for words in (["zero3", *tiny_recipe, clipping], [*tiny_recipe, clipping, "zero3"]):
        resolved = shown(capsys, *words)
        assert resolved["gradient_clipping"] == 0.5
        assert resolved["zero_optimization"]["reduce_bucket_size"] == 32**2


def test_ranks_and_nodes_size_the_partition_of_a_node(capsys, tiny_recipe):
    resolved = shown(capsys, "zero3_hpz", *tiny_recipe, "--ranks", "16", "--nodes", "2")
    assert (resolved["train_batch_size"], resolved["zero_optimization"]["zero_hpz_partition_size"]) == (16, 8)
    _, complaint = printed(capsys, "show", *tiny_recipe, "--ranks", "3", "--nodes", "2", expect=2)
    assert "--ranks 3 --nodes 2: expected as many ranks on every node" in complaint


def test_the_name_of_a_frozen_configuration_says_so_itself(capsys, tiny_recipe):
    named = shown(capsys, "frozen_zero3", *tiny_recipe)
    assert named == shown(capsys, "zero3", "--frozen", *tiny_recipe)
    assert named["gradient_clipping"] == 0.0 and "sub_group_size" not in named["zero_optimization"]


def test_the_critic_has_a_configuration_and_a_clipping_of_its_own(capsys, tiny_model, tiny_recipe, tmp_path):
    recipe = ROOT / "launch" / "recipes" / "ppo_margin.yaml"
    settings = [f"policy.path={tiny_model}", "critic.deepspeed=zero3", "critic.optim.max_grad_norm=0.25"]
    found = shown(capsys, "--critic", "--config", recipe, *settings)
    assert (found["zero_optimization"]["stage"], found["gradient_clipping"]) == (3, 0.25)
    assert shown(capsys, "--config", recipe, *settings)["gradient_clipping"] != 0.25
    assert shown(capsys, "zero1", "--critic", "--config", recipe, *settings)["zero_optimization"]["stage"] == 1
    _, complaint = printed(capsys, "show", "--critic", *tiny_recipe, expect=2)
    assert "--role critic: no model of its own in this run of stage reward, which has reward model" in complaint


def test_any_model_of_a_run_can_be_shown_by_its_name(capsys, tiny_model):
    recipe = ["--config", ROOT / "launch" / "recipes" / "ppo_margin.yaml", f"policy.path={tiny_model}"]
    placed = [*recipe, f"reward.path={tiny_model}", "reward.placement=zero3"]
    found = shown(capsys, "--role", "reward model", *placed)
    assert found == shown(capsys, "frozen_zero3", *placed)
    _, complaint = printed(capsys, "show", "--role", "reward model", *recipe, "reward.placement=replicated", expect=2)
    assert "reward model: whole on every rank, without a DeepSpeed JSON; see reward.placement" in complaint
    _, complaint = printed(capsys, "show", "--role", "judge", *placed, expect=2)
    assert "--role judge" in complaint and "reward model, policy" in complaint


def test_a_model_that_is_not_here_can_be_described(capsys, tiny_recipe):
    settings = ["model.path=some/model", "--model-config", "llama-3-8b"]
    assert shown(capsys, "zero3", *tiny_recipe, *settings)["zero_optimization"]["reduce_bucket_size"] == 4096**2


def test_a_precision_that_depends_on_the_machine_is_said_to(capsys, tiny_recipe):
    _, note = printed(capsys, "show", *tiny_recipe)
    assert "engine.precision=auto is " in note and "reward" in note
    assert printed(capsys, "show", *tiny_recipe, "engine.precision=bfloat16")[1] == ""


def test_all_problems_of_a_configuration_are_shown_at_once(capsys, tiny_recipe, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimisation": {}, "gradient_clipping": 0.1}')
    _, complaint = printed(capsys, "show", path, *tiny_recipe, expect=2)
    assert f"{path}: 2 problems" in complaint and "did you mean zero_optimization?" in complaint


def test_a_run_without_deepspeed_has_nothing_to_show(capsys, tiny_recipe):
    _, complaint = printed(capsys, "show", *tiny_recipe, "engine.kind=local", expect=2)
    assert "engine.kind = local: such a run has no DeepSpeed JSON" in complaint


def test_two_configurations_are_refused(capsys, tiny_recipe):
    _, complaint = printed(capsys, "show", "zero2", "zero3", *tiny_recipe, expect=2)
    assert "zero2 zero3: expected one configuration" in complaint


# ---- which stage


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_stage_of_a_shipped_recipe_is_found_without_being_named(recipe):
    (named,) = training().keys() & set(recipe.stem.replace("grpo", "ppo").split("_"))
    if named == "sft":  # all its settings are also those of others
        with pytest.raises(ConfigError, match="say which with --stage"):
            read_stage([recipe], [], None, program="test")
        return
    assert read_stage([recipe], [], None, program="test")[0].name == named


def test_a_recipe_that_several_stages_take_needs_its_stage(tmp_path):
    path = tmp_path / "any.yaml"
    path.write_text("output: o\nmodel: {path: m}\ndata: {train: d}\n")
    with pytest.raises(ConfigError, match=r"any\.yaml: could be a recipe of sft, reward, preference; say which"):
        read_stage([path], [], None, program="test")
    assert read_stage([path], [], "sft", program="test")[0] is STAGES["sft"]


def test_a_recipe_of_no_stage_is_refused_with_the_faults_of_the_nearest(tmp_path):
    path = tmp_path / "odd.yaml"
    faulty = "margin: {parameters: {epsilon: 0}}\noptim: {learning_rte: 1}\n"
    path.write_text("output: o\nmodel: {path: m}\ndata: {train: d}\n" + faulty)
    with pytest.raises(ConfigError, match=r"(?s)no recipe of any stage .* As one of \w+:.*mean optim.learning_rate"):
        read_stage([path], [], None, program="test")


# ---- lint


def test_lint_lists_the_problems_of_every_file_and_what_the_others_fit(capsys, tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"bf16": {"enabled": true}, "gradient_clipping": 0.5} // mine')
    bad.write_text('{"bf16": {"enabled": true}, "fp16": {"enabled": true}, "optimizer": {"type": "AdamW"}}')
    text, _ = printed(capsys, "lint", bad, good, "zero2", expect=1)
    first, *lines = text.splitlines()
    assert first == f"{bad}: 3 problems"
    assert lines[0].startswith("  optimizer: the run builds its own optimizer; remove this section (instead: optim.")
    assert lines[-2:] == [
        f"{good}: fits runs with engine.precision=bfloat16, optim.max_grad_norm=0.5",
        "ds_configs/train_zero2.json: fits any run",
    ]
    printed(capsys, "lint", good, "zero2")


def test_lint_reports_an_op_that_cannot_be_built_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler, no ninja
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # nothing compiled before
    text, _ = printed(capsys, "lint", "zero2_offload", expect=1)
    assert "offload needs DeepSpeed's op cpu_adam" in text
    assert "missing a C++ compiler" in text and "ninja" in text
    text, _ = printed(capsys, "lint", "zero2")
    assert "fits any run" in text


def test_a_file_that_cannot_be_read_ends_the_linter(capsys):
    _, complaint = printed(capsys, "lint", "no/such.json", expect=2)
    assert "no/such.json: cannot be read: No such file" in complaint
