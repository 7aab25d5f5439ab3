"""Pipeline recipes: what they may refer to, and what is refused before anything starts."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from launch.pipeline.recipe import load_pipeline
from rlhf.config import parse_command_line
from rlhf.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
CIRCLE = {"a": {"set": {"source": "${stages.b.final}"}}, "b": {"set": {"source": "${stages.a.final}"}}}
MISSPELLED = {"alpha": {}, "b": {"set": {"source": "${stages.alhpa.final}"}}}
SAME_FOLDER = {"a": {"set": {"output": "x"}}, "b": {"set": {"output": "x"}}}
CHAIN = {"c": {"set": {"source": "${stages.b.final}"}}, "a": {}, "b": {"set": {"source": "${stages.a.final}"}}}


def test_stages_run_after_those_that_they_refer_to(toys):
    toys.write(CHAIN)
    pipeline = toys.load()
    assert [stage.name for stage in pipeline.stages] == ["a", "b", "c"]
    assert [stage.needs for stage in pipeline.stages] == [(), ("a",), ("b",)]
    assert pipeline.named("b").config.source == str(toys.folder / "out" / "a" / "final")


def test_stages_that_are_strangers_keep_the_order_of_the_recipe(toys):
    toys.write({"z": {}, "m": {}, "a": {}})
    assert [stage.name for stage in toys.load().stages] == ["z", "m", "a"]


def test_after_makes_one_wait_for_another(toys):
    toys.write({"a": {"after": ["b"]}, "b": {}})
    assert [stage.name for stage in toys.load().stages] == ["b", "a"]


ODD = {
    "plain": "a, b: {c} \\${x} 'd' 1e5",
    "escaped": "\\\\\\${x} \\${y}",
    "lines": "one\ntwo: 'three'\n",
    "number": "1e-5",
    "truth": "true",
    "nothing": "null",
    "unicode": "ä # no comment",
    "empty": "",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_the_command_of_a_stage_gives_its_config_to_the_stage_itself(toys, text):
    toys.write({"a": {"set": {"number": 7, "data": text, "source": text}}})
    toys.path.write_text(json.dumps(yaml.safe_load(toys.path.read_text())))  # all text in quotes
    stage = toys.load().named("a")
    stage.write_recipe()
    from toy_stage import ToyConfig

    again = parse_command_line(ToyConfig, stage.arguments, program="toy", description="").config
    assert again == stage.config
    assert again.data == OmegaConf.create({"x": text}).x


def test_settings_may_be_nested_or_dotted_and_reach_into_lists(tmp_path):
    recipe = tmp_path / "reward.yaml"
    recipe.write_text("output: o\nmodel: {path: m}\ndata: {train: [{path: a}, {path: b, weight: 2}]}\n")
    entry = {
        "recipe": str(recipe),
        "set": {"data": {"max_tokens": 99}, "optim.learning_rate": 1e-3, "data.train[1].path": "c", "model.lora": {}},
    }
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"output": "runs/one", "stages": {"reward": entry}}))
    (stage,) = load_pipeline(path).stages
    config = stage.config
    assert (config.data.max_tokens, config.optim.learning_rate, config.model.lora.rank) == (99, 1e-3, 32)
    assert [(each.path, each.weight) for each in config.data.train] == [("a", 1.0), ("c", 2.0)]


def test_settings_on_the_command_line_win(toys):
    toys.write({"a": {"set": {"number": 1}}, "b": {"set": {"number": "${vars.n}"}}}, vars={"n": 3})
    pipeline = toys.load("a.number=5", "vars.n=4")
    assert [stage.config.number for stage in pipeline.stages] == [5, 4]


def test_a_variable_that_nobody_knows_is_refused(toys):
    toys.write({"a": {"set": {"number": "${vars.count}"}}}, vars={"count": 3})
    with pytest.raises(ConfigError, match=r"vars.cuont=4: expected one of vars: count \(did you mean vars.count\?\)"):
        toys.load("vars.cuont=4")


def test_a_stage_may_be_left_empty(toys):
    toys.path.write_text(f"output: {toys.folder}/out\nstages:\n  toy:\n")
    assert toys.load().named("toy").stage.name == "toy"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (CIRCLE, "circle: (a -> b -> a|b -> a -> b)"),
        ({"a": {"set": {"source": "${stages.a.final}"}}}, "circle: a -> a"),
        ({"a": {"after": ["b"]}, "b": {"after": ["a"]}}, "circle"),
        (MISSPELLED, r"stages.alhpa: no such stage \(did you mean alpha\?\)"),
        ({"a": {}, "b": {"set": {"source": "${stages.a.finale}"}}}, "finale"),
        ({"a": {"kind": "rewrad"}}, "stages.a.kind = rewrad: expected one of import, sft, reward"),
        ({"a": {"set": {"numbr": 3}}}, r"numbr = 3: unknown key \(did you mean number\?\)"),
        ({"a": {"sett": {}}}, r"stages.a.sett.*unknown key"),
        ({"a": {"recipe": "nowhere.yaml"}}, "nowhere.yaml: no such file"),
        (SAME_FOLDER, "stages.a and stages.b have the same output: x"),
        ({"a": {"set": {"output": "x"}}, "b": {"set": {"output": "y/../x"}}}, "b have the same output: y/../x"),
        ({"a b": {}}, "expected a name of letters"),
        ({"owner": {}}, "stages.owner: the pipeline keeps a note so named"),
        ({"a": {}, "inputs": {}}, "stages.inputs: the pipeline keeps a note so named"),
        ({}, "expected stages: with an entry or more"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(toys, stages, message):
    toys.write(stages)
    with pytest.raises(ConfigError, match=message):
        toys.load()


def test_the_problems_of_all_stages_are_named_at_once(toys):
    toys.write({"a": {"set": {"number": "x"}}, "b": {"set": {"number": "y"}}})
    with pytest.raises(ConfigError) as fault:
        toys.load()
    assert "stages.a" in str(fault.value) and "stages.b" in str(fault.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aa.number=1", r"did you mean a\?"),
        ("number=1", "expected STAGE.key=value"),
        ("a.number", "expected STAGE.key=value"),
    ],
)
def test_an_override_names_its_stage(toys, override, message):
    toys.write({"a": {}})
    with pytest.raises(ConfigError, match=message):
        toys.load(override)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        load_pipeline(tmp_path / "gone.yaml")


@pytest.mark.parametrize("name", ["quickstart", "pipeline"])
def test_shipped_pipelines_resolve(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "launch" / "recipes" / f"{name}.yaml"
    pipeline = load_pipeline(path)
    assert [stage.stage.name for stage in pipeline.stages][-3:] == ["preference", "ppo", "evaluate"]
    assert pipeline.named("ppo").config.policy.path == str(pipeline.named("preference").final)
    assert yaml.safe_load(path.read_text())["stages"].keys() == {stage.name for stage in pipeline.stages}


@pytest.mark.parametrize("recipe", ["own.yaml", "[own.yaml, ../above.yaml]", "./own.yaml", "shipped:sft_smollm2"])
def test_recipes_of_stages_lie_beside_that_of_the_pipeline_or_ship(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "pipelines"
    folder.mkdir()
    (folder / "own.yaml").write_text("{model: {path: ./base}, data: {train: a.jsonl}, optim: {learning_rate: 3e-5}}")
    (tmp_path / "above.yaml").write_text("optim: {learning_rate: 4e-5}")
    (folder / "pipeline.yaml").write_text(f"{{output: out, stages: {{sft: {{recipe: {recipe}}}}}}}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_pipeline(folder / "pipeline.yaml").named("sft").config
    expected = {"own": 3e-5, "above": 4e-5, "shipped": 2e-5}
    assert config.optim.learning_rate == expected[next(name for name in ("above", "shipped", "own") if name in recipe)]
    assert ("shipped" in recipe) or config.model.path == str(folder / "base")


# ---- nodes, ranks and time by stage


def test_yaml_that_cannot_be_parsed_is_refused_in_one_line_with_its_place(toys):
    path = toys.write({"a": {}})
    with pytest.raises(ConfigError, match=r"a\.data=\[x: while parsing a flow sequence.*line 1"):
        load_pipeline(path, ["a.data=[x"])
    path.write_text("stages: [\n")
    with pytest.raises(ConfigError, match=r"toys\.yaml: while parsing.*line 2") as refused:
        load_pipeline(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"nodes": 2}, "stages.a.nodes = 2: import is the work of a single process"),
        ({"ranks": 4}, "stages.a.ranks = 4: import is the work of a single process"),
        ({"nodes": 0}, "nodes = 0"),
        ({"time": "noon"}, "stages.a.time = noon: expected"),
        ({"devices": 2}, "devices"),
    ],
)
def test_a_share_that_means_nothing_is_refused(toys, entry, message):
    toys.write({"a": {"kind": "import", "set": {"source": "smollm2"}, **entry}})
    with pytest.raises(ConfigError, match=message):
        toys.load()


def test_a_stage_uses_the_first_of_its_nodes_and_no_more_than_it_asks_for(training_toys):
    training_toys.write(
        {"all": {}, "one": {"nodes": 1}, "few": {"ranks": 2}, "many": {"nodes": 3}, "wide": {"ranks": 3}}
    )
    stages = {stage.name: stage for stage in training_toys.load().stages}
    hosts = {"n1": 4, "n2": 2}
    assert stages["all"].share(hosts) == hosts
    assert stages["one"].share(hosts) == {"n1": 4}
    assert stages["few"].share(hosts) == {"n1": 2, "n2": 2}
    with pytest.raises(ConfigError, match=r"stages.many.nodes = 3: the run has 2"):
        stages["many"].share(hosts)
    with pytest.raises(ConfigError, match=r"stages.wide.ranks = 3: n2 has 2 devices"):
        stages["wide"].share(hosts)
