"""The tables of losses and margins say of their functions what these are, and recipes are held to them."""

import math

import pytest
import torch

from policy.preference.config import PreferenceConfig
from reward.config import LossConfig, MarginConfig, RewardConfig
from reward.tables import LOSSES, MARGINS, POOL
from rlhf.config import parse_command_line
from rlhf.core.errors import ConfigError
from rlhf.core.table import parameter_values

BASE = ("output=o", "model.path=m", "data.train=d")
PROBES = (-1e9, -1.0, -1e-9, 0.0, 1e-9, 0.3, 0.5, 0.6, math.log(2), 0.99, 1.0, 1.5, 60.0, 1e9)


def parse(*settings, config_class=RewardConfig):
    return parse_command_line(config_class, [*BASE, *settings], program="x", description="").config


def refusal(*settings, config_class=RewardConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*settings, config_class=config_class)
    return str(caught.value)


@pytest.mark.parametrize("row", [*LOSSES.values(), *MARGINS.values()], ids=lambda row: row.function)
def test_a_row_says_what_its_function_takes(row):
    row.check_against(row.implementation)


def takes(call) -> bool:
    try:
        call()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", sorted(kind for kind, row in LOSSES.items() if row.parameters))
def test_a_loss_and_its_row_refuse_the_same_numbers(kind):
    row = LOSSES[kind]
    given = {name: torch.ones(2) for name in row.inputs}
    for name in row.parameters:
        for probe in PROBES:
            by_row = takes(lambda value={name: probe}: parameter_values(LOSSES, kind, value, noun="loss"))
            by_loss = takes(lambda value={name: probe}: row(torch.ones(2), torch.zeros(2), **given, **value))
            assert by_row == by_loss, (name, probe)


@pytest.mark.parametrize("kind", sorted(kind for kind, row in MARGINS.items() if row.hyperparameters))
def test_what_the_row_of_a_margin_takes_its_function_takes(kind):
    row = MARGINS[kind]
    columns = {name: torch.eye(2) if name.endswith("embeddings") else torch.ones(2) for name in row.inputs}
    taken = 0
    for name in row.hyperparameters:
        for probe in (*PROBES, 1, 3, True, "abs", "signed", "pair", "max"):
            if takes(lambda value={name: probe}: parameter_values(MARGINS, kind, value, noun="margin")):
                row.implementation(**columns, **{name: probe})
                taken += 1
    assert taken > len(row.hyperparameters)


@pytest.mark.parametrize("kind", sorted(MARGINS))
def test_a_margin_refuses_the_parameters_of_others(kind):
    others = {name: row.parameters[name].default for row in MARGINS.values() for name in row.parameters}
    for name in others.keys() - MARGINS[kind].parameters.keys():
        text = refusal(f"margin.kind={kind}", f"margin.parameters.{name}={str(others[name]).lower()}")
        assert f"margin.parameters.{name} = " in text
        assert f"kind = {kind} takes" in text and f"{name} belongs to" in text


def test_what_a_kind_takes_is_validated_as_other_settings_are():
    text = refusal(
        "margin.parameters.epsilon=0",
        "margin.parameters.max_iterations=2.5",
        "margin.parameters.center_rewards=1",
        "margin.parameters.reading=rows",
        "optim.learning_rte=1",
    )
    assert "5 problems" in text
    assert "margin.parameters.epsilon = 0: Input should be greater than 0" in text
    assert "margin.parameters.max_iterations = 2.5: Input should be a valid integer" in text
    assert "margin.parameters.center_rewards = 1: Input should be a valid boolean" in text
    assert "margin.parameters.reading = \"rows\": Input should be 'row', 'row_sum', 'pair' or 'max'" in text


@pytest.mark.parametrize("name", sorted({name for row in MARGINS.values() for name in row.parameters}))
def test_a_key_of_the_flat_section_of_before_says_where_it_went(name):
    for config_class, more in ((RewardConfig, ()), (PreferenceConfig, ("loss.kind=ot_margin", "margin.kind=ot"))):
        text = refusal(*more, f"margin.{name}=1", config_class=config_class)
        assert f"margin.{name} = 1: unknown key (did you mean margin.parameters.{name}?)" in text


@pytest.mark.parametrize("name", ["smoothing", "max_weight"])
def test_a_hyper_parameter_beside_the_parameters_of_a_loss_says_where_it_belongs(name):
    assert f"did you mean loss.parameters.{name}?" in refusal(f"loss.{name}=0.1")


def test_parameters_of_a_recipe_are_cleared_for_another_kind(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("margin: {kind: ot, parameters: {epsilon: 0.2}}\n")
    assert parse("--config", str(recipe)).margin.values["epsilon"] == 0.2
    assert "epsilon belongs to ot" in refusal("--config", str(recipe), "margin.kind=none")
    assert parse("--config", str(recipe), "margin.kind=none", "margin.parameters={}").margin.values == {}


def test_a_queue_needs_margins_by_micro_step():
    queue = ("margin.parameters.queue_pairs=4",)
    assert parse(*queue).margin.queue_pairs == 4
    assert "queue_pairs = 4 needs parameters.scope" in refusal(*queue, "margin.parameters.scope=global_batch")
    assert "queue_pairs = 4 needs the scope of" in refusal(*queue, "loss.kind=bsr", "loss.scope=global_batch")


def test_margins_or_means_over_the_global_batch_make_the_step_look_at_all_pairs():
    assert not parse().over_all_pairs
    assert parse("margin.parameters.scope=global_batch").over_all_pairs
    assert parse("margin.kind=none", "loss.kind=bsr", "loss.scope=global_batch").over_all_pairs
    assert not parse("margin.kind=none", "loss.scope=global_batch").over_all_pairs  # nothing is a mean


def test_every_kind_that_compares_pairs_takes_the_whole_pool():
    pooled = {kind for kind, row in MARGINS.items() if POOL.keys() & row.parameters.keys()}
    assert pooled == {"ot"} and all(POOL.keys() <= MARGINS[kind].parameters.keys() for kind in pooled)


def test_values_are_those_given_and_the_defaults():
    assert MarginConfig(kind="reward", parameters={"reward_weight": 2}).values == {
        "reward_weight": 2.0,
        "reward_cost": "abs",
    }
    assert LossConfig(kind="grm_sft", parameters={"beta": 1}).values == {"weight": 0.01, "beta": 1.0}


@pytest.mark.parametrize("name", ["epsilon", "max_iterations"])
@pytest.mark.parametrize("reading", ["pair", "max"])
def test_a_reading_without_a_plan_refuses_what_makes_the_plan(reading, name):
    text = refusal(f"margin.parameters={{reading: {reading}, {name}: 3}}")
    assert f"parameters.{name} = 3 is of the transport plan" in text
    assert parse(f"margin.parameters={{reading: {reading}}}").margin.values[name] > 0
