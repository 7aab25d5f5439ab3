from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Lt, MinLen
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli import main as rlhf_main
from rlhf.config import load_config, option_help, parse_command_line, to_dict, to_yaml
from rlhf.core.errors import ConfigError
from rlhf.core.paths import beside, recipe_path
from rlhf.train.options import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters."""

    rank: Annotated[int, Gt(0)] = 16
    """Width of the adapter."""
    alpha: float = 32.0


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer."""

    learning_rate: Annotated[float, Gt(0)] = 1e-5
    """Peak of the schedule, reached after the warm-up. Long enough to make the help break the line."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    total_steps: int = 100

    def __post_init__(self) -> None:
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than total_steps {self.total_steps}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One place where pairs come from."""

    path: Path
    """A file or a hub name."""
    weight: Annotated[float, Gt(0)] = 1.0
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pairs."""

    train: Annotated[tuple[SourceConfig, ...], MinLen(1)]
    eval: tuple[SourceConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    """How the pair margin is made."""

    kind: Literal["none", "constant", "column", "ot"] = "ot"
    epsilon: Annotated[float, Gt(0)] = 0.1
    share: Annotated[float, Ge(0), Lt(1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class SeededConfig:
    seed: int = 0
    """Seeds everything."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(SeededConfig):
    """A run."""

    epochs: int = 1
    name: str = "run"
    bf16: bool = False
    output: Path = Path("runs/last")
    models: str | list[str | SourceConfig] = "one"
    steps: int | None = None
    clip: float | Literal["auto"] = "auto"
    tags: list[str] = field(default_factory=list)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=3e-4))
    margin: MarginConfig = MarginConfig()
    lora: LoraConfig | None = None
    """Adapters, or null to train all weights."""
    data: DataConfig


TRAIN = "data.train=[{path: a.jsonl}]"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(yaml: str | None = None, *overrides: str) -> RunConfig:
    recipes = []
    if yaml is not None:
        Path("tiny.yaml").write_text(yaml)
        recipes = [Path("tiny.yaml")]
    return load_config(RunConfig, recipes, [TRAIN, *overrides], program="reward")


def problems(yaml: str | None = None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(yaml, *overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


# ---- merging


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults():
    config = load("seed: 1\nepochs: 2\n", "epochs=3")
    assert (config.seed, config.epochs, config.name) == (1, 3, "run")


def test_of_several_recipes_the_later_one_wins():
    Path("a.yaml").write_text("seed: 1\nepochs: 2\n")
    Path("b.yaml").write_text("epochs: 3\n")
    config = load_config(RunConfig, [Path("a.yaml"), Path("b.yaml")], [TRAIN], program="reward")
    assert (config.seed, config.epochs) == (1, 3)


def test_setting_one_key_of_a_section_keeps_what_the_parent_dataclass_chose_for_the_others():
    assert load("optim: {warmup_steps: 5}").optim == OptimConfig(learning_rate=3e-4, warmup_steps=5)


def test_exponents_without_a_dot_are_floats_in_recipes_and_overrides():
    assert load("optim:\n  learning_rate: 1e-5\n").optim.learning_rate == 1e-5
    assert load(None, "optim.learning_rate=2e-6").optim.learning_rate == 2e-6


def test_null_overrides_a_value_and_a_whole_section():
    assert load("steps: 5", "steps=null").steps is None
    assert load("lora: {rank: 4}", "lora=null").lora is None


def test_a_key_of_an_optional_section_switches_the_section_on():
    assert load(None, "lora.rank=8").lora == LoraConfig(rank=8, alpha=32.0)
    assert load("lora: {alpha: 1}", "lora.rank=8").lora == LoraConfig(rank=8, alpha=1.0)


def test_lists_are_replaced_and_their_items_can_be_set_one_by_one():
    assert load("tags: [x, y, z]", "tags=[a,b]").tags == ["a", "b"]
    assert load("tags: [x, y]", "tags[1]=b").tags == ["x", "b"]


def test_sources_are_sections_in_a_list_with_paths_left_relative():
    config = load(None, "data.train=[{path: a.jsonl, columns: {prompt: q}}, {path: sub/b.jsonl, weight: 2}]")
    assert config.data.train == (
        SourceConfig(path=Path("a.jsonl"), columns={"prompt": "q"}),
        SourceConfig(path=Path("sub/b.jsonl"), weight=2.0),
    )
    assert load(None, "data.train[0].weight=3").data.train[0].weight == 3.0


def test_an_interpolation_takes_the_value_of_another_option_default_or_not():
    assert load("optim: {warmup_steps: '${optim.total_steps}'}").optim.warmup_steps == 100
    assert load("name: s${seed}", "seed=7").name == "s7"


def test_a_value_may_hold_equals_signs_and_dates_stay_text():
    assert load(None, "name=a=b").name == "a=b"
    assert load(None, "name=2024-01-01").name == "2024-01-01"


# ---- refusals


def test_every_problem_is_listed_at_once_with_path_value_and_nearest_key():
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, [_written("margin: {epsilon: 0}\nlearning_rte: 1.0\n")], [], program="reward")
    assert str(caught.value) == (
        "reward: tiny.yaml: 3 problems\n"
        "  margin.epsilon = 0: Input should be greater than 0\n"
        "  data.train: required, but not set (in the recipe, or as data.train=...)\n"
        "  learning_rte = 1.0: unknown key (did you mean optim.learning_rate?)"
    )


def _written(yaml: str) -> Path:
    Path("tiny.yaml").write_text(yaml)
    return Path("tiny.yaml")


def test_the_heading_names_recipes_and_command_line():
    with pytest.raises(ConfigError, match=r"^reward: tiny.yaml \+ command line: 1 problem\n"):
        load("seed: x")
    with pytest.raises(ConfigError, match=r"^reward: no recipe: 1 problem\n  data.train: required"):
        load_config(RunConfig, [], [], program="reward")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("epochs=1.5", "epochs = 1.5: Input should be a valid integer"),
        ("epochs=1.0", "epochs = 1.0: Input should be a valid integer"),
        ("epochs=true", "epochs = true: Input should be a valid integer"),
        ("epochs='1'", 'epochs = "1": Input should be a valid integer'),
        ("margin.epsilon=true", "margin.epsilon = true: Input should be a valid number"),
        ("margin.epsilon=.nan", "margin.epsilon = NaN: Input should be a finite number"),
        ("optim.learning_rate=.inf", "optim.learning_rate = Infinity: Input should be a finite number"),
        ("bf16=1", "bf16 = 1: Input should be a valid boolean"),
        ("name=7", "name = 7: Input should be a valid string (put it in quotes)"),
        ("margin.share=1", "margin.share = 1: Input should be less than 1"),
        ("margin.kind=OT", "margin.kind = \"OT\": Input should be 'none', 'constant', 'column' or 'ot'"),
        ("clip=on", "clip = true: Input should be a valid number or Input should be 'auto'"),
        ("optim=5", "optim = 5: a section, which takes a mapping of options and not a single value"),
        ("seed.x=1", 'seed = {"x": 1}: Input should be a valid integer'),
        ("lora.rank=0", "lora.rank = 0: Input should be greater than 0"),
        ("data.train[0].weight=-1", "data.train[0].weight = -1: Input should be greater than 0"),
        ("data.train=[{weight: 2}]", "data.train[0].path: required"),
        ("data.train=[]", "data.train = []: Tuple should have at least 1 item"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(override, problem):
    (found,) = problems(None, override)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("learning_rte", "optim.learning_rate"),
        ("margin.epsilom", "margin.epsilon"),
        ("data.seed", "seed"),  # the last part decides, although data.eval looks more alike
        ("epsilon", "margin.epsilon"),
        ("optin.betas", "optim"),  # what is unknown is the section
        ("lora.rnk", "lora.rank"),
        ("data.train[0].wieght", "data.train[0].weight"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    (found,) = problems(None, f"{key}=1")
    assert found.endswith(f"unknown key (did you mean {nearest}?)")


def test_of_equal_names_the_nearest_is_that_of_the_same_section():
    (found,) = problems(None, "data.eval=[{path: b, wieght: 1}]")
    assert found.endswith("unknown key (did you mean data.eval[0].weight?)")


def test_a_fault_inside_one_reading_of_a_union_hides_the_complaints_of_the_other_readings():
    assert problems(None, "models=[a, {path: b, weight: 0}]") == [
        "models[1].weight = 0: Input should be greater than 0"
    ]
    assert problems(None, "models=true") == [
        "models = true: Input should be a valid string (put it in quotes) or Input should be a list"
    ]


def test_a_key_like_no_other_is_refused_without_a_guess():
    assert problems(None, "zzzz=1") == ["zzzz = 1: unknown key (--help lists all)"]


def test_a_check_across_fields_is_reported_with_the_path_of_its_section():
    assert problems(None, "optim.warmup_steps=200") == ["optim: warmup_steps 200 is more than total_steps 100"]


def test_malformed_yaml_is_one_problem_with_line_and_column():
    assert problems("seed: 1\nname: [a\n") == [
        "tiny.yaml: invalid YAML at line 3, column 1: did not find expected ',' or ']'"
    ]


def test_a_key_written_twice_in_a_recipe_is_refused():
    assert problems("seed: 1\nseed: 2\n") == ["tiny.yaml: invalid YAML at line 2, column 1: found duplicate key seed"]


def test_a_recipe_that_is_no_mapping_is_refused():
    assert problems("- seed\n") == ["tiny.yaml: expected a mapping of options at the top level, found a list"]
    assert "tiny.yaml: " in problems("3\n")[0]


def test_a_missing_recipe_is_named_with_the_nearest_file_beside_it():
    Path("recipes").mkdir()
    Path("recipes/tiny.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"recipes/tny.yaml: no such file \(did you mean recipes/tiny.yaml\?\)"):
        load_config(RunConfig, [Path("recipes/tny.yaml")], [TRAIN], program="reward")


def test_all_overrides_that_cannot_be_read_are_listed_together():
    assert problems(None, "tiny.yaml", "seed", "name=[a", "tags[4]=x", "data.train.path=b") == [
        "tiny.yaml: expected key=value (did you mean --config tiny.yaml?)",
        "seed: expected key=value",
        "name=[a: invalid YAML at line 2, column 1: did not find expected ',' or ']' "
        "(text may need quotes: key='\"text\"')",
        "tags[4]=x: list index out of range (a list is set as a whole, or item by item as key[0].name=value)",
        "data.train.path=b: invalid literal for int() with base 10: 'path' "
        "(a list is set as a whole, or item by item as key[0].name=value)",
    ]


def test_an_interpolation_of_a_key_that_does_not_exist_is_refused():
    assert problems("name: ${optim.lr}") == ["name: Interpolation key 'optim.lr' not found"]


# ---- the resolved copy


texts = st.text(max_size=12) | st.text("\\${}a:'\"?-#1e.\n ", max_size=10)
configs = st.builds(
    RunConfig,
    seed=st.integers(),
    name=texts,
    output=st.sampled_from([Path("a/b"), Path("1e5"), Path("x ${y}")]),
    steps=st.none() | st.integers(1),
    clip=st.just("auto") | st.floats(allow_nan=False, allow_infinity=False),
    tags=st.lists(texts | st.sampled_from(["null", "1e-5", "yes", "${seed}", "\\${seed}"]), max_size=4),
    optim=st.builds(OptimConfig, learning_rate=st.floats(1e-300, 1e300)),
    lora=st.none() | st.builds(LoraConfig),
    data=st.builds(
        DataConfig,
        train=st.lists(
            st.builds(SourceConfig, path=st.just(Path("p.jsonl")), columns=st.dictionaries(st.just("prompt"), texts)),
            min_size=1,
            max_size=2,
        ).map(tuple),
    ),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_loading_the_resolved_copy_gives_an_equal_config(config):
    Path("copy.yaml").write_text(to_yaml(config))
    assert load_config(RunConfig, [Path("copy.yaml")], [], program="reward") == config


def test_the_dict_holds_json_values_only():
    as_dict = to_dict(load())
    assert as_dict["output"] == "runs/last"
    assert as_dict["data"]["train"] == [{"path": "a.jsonl", "weight": 1.0, "columns": {}}]


# ---- the command line


def test_launcher_arguments_in_front_and_options_between_overrides_are_understood():
    recipe = _written("epochs: 2\n")
    argv = ["--local_rank=0", "seed=3", "--config", str(recipe), TRAIN, "--dry-run", "name=x"]
    invocation = parse_command_line(RunConfig, argv, program="reward", description="Train.")
    assert invocation.dry_run and invocation.recipes == (recipe,)
    assert invocation.overrides == ("seed=3", TRAIN, "name=x")
    assert (invocation.config.seed, invocation.config.epochs, invocation.config.name) == (3, 2, "x")
    assert not parse_command_line(RunConfig, ["--local-rank", "1", TRAIN], program="r", description="").dry_run


def test_several_recipes_may_be_given_on_the_command_line():
    Path("a.yaml").write_text("seed: 1\nepochs: 2\n")
    Path("b.yaml").write_text("epochs: 3\n")
    argv = ["--config", "a.yaml", "--config", "b.yaml", TRAIN]
    config = parse_command_line(RunConfig, argv, program="reward", description="").config
    assert (config.seed, config.epochs) == (1, 3)


def test_an_unknown_dashed_option_is_refused_with_the_way_to_write_settings():
    with pytest.raises(ConfigError, match=r"--seed=3: unknown option .* key=value, without dashes"):
        parse_command_line(RunConfig, ["--seed=3"], program="reward", description="")
    with pytest.raises(ConfigError, match="--dry: unknown option"):
        parse_command_line(RunConfig, ["--dry", TRAIN], program="reward", description="")


def test_help_prints_every_option_with_default_type_and_doc_within_100_columns(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_command_line(RunConfig, ["--help"], program="reward", description="Train a reward model.")
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert option_help(RunConfig) in printed and "Train a reward model." in printed and "--dry-run" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert "local_rank" not in printed


def test_help_text_of_options_sections_and_lists():
    lines = [" ".join(line.split()) for line in option_help(RunConfig).splitlines()]
    for expected in [
        "seed=0 int",
        "Seeds everything.",  # although the field is inherited
        "optim: The optimizer.",
        "optim.learning_rate=0.0003 float > 0",  # the default that the parent chose
        "optim.betas=[0.9, 0.999] [float, float]",
        "margin.kind=ot none | constant | column | ot",
        "margin.share=0.5 float >= 0, < 1",
        "clip=auto float or auto",
        "output=runs/last path",
        "lora=null LoraConfig or null",
        "lora: Low-rank adapters.",
        "lora.rank=16 int > 0",
        "data.train list of SourceConfig at least 1 (required)",
        "models=one str or list of (str or SourceConfig)",
        "models[]: One place where pairs come from.",
        "models[].path path (required)",
        "models[].columns={} mapping of str",
        "data.train[]: as models[].",
    ]:
        assert expected in lines, expected
    assert not any(line.startswith("data.train[].") for line in lines)


# ------------------------------------------------------------------------------------- numbers and home folders


@pytest.mark.parametrize(
    ("value", "read"), [("0123", 83), ("-017", -15), ("12:30", 750), ("1:30:00", 5400), ("0_17", 15), ("1:30.5", 90.5)]
)
def test_numbers_that_yaml_reads_as_others_are_refused_in_recipes_and_overrides(tmp_path, value, read):
    path = tmp_path / "r.yaml"
    path.write_text(f"# a recipe\nsteps: {value}\n")
    for recipes, overrides in (([path], []), ([], [f"steps={value}"]), ([], [f"nested=[1, {value}]"])):
        with pytest.raises(ConfigError, match=rf"line \d: {value} would be read as {read} .* or '{value}' in quotes"):
            load_config(Numbers, recipes, overrides, program="test")


@pytest.mark.parametrize("value", ["0", "10", "0.5", "1e-5", "-3", "0x1F", "'0123'", '"12:30"', "08", "a:01", "v0123"])
def test_other_numbers_and_quoted_ones_are_left_alone(tmp_path, value):
    path = tmp_path / "r.yaml"
    path.write_text(f"anything: {value}\n")
    load_config(Numbers, [path], [], program="test")


@dataclass(frozen=True, kw_only=True)
class Numbers:
    steps: int = 1
    nested: tuple[int, ...] = ()
    anything: int | float | str = 0
    folder: Path = Path("x")
    sources: tuple[str, ...] = ()


def test_a_leading_tilde_is_the_home_folder_wherever_a_path_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["folder=~/runs", "sources=[~/a.jsonl, b~/c]"]
    config = load_config(Numbers, [], overrides, program="test")
    assert config.folder == tmp_path / "runs"
    assert config.sources == (f"{tmp_path}/a.jsonl", "b~/c")
    (tmp_path / "r.yaml").write_text("\ufeffsteps: 3\n", encoding="utf-8")
    argv = ["--config=~/r.yaml", "--log-folder=~/logs"]
    invocation = parse_command_line(Numbers, argv, program="test", description="")
    assert (invocation.config.steps, invocation.log_folder) == (3, tmp_path / "logs")


def test_a_tilde_without_a_home_folder_is_refused_in_one_line(capsys, tmp_path, monkeypatch):
    """As in a container that knows nothing of its user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(ConfigError, match=r"~/runs: no home folder is known here \(HOME is not set\)"):
        load_config(Numbers, [], ["folder=~/runs"], program="test")
    assert load_config(Numbers, [], ["folder=~x", "sources=[b~/c]"], program="test").folder == Path("~x")
    with pytest.raises(ConfigError, match="no home folder is known"):
        parse_command_line(Numbers, ["--log-folder=~/logs"], program="test", description="")
    assert rlhf_main(["score", "--model=~/m", "--data=x", "--output=y"]) == 2
    assert "~/m: no home folder is known here" in capsys.readouterr().err


# Settings of a caller


@dataclass(frozen=True, kw_only=True)
class _Inner:
    parameters: dict[str, float] = field(default_factory=dict)
    kind: str = "a"


@dataclass(frozen=True, kw_only=True)
class _Outer:
    loss: _Inner = field(default_factory=_Inner)
    policies: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize("settings", [{"loss": {"parameters": {}}}, {"loss.parameters": {}}])
def test_an_empty_mapping_among_settings_empties_that_of_the_recipe(tmp_path, settings):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("loss: {kind: b, parameters: {beta: 1.0}}\n")
    config = load_config(_Outer, [recipe], [], settings=settings, program="x")
    assert config.loss == _Inner(kind="b")


@pytest.mark.parametrize("name", ["smollm2-1.7b", "a.b.c"])
def test_a_key_inside_of_settings_may_have_dots_and_one_at_the_top_is_a_path(tmp_path, name):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("loss: {parameters: {beta: 1.0}}\npolicies: {before: x}\n")
    settings = {"policies": {name: "final"}, "loss.kind": "c", "loss": {"parameters": {"tau": 2.0}}}
    config = load_config(_Outer, [recipe], [], settings=settings, program="x")
    assert config.policies == {"before": "x", name: "final"}
    assert config.loss == _Inner(kind="c", parameters={"beta": 1.0, "tau": 2.0})


def source_read(recipe: str, *overrides: str) -> str:
    """The path of the one source of data that a recipe names."""
    return str(load_config(RunConfig, [Path(recipe)], overrides, program="reward").data.train[0].path)


@pytest.mark.parametrize(("written", "read"), [("./a.jsonl", "sub/a.jsonl"), ("../b/*.jsonl", "b/*.jsonl")])
def test_a_path_that_begins_with_dots_starts_in_the_folder_of_the_recipe(tmp_path, monkeypatch, written, read):
    for name in ("sub", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "sub" / "recipe.yaml").write_text(f"data: {{train: [{{path: '{written}'}}]}}")
    monkeypatch.chdir(tmp_path)
    assert source_read("sub/recipe.yaml") == source_read(f"{tmp_path}/sub/recipe.yaml") == read
    monkeypatch.chdir(tmp_path / "other")
    assert source_read("../sub/recipe.yaml") == str(tmp_path / read)


def test_other_paths_start_where_the_command_is_typed_and_a_saved_recipe_keeps_them(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "recipe.yaml").write_text("data: {train: [{path: a.jsonl}]}")
    monkeypatch.chdir(tmp_path / "run")
    assert source_read("../recipe.yaml") == "a.jsonl"
    above = "data.train=[{path: ../b.jsonl}]"
    assert source_read("../recipe.yaml", above) == str(tmp_path / "b.jsonl")
    config = load_config(RunConfig, [], [above], program="reward")
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert source_read("../saved.yaml") == str(tmp_path / "b.jsonl")


@pytest.mark.parametrize("text", [".../a", "..", ".hidden", "./a\nb", "not ./a"])
def test_a_text_that_is_no_such_path_stays(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert beside({"a": [text]}, Path("sub")) == {"a": [text]}


def test_a_shipped_recipe_is_found_by_name_and_another_name_answered_with_those_there_are():
    assert recipe_path("shipped:reward_smollm2") == recipe_path("shipped:reward_smollm2.yaml")
    assert "SmolLM2" in recipe_path("shipped:reward_smollm2").read_text()
    with pytest.raises(ConfigError, match=r"^shipped:rewrad: no recipe of this name ships; there are .*reward_smollm2"):
        recipe_path("shipped:rewrad")


@pytest.mark.parametrize("word", ["off", "'off'", '"off"', "Off"])
def test_packing_is_switched_off_as_a_recipe_would_write_it(tmp_path, word):
    (tmp_path / "recipe.yaml").write_text(f"packing: {word}\n")
    assert load_config(TrainConfig, [tmp_path / "recipe.yaml"], [], program="x").packing == "off"
    assert load_config(TrainConfig, [], [f"packing={word}"], program="x").packing == "off"
    with pytest.raises(ConfigError, match="packing = true: Input should be 'auto' or 'off'"):
        load_config(TrainConfig, [], ["packing=on"], program="x")
