"""Every command that README, docs, recipes and benchmarks show is parsed by the parser that would run it.

Settings are checked as well: by the config of the stage, or the pipeline, that they are for. Models and data need not
be there. A recipe, profile or DeepSpeed JSON of the reader's own (RECIPE, cluster.yaml) is taken for a shipped one.
"""

import argparse
import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks import disturbances, large_run, make_corpus, plan_check, rehearsal, report_page
from benchmarks.gpu import __main__ as gpu
from launch.cli import build_parser
from launch.commands import ds, slurm
from launch.jobs import hostfile, over_ssh
from launch.pipeline.recipe import load_pipeline
from launch.pipeline.sweep import plan_sweep
from launch.stages import STAGES, read_stage, training
from launch.study.tidy import read_study
from policy.generation.vllm.engine import margin_engine
from rlhf.config import load_config, parse_command_line
from rlhf.core.errors import UserError
from rlhf.engine import deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "launch", "ds_configs", "benchmarks")
DOCUMENTS = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").rglob("*.py")) if "\ndef build_parser(" in path.read_text()]
ALL_RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "launch" / "clusters").glob("*.yaml"))
PIPELINES = [
    path
    for path in [*ALL_RECIPES, *sorted((ROOT / "benchmarks").glob("*.yaml"))]
    if "stages" in yaml.safe_load(path.read_text())
]
RECIPES = [path for path in ALL_RECIPES if path not in PIPELINES]
BY_MODULE = {stage.module: stage for stage in STAGES.values()}
EXAMPLES = {"STAGE": "reward", "key=value": "output=runs/example"}
"""Examples for words that stand for the reader's own, where any other word will not do."""
COMMAND = re.compile(r"(\S*/)?(rlhf|deepspeed|python3?)\s")
NOT_OURS = re.compile(r"(\S*/)?python3? -m (venv|pip|pydoc|http\.server)\s")


# ---- what is shown, and where


def code_blocks(document: Path) -> Iterator[str]:
    """Their lines."""
    for block in re.findall(r"```[a-z]*\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL):
        yield from joined(block)


def inline_code(document: Path) -> Iterator[str]:
    """Commands with arguments. Without, it is the name of a command; an ellipsis stands for what cannot be parsed."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        words = code.split()
        module = next((place for place, word in enumerate(words) if word in ("-m", "--module")), -1)
        given = words[module + 2 :] if module >= 0 else words[1:]
        if "..." not in code and any(re.match(r"-|.*[=/.]|[A-Z]+$", word) for word in given):
            yield " ".join(words)


def comments(path: Path) -> list[str]:
    """Comments of a YAML file."""
    return [line.removeprefix("#").strip() for line in joined(path.read_text(encoding="utf-8"), "#") if line[:1] == "#"]


def docstring(script: Path) -> list[str]:
    return joined(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "")


def joined(text: str, mark: str = "") -> list[str]:
    """Lines without their remarks, those that end with a backslash in one."""
    return [line.strip().partition("  #")[0] for line in re.sub(rf"\\\n{mark}\s*", " ", text).splitlines()]


def shown() -> Iterator[str]:
    for document in DOCUMENTS:
        yield from code_blocks(document)
        yield from inline_code(document)
    for path in [*ALL_RECIPES, *CLUSTERS]:
        yield from comments(path)
    for script in BENCHMARKS:
        yield from docstring(script)


def stage_and_arguments(command: str) -> tuple[str, list[str]] | None:
    """The module that a command line starts, if it is a stage, and what it is given."""
    start = re.search(rf"(?:^|\s)(?:--module|-m)\s+({'|'.join(map(re.escape, BY_MODULE))})(?=\s|$)", command)
    return start and (start[1], shlex.split(command[start.end() :]))


def program(line: str) -> str | None:
    found = COMMAND.match(line)
    return found and found[2]


SHOWN = sorted({line for line in shown() if stage_and_arguments(line) or (program(line) and not NOT_OURS.match(line))})
HELP = [line for line in SHOWN if program(line) == "rlhf" and "--help" in line.split()]
RLHF = [line for line in SHOWN if program(line) == "rlhf" and line not in HELP]
STAGE = [line for line in SHOWN if stage_and_arguments(line)]
BENCHMARK = [line for line in SHOWN if re.match(r"python benchmarks/", line)]
MODULE = [line for line in SHOWN if re.match(r"\S*python -m (pytest|launch|benchmarks|margin_engine)\b", line)]


# ---- what is the reader's own


def with_shipped(words: list[str], kind: str) -> list[str]:
    """``words`` with recipes of ``kind`` and profiles that ship for those that are not there."""
    shipped = {
        "--config": str(next(path for path in ALL_RECIPES if path.name.startswith(kind))),
        "--profile": str(CLUSTERS[0]),
        "run": str(PIPELINES[0]),
        "status": str(PIPELINES[0]),
    }
    words = [EXAMPLES.get(word, word) for word in words]
    before = ["", *words[:-1]]
    found = zip(before, words, strict=True)
    return [shipped[option] if option in shipped and is_own(word) else word for option, word in found]


def is_own(word: str) -> bool:
    """A bare name, such as RECIPE or cluster.yaml, of a file that is not here; or a shipped recipe that was copied."""
    copied = not word.startswith("launch/") and Path(word).name in {path.name for path in ALL_RECIPES}
    return ("/" not in word or copied) and not word.startswith("-") and not (ROOT / word).exists()


def kind_of(words: list[str]) -> str:
    """The stage of an ``rlhf`` command."""
    if "--critic" in words:
        return "ppo"
    return next((word for word in words if word in {*training(), "pipeline"}), "reward")


def rlhf_options(command: str) -> argparse.Namespace:
    words = shlex.split(command)[1:]
    return build_parser().parse_args(with_shipped(words, kind_of(words)))


# ---- the settings of each command


def check_plan(options: argparse.Namespace) -> None:
    if options.stage == "pipeline":
        load_pipeline(*options.config, options.overrides)
    elif options.config or options.overrides:
        load_config(STAGES[options.stage].config_class(), options.config, options.overrides, program="plan")


def check_ds(options: argparse.Namespace) -> None:
    words = options.overrides
    if options.action == "show":
        name, settings = ds._configuration_and_settings(words)
        read_stage(options.config, settings, options.stage, program="ds show")
        words = [name] if name else []
    for word in words:
        if not word.endswith(".json"):
            deepspeed_config.read(word, deepspeed_config.role_of(word) or "train")


def check_doctor(options: argparse.Namespace) -> None:
    if [path.resolve() for path in options.config] in [[path] for path in PIPELINES]:
        load_pipeline(*options.config, options.set)
    elif options.config:
        read_stage(options.config, options.set, options.stage, program="doctor")


CHECKS = {
    "plan": check_plan,
    "ds": check_ds,
    "slurm": lambda options: slurm._read(options) if "profile" in options else None,  # the others name a run
    "doctor": check_doctor,
    "pipeline": lambda options: load_pipeline(options.recipe, options.overrides),
    "study": lambda options: read_study(options.config, options.overrides),
    "sweep": lambda options: plan_sweep(STAGES[options.stage], options.config, options.overrides, Path("runs/sweep")),
}
"""What reads the settings, for commands that take some."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", RLHF)
def test_rlhf_commands_and_their_settings_are_taken(command):
    options = rlhf_options(command)
    if options.command in CHECKS:
        CHECKS[options.command](options)


@pytest.mark.parametrize("command", HELP)
def test_a_command_that_is_asked_for_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(shlex.split(command)[1:])
    assert end.value.code == 0


@pytest.mark.parametrize("command", [line for line in RLHF if " vars." in line])
def test_variables_on_command_lines_are_those_of_the_pipeline(command):
    words = shlex.split(command)
    (recipe,) = [path for path in PIPELINES if str(path.relative_to(ROOT)) in words]
    variables = {word.removeprefix("vars.").partition("=")[0] for word in words if word.startswith("vars.")}
    assert variables <= {*yaml.safe_load(recipe.read_text())["vars"]}


@pytest.mark.parametrize("command", STAGE)
def test_stage_commands_and_their_settings_are_taken(command):
    module, arguments = stage_and_arguments(command)
    stage = BY_MODULE[module]
    if "--help" not in arguments:
        words = with_shipped(arguments, stage.name)
        parse_command_line(stage.config_class(), words, program=module, description="")


@pytest.mark.parametrize("command", [line for line in STAGE if program(line) == "deepspeed"])
def test_the_deepspeed_launcher_takes_its_options(command):
    options = importlib.import_module("deepspeed.launcher.runner").parse_args(shlex.split(command)[1:])
    assert options.module and options.user_script == stage_and_arguments(command)[0]


@pytest.fixture
def benchmark_parser(monkeypatch):
    """``benchmark_parser(path)``: what parses the command line of a benchmark. Benchmarks are no package."""
    before = {*sys.modules}

    def load(path: Path) -> argparse.ArgumentParser:
        monkeypatch.syspath_prepend(path.parent)
        specification = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module.build_parser()

    yield load
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.mark.parametrize("command", BENCHMARK)
def test_benchmarks_take_their_commands(command, benchmark_parser):
    script, *words = shlex.split(command)[1:]
    benchmark_parser(ROOT / script).parse_args(words)
    text = (ROOT / script).read_text()
    assert "from benchmarks" not in text, "found where python -m benchmarks.NAME starts it, and not from its own path"


def parse_measure(words: list[str]) -> None:
    stage, _, *settings = with_shipped(words, "reward")
    parse_command_line(STAGES[stage].config_class(), settings, program="measure", description="")


def parse_hostfile(words: list[str]) -> None:
    tried = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostfile, "check_hosts", tried.append)
        assert hostfile.main(words) == 0 and tried == [Path(words[0])]


def find_tests(words: list[str]) -> None:
    for path in words:
        assert (ROOT / path).is_file(), path


MODULES = {
    "pytest": find_tests,
    "launch.jobs.hostfile": parse_hostfile,
    "launch.jobs.over_ssh": lambda words: over_ssh.parse(words),
    "benchmarks.measure": parse_measure,
    "benchmarks.make_corpus": lambda words: make_corpus._parser().parse_args(words),
    "benchmarks.disturbances": lambda words: disturbances._parser().parse_args(words),
    "benchmarks.gpu": lambda words: gpu._parser().parse_args(words),
    "benchmarks.large_run": lambda words: large_run._parser().parse_args(words),
    "benchmarks.plan_check": lambda words: plan_check._parser().parse_args(words),
    "benchmarks.rehearsal": lambda words: rehearsal._parser().parse_args(words),
    "benchmarks.report_page": lambda words: report_page._parser().parse_args(words),
    "margin_engine": lambda words: margin_engine.build_parser().parse_args(words),
}


@pytest.mark.parametrize("command", MODULE)
def test_modules_take_their_commands(command):
    module, *words = shlex.split(command)[2:]
    MODULES[module](words)


# ---- nothing is left out


def test_every_kind_of_command_is_shown_and_parsed():
    assert [line for line in SHOWN if line not in {*HELP, *RLHF, *STAGE, *BENCHMARK, *MODULE}] == []
    assert {stage_and_arguments(line)[0] for line in STAGE} >= {stage.module for stage in training().values()}
    assert {rlhf_options(line).command for line in RLHF} >= {*CHECKS}
    assert {shlex.split(line)[2] for line in MODULE} == {*MODULES}
    assert {ROOT / shlex.split(line)[1] for line in BENCHMARK} == {*BENCHMARKS}


@pytest.mark.parametrize(
    "command",
    [
        "rlhf plan reward --config RECIPE optim.learning_rte=1",
        "rlhf ds show --config RECIPE engine.deepsped=zero2",
        "rlhf ds show zero9 --config RECIPE",
        "rlhf ds lint zero9",
        "rlhf slurm render reward --config RECIPE --profile cluster.yaml profile.node=4",
        "rlhf slurm submit pipeline --config RECIPE --profile cluster.yaml reward.optim.learning_rte=1",
        "rlhf doctor --config RECIPE --set optim.learning_rte=1",
        "rlhf sweep preference --config RECIPE loss.kind=sigmoid,ipoo",
        "rlhf pipeline run RECIPE reward.optim.learning_rte=1",
        "rlhf plan reward --config launch/recipes/no_such.yaml",
    ],
)
def test_a_misspelled_setting_would_be_found(command):
    options = rlhf_options(command)
    with pytest.raises(UserError):
        CHECKS[options.command](options)


@pytest.mark.parametrize("recipe", PIPELINES, ids=lambda path: path.name)
def test_a_pipeline_shows_its_command(recipe):
    path = str(recipe.relative_to(ROOT))
    assert any(f"rlhf pipeline run {path}" in line for line in comments(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_shows_its_command_and_is_one_of_that_stage(recipe):
    found = [stage_and_arguments(line) for line in comments(recipe)]
    path = str(recipe.relative_to(ROOT))
    modules = {each[0] for each in found if each and path in each[1]}
    assert len(modules) == 1, f"a comment of {path} should show the one command that it is for"
    (module,) = modules
    config_class = BY_MODULE[module].config_class()
    invocation = parse_command_line(config_class, ["--config", str(recipe)], program=module, description="")
    assert invocation.config.output.parts[0] == "runs"
