"""The one table of stages, and what follows from it."""

import copy
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from launch.stages import STAGES, Stage, training
from policy.generation.options import VllmConfig
from rlhf.config import load_config, result_values
from rlhf.config_options import without_result
from rlhf.core.annotations import NoResult

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SECTIONS = {
    "sft": ["model.path=m", "data.train=d"],
    "reward": ["model.path=m", "data.train=d"],
    "preference": ["model.path=m", "data.train=d"],
    "ppo": ["policy.path=m", "data.train=d", "reward.path=r", "pretraining.data.train=d", "watch.second.path=s"],
    "import": [],
    "evaluate": ["reference=m", "prompts=p", "reward=r"],
    "generate": ["model=m", "prompts=p"],
    "benchmark": ["model=m"],
    "score": ["model=m", "data=d"],
    "win-rate": ["outputs=a", "reference=b", "reward=m:f"],
    "grade": ["answers.m=a", "judge.url=http://x", "judge.model=m"],
    "tax": ["before=a", "after=b", "tasks=[hellaswag]"],
    "best-of-n": ["responses=r", "proxy=m:f", "gold=m:g"],
}
WITHOUT_RESULT = {
    "output",
    "data.cache_dir",
    "pretraining.data.cache_dir",
    "train.max_minutes",
    "batch_tokens",
    "url",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.resume",
    "train.extend",
    "train.log_every",
    "train.tensorboard",
    "train.wandb_project",
    "train.mlflow_experiment",
    "train.trackio_project",
    "train.prometheus_file",
    "engine.nvme_path",
    "engine.rendezvous_minutes",
    "engine.timeout_minutes",
    "reference.cache",
    "reference.shard_pairs",
    "reference.verify_pairs",
    "rollout.written",
    *(f"{place}.vllm.{field.name}" for place in ("rollout", "sampling") for field in dataclasses.fields(VllmConfig)),
    "judge.key_variable",
    "judge.tolerated",
    "judge.tries",
    "judge.wait_seconds",
    "judge.timeout_seconds",
    "judge.concurrency",
    "judge.prices",
    "batch_size",
    "device",
}


def settings_of(node, above: str = ""):
    """Every setting of a config: its dotted key, the dataclass that holds it, and the name of the field."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{above}{field.name}.")
        else:
            yield f"{above}{field.name}", node, field.name


def config_classes(annotation):
    """All dataclasses in the type of a field, at any depth."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        yield annotation
        for hint in typing.get_type_hints(annotation, include_extras=True).values():
            yield from config_classes(hint)
    for inner in typing.get_args(annotation):
        yield from config_classes(inner)


def marks(annotation) -> int:
    """How often a type holds ``NoResult``, at any depth but inside of sections."""
    own = sum(isinstance(mark, NoResult) for mark in getattr(annotation, "__metadata__", ()))
    return own + sum(marks(inner) for inner in typing.get_args(annotation) if inner is not annotation)


@pytest.mark.parametrize("stage", STAGES)
def test_a_setting_counts_for_the_result_unless_its_declaration_says_no(stage):
    config = load_config(STAGES[stage].config_class(), [], ["output=o", *SECTIONS[stage]], program="test")
    before, silent = result_values(config), set()
    for key, _, _ in settings_of(config):
        changed = copy.deepcopy(config)
        ((_, node, name),) = [each for each in settings_of(changed) if each[0] == key]
        object.__setattr__(node, name, "another value")
        if result_values(changed) == before:
            silent.add(key)
    assert silent == {key for key, _, _ in settings_of(config)} & WITHOUT_RESULT


@pytest.mark.parametrize("stage", STAGES)
def test_a_mark_that_would_not_be_seen_is_nowhere(stage):
    for config_class in {*config_classes(STAGES[stage].config_class())}:
        hints = typing.get_type_hints(config_class, include_extras=True)
        marked = {name for name, hint in hints.items() if marks(hint)}
        assert marked == without_result(config_class), config_class


def test_key_metrics_are_one_number_or_all_below_a_name():
    one, all_below = Stage(name="a", module="", config="", metric="eval/loss"), STAGES["evaluate"]
    assert one.key_metrics({"eval/loss": 2.0, "loss": 1.0}) == {"loss": 2.0}
    assert one.key_metrics({"loss": 1.0}) == {}
    assert all_below.key_metrics({"reward/ppo": 0.5, "reward/dpo": 0.25, "rewards": 3}) == {"ppo": 0.5, "dpo": 0.25}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_what_the_table_names_is_there(stage):
    fields = {field.name for field in dataclasses.fields(stage.config_class())}
    assert stage.reads.keys() <= fields
    assert ("train" in fields and "engine" in fields) == stage.trains
    assert training().keys() == {"sft", "reward", "preference", "ppo"}


def test_nothing_in_launch_asks_for_the_name_of_a_stage_outside_of_the_table():
    names = "|".join(STAGES)
    asks = re.compile(rf"""(stage|kind)["']?\)?\s*(==|!=|(not )?in)\s*[(\[{{]?\s*["']({names})["']""")
    found = [
        f"{path.relative_to(LAUNCH)}:{number}: {line.strip()}"
        for path in sorted(LAUNCH.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if asks.search(line)
    ]
    assert found == []
