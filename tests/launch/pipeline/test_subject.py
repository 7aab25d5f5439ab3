"""What a pipeline is told before its first stage starts."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from launch.cli import main
from launch.doctor import Subject, inputs, network
from launch.jobs.launcher import Machine
from launch.pipeline import run as running
from launch.pipeline.recipe import load_pipeline
from launch.pipeline.sweep import plan_sweep
from launch.runs import Pipeline
from launch.stages import STAGES
from rlhf.core.errors import UserError


@pytest.fixture
def pipeline(tmp_path, tiny_model, tiny_pairs):
    """``pipeline({stage: {key: value}})``: sft, a reward model, and PPO from both; with changes."""

    def write(changes: dict[str, dict] | None = None, output: str | None = None) -> Path:
        engine = {"engine.deepspeed": "zero2"}
        rollout = {"rollout.prompts": 4, "rollout.max_new_tokens": 8, "train.global_batch_size": 4}
        stages = {
            "sft": {"model.path": str(tiny_model), "data.train": str(tiny_pairs), "data.columns.completion": "chosen"},
            "reward": {"model.path": "${stages.sft.final}", "data.train": str(tiny_pairs)},
            "ppo": {
                "policy.path": "${stages.sft.final}",
                "reward.path": "${stages.reward.final}",
                "data.train": str(tiny_pairs),
                **rollout,
            },
        }
        settings = {name: engine | own | (changes or {}).get(name, {}) for name, own in stages.items()}
        more = {name: own for name, own in (changes or {}).items() if name not in stages}
        tree = {"output": output or f"{tmp_path}/out", "stages": {}}
        for name, own in {**settings, **more}.items():
            kind = own.pop("kind", name)
            tree["stages"][name] = {"kind": kind, "set": _nested(own)}
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


def subject_of(pipeline: Pipeline) -> Subject:
    return Subject(ranks=1, output=pipeline.output, stages=pipeline.stages, pipeline=pipeline)


def _nested(flat: dict) -> dict:
    tree: dict = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for each in parents:
            node = node.setdefault(each, {})
        node[last] = value
    return tree


@pytest.fixture
def found(capsys):
    """``found(path)``: the findings of ``rlhf doctor --quick`` by check."""

    def ask(path: Path, *arguments: str) -> dict[str, list[dict]]:
        main(["doctor", "--quick", "--json", "--config", str(path), *arguments])
        rows: dict[str, list[dict]] = {}
        for row in json.loads(capsys.readouterr().out):
            rows.setdefault(row["check"], []).append(row)
        return rows

    return ask


def failures(rows: dict[str, list[dict]], check: str) -> list[str]:
    return [row["text"] for row in rows.get(check, []) if row["status"] == "failure"]


def test_a_pipeline_of_sound_stages_has_no_failure(pipeline, found):
    rows = found(pipeline())
    assert [row for each in rows.values() for row in each if row["status"] == "failure"] == []


# ---- DeepSpeed configurations


@pytest.mark.parametrize(
    ("changes", "setting", "fault"),
    [
        ({"engine.deepspeed": "zero9"}, "ppo.engine.deepspeed", "zero9: no such DeepSpeed configuration"),
        ({"critic.deepspeed": "zero8"}, "ppo.critic.deepspeed", "zero8: no such DeepSpeed configuration"),
        ({"reference.placement": "zero7"}, "ppo.reference.placement", "zero7: no such DeepSpeed configuration"),
        ({"reward.placement": "{folder}/half.json"}, "ppo.reward.placement", "half.json: invalid JSON at line 1"),
        ({"reward.placement": "{folder}/two.json"}, "ppo.reward.placement", "sharded by ZeRO-3, and this is stage 2"),
    ],
)
def test_a_configuration_that_only_the_last_stage_uses_is_a_failure(pipeline, found, tmp_path, changes, setting, fault):
    (tmp_path / "half.json").write_text('{"zero_optimization": {')
    (tmp_path / "two.json").write_text('{"zero_optimization": {"stage": 2}}')
    rows = found(pipeline({"ppo": {key: text.format(folder=tmp_path) for key, text in changes.items()}}))
    (text,) = failures(rows, "DeepSpeed ops")
    assert setting in text and fault in text


def test_nvme_without_its_op_is_a_failure_of_the_stage_that_needs_it(pipeline, found, no_programs):
    rows = found(pipeline({"ppo": {"engine.deepspeed": "zero3_nvme", "engine.nvme_path": str(no_programs)}}))
    (text,) = failures(rows, "DeepSpeed ops")
    assert "async_io" in text and "missing a C++ compiler" in text and "ppo.engine.deepspeed" in text


def test_no_stage_starts_where_a_later_one_would_be_refused(pipeline, monkeypatch):
    def started(*arguments, **more):
        raise AssertionError("a stage was started")

    monkeypatch.setattr(running, "Job", started)
    recipe = load_pipeline(pipeline({"ppo": {"critic.deepspeed": "zero8"}}))
    run = running.PipelineRun(recipe, running.RunOptions(machine=Machine(ranks=1)), Console(record=True))
    with pytest.raises(UserError, match=r"not ready(.|\n)*ppo\.critic\.deepspeed: zero8: no such DeepSpeed"):
        run.run()


def test_a_batch_is_held_against_the_ranks_of_the_stage(pipeline, found, tmp_path):
    """DeepSpeed counts one row a rank; the JSON is that of a run on two."""
    (tmp_path / "two_ranks.json").write_text('{"train_batch_size": 2, "zero_optimization": {"stage": 2}}')
    path = pipeline({"ppo": {"engine.deepspeed": f"{tmp_path}/two_ranks.json"}})
    assert failures(found(path, "--ranks", "2"), "DeepSpeed ops") == []
    (text,) = failures(found(path, "--ranks", "1"), "DeepSpeed ops")
    assert "train_batch_size = 2" in text
    nodes = tmp_path / "hosts"
    nodes.write_text("one slots=1\ntwo slots=1\n")
    assert failures(found(path, "--hostfile", str(nodes)), "DeepSpeed ops") == []
    tree = yaml.safe_load(path.read_text())
    tree["stages"]["ppo"]["ranks"] = 2
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert failures(found(path, "--ranks", "1"), "DeepSpeed ops") == []


# ---- models that a stage is still to make


def test_stages_that_start_from_another_one_need_the_same_room(pipeline, found, tiny_model):
    """Nothing is on disk but the first model; against the same stages that all start from it."""
    rows = found(pipeline(), "--ranks", "1")
    direct = {"reward": {"model.path": str(tiny_model)}, "ppo": {"policy.path": str(tiny_model)}}
    expected = found(pipeline(direct), "--ranks", "1")
    for check in ("disk", "host memory"):
        ((mine,), (other,)) = rows[check], expected[check]
        assert mine["values"]["needed_bytes"] == other["values"]["needed_bytes"] > 0


def test_a_pipeline_that_names_its_folder_with_a_dot_is_no_exception(pipeline, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (disk,) = found(pipeline(output="./out"))["disk"]
    (expected,) = found(pipeline(output="out"))["disk"]
    (partial,) = found(pipeline(), "--set", "reward.model.path=no/such", "ppo.policy.path=no/such")["disk"]
    assert disk["values"]["needed_bytes"] == expected["values"]["needed_bytes"] > partial["values"]["needed_bytes"] > 0


@pytest.mark.parametrize("spelling", ["{final}/", "./{final}", "{final}/../final"])
def test_plan_doctor_and_pipeline_know_a_folder_however_it_is_spelled(
    pipeline, found, tmp_path, monkeypatch, capsys, spelling
):
    monkeypatch.chdir(tmp_path)
    path = pipeline({"reward": {"model.path": spelling.format(final="out/sft/final")}}, output="out")
    assert main(["plan", "pipeline", "--config", str(path), "--device", "cpu", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert plans["reward"]["models"][0]["parameters"] > 0
    rows = found(path)
    assert [row for row in rows["host memory"] if row["status"] == "warning"] == []
    assert failures(rows, "input files") == []


@pytest.mark.parametrize("output", ["out", "./out", "{folder}/out"])
def test_what_a_stage_is_to_make_is_no_hub_name(pipeline, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subject = subject_of(load_pipeline(pipeline(output=output.format(folder=tmp_path))))
    (finding,) = network.hub(subject)
    assert finding.status == "ok", finding
    other = subject_of(load_pipeline(pipeline(), ["reward.model.path=some/model"]))
    (finding,) = network.hub(other)
    assert finding.status == "warning" and "(some/model are not folders here)" in finding.text


def test_a_stage_that_is_done_still_counts_as_what_others_start_from(pipeline):
    """A pipeline that goes on asks for what is ahead; the folder of an earlier stage may have been moved."""
    recipe = load_pipeline(pipeline())
    ahead = Subject(output=recipe.output, stages=(recipe.named("ppo"),), pipeline=recipe)
    assert ahead.will_make(recipe.named("sft").final)
    assert [plan.roles.main.model.origin for _, plan in ahead.planned] == [
        f"{recipe.named('sft').config.model.path}/config.json"
    ]


# ---- what stages read


@pytest.fixture
def missing(pipeline, found):
    """``missing(changes)``: the failures of the check of input files of a pipeline with ``changes``."""
    return lambda changes: failures(found(pipeline(changes)), "input files")


def test_data_that_only_the_last_stages_read_is_looked_for(missing, tmp_path):
    (tmp_path / "prompts.jsonl").touch()
    (text,) = missing({"ppo": {"data.train": f"{tmp_path}/promts.jsonl"}})
    wanted = f"ppo.data.train: {tmp_path}/promts.jsonl: no such file or folder; did you mean {tmp_path}/prompts.jsonl?"
    assert text == wanted


def test_a_file_that_several_stages_miss_is_one_failure_that_names_their_settings(missing):
    own = {"data.train": "no/such/file.jsonl"}
    (text,) = missing({"sft": own, "reward": own, "ppo": own})
    assert text.startswith("sft.data.train, reward.data.train, ppo.data.train: no/such/file.jsonl: no such file")


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"data.train": ["{pairs}", {"path": "{folder}/none.csv", "weight": 2}]}, "data.train"),
        ({"data.eval": ["{pairs}", "{folder}/none.parquet"]}, "data.eval"),
        ({"data.train": "{folder}/none-*.jsonl"}, "data.train"),
        ({"data.train": "{folder}"}, "data.train"),
        ({"data.train": "pairs.of.nobody.jsonl.gz"}, "data.train"),
        ({"pretraining.data.train": "{folder}/none.jsonl"}, "pretraining.data.train"),
        ({"reward.path": ["{folder}/none/final"]}, "reward.path"),
        ({"critic.path": "{folder}/none"}, "critic.path"),
        ({"reference.path": "runs/of/nobody"}, "reference.path"),
    ],
)
def test_every_form_of_a_source_is_looked_for(missing, tmp_path, tiny_pairs, settings, setting):
    folder = tmp_path / "empty"
    folder.mkdir()

    def filled(node):
        if isinstance(node, str):
            return node.format(folder=folder, pairs=tiny_pairs)
        if isinstance(node, list):
            return [filled(each) for each in node]
        return {key: filled(value) for key, value in node.items()} if isinstance(node, dict) else node

    (text,) = missing({"ppo": filled(settings)})
    assert text.startswith(f"ppo.{setting}: ")


def test_the_files_of_an_evaluation_and_of_an_import_are_looked_for(missing, tmp_path, tiny_model):
    texts = missing(
        {
            "base": {"kind": "import", "source": f"{tmp_path}/none.gguf"},
            "judge": {
                "kind": "evaluate",
                "reference": str(tiny_model),
                "policies": {"ours": "${stages.ppo.final}", "theirs": f"{tmp_path}/theirs"},
                "prompts": f"{tmp_path}/none.jsonl",
                "reward": f"{tmp_path}/reward",
            },
        }
    )
    named = [text.partition(": ")[0] for text in texts]
    assert named == ["base.source", "judge.prompts", "judge.policies.theirs", "judge.reward"]


def test_what_may_be_on_the_hub_or_is_still_to_be_made_is_not_missing(missing, tiny_model):
    judge = {
        "kind": "evaluate",
        "reference": str(tiny_model),
        "prompts": "${stages.ppo.output}/rollouts.jsonl",
        "reward": "launch.quickstart.gold:gold_reward",
    }
    hub = {"data.train": "owner/pairs", "data.eval": ["squad"]}
    made = {"data.train": "${stages.sft.output}/more/*.jsonl", "critic.path": "owner/model"}
    assert missing({"reward": hub, "ppo": made, "judge": judge}) == []


def test_a_recipe_that_stands_alone_is_looked_at_too(capsys, tiny_recipe):
    assert main(["doctor", "--quick", *tiny_recipe, "--set", "data.eval=none.jsonl"]) == 1
    assert "failure  input files: data.eval: none.jsonl: no such file or folder" in capsys.readouterr().out
    assert main(["doctor", "--quick", *tiny_recipe]) == 0
    assert "ok       input files: 2 path(s)" in capsys.readouterr().out


def test_a_model_that_can_be_no_hub_name_is_missing_and_not_asked_of_the_hub(stage, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subject = Subject(stages=(stage("model.path=runs/of/nobody"),))
    (finding,) = inputs.inputs(subject)
    assert finding.status == "failure" and finding.text == "model.path: runs/of/nobody: no such folder"
    assert finding.remedy
    (finding,) = network.hub(subject)
    assert finding.status == "ok"


def test_runs_of_a_sweep_share_the_models_that_their_plans_are_made_of(monkeypatch, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: d.jsonl}\n")
    seen = []
    monkeypatch.setattr("launch.plan.planner.plan_stage", lambda *words: seen.append(words[-1].sources))
    sweep = plan_sweep(STAGES["preference"], [recipe], ["loss.kind=sigmoid,ipo,hinge"], tmp_path / "sweep")
    assert len(subject_of(sweep.pipeline).plans) == 3
    assert len(seen) == 3 and len({id(sources) for sources in seen}) == 1
