"""The tables of objectives and estimators say of their functions what these are."""

import typing

import pytest
import torch

from policy.ppo.estimators import ESTIMATORS
from policy.preference.batch_losses import RUNNING, STATISTICS
from policy.preference.config import LossConfig, TermConfig
from policy.preference.losses import LOSSES
from rlhf.core.table import KindError, Parameter, Row, parameter_values

PROBES = (-1e9, -1.0, -1e-9, 0.0, 1e-9, 0.3, 0.5, 0.69, 0.7, 1.0, 1.5, 60.0, 1e9)


@pytest.mark.parametrize("row", [*LOSSES.values(), *ESTIMATORS.values()], ids=lambda row: row.function)
def test_a_row_says_what_its_function_takes(row):
    row.check_against(row.implementation)


def test_statistics_of_the_rows_are_those_there_are():
    named = {name for row in LOSSES.values() for name in row.statistics}
    assert named == STATISTICS.keys() and named > RUNNING.keys()


def takes(call) -> bool:
    try:
        call()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", sorted(kind for kind, row in LOSSES.items() if row.parameters))
def test_an_objective_and_its_row_refuse_the_same_numbers(kind):
    row = LOSSES[kind]
    given = {name: torch.ones(2, dtype=torch.bool if name == "labels" else None) for name in row.inputs}
    given |= {name: -values for name, values in given.items() if name.endswith("_logprobs")}
    given |= {"kl": torch.ones(())} if "kl" in row.statistics else {}
    for name, parameter in row.parameters.items():
        if bool in (parameter.type, *typing.get_args(parameter.type)):
            continue  # a number is no choice
        for probe in PROBES:
            by_row = takes(lambda value={name: probe}: parameter_values(LOSSES, kind, value, noun="objective"))
            by_loss = takes(lambda value={name: probe}: row(**given, **value))
            assert by_row == by_loss, (name, probe)


def whole_beta(chosen_logratios, rejected_logratios, *, beta: float = 1, cap: float | None = None): ...


@pytest.mark.parametrize("beta", [1, 3])
def test_a_default_that_is_a_whole_number_scales_implicit_rewards(monkeypatch, beta):
    """It counted as no hyper-parameter: rewards were scaled by 1, and beta could not be set."""
    row = type(LOSSES["sigmoid"])(
        f"{__name__}:whole_beta",
        inputs=LOSSES["sigmoid"].inputs,
        parameters={"beta": Parameter(float, beta), "cap": Parameter(float | None, None)},
    )
    monkeypatch.setitem(LOSSES, "whole", row)
    assert LossConfig(kind="whole").beta == beta
    assert LossConfig(kind="whole", parameters={"beta": 2}).beta == 2.0
    assert TermConfig(kind="whole", parameters={"cap": 0.5}).values == {"beta": beta, "cap": 0.5}
    with pytest.raises(KindError, match=r"parameters.beta = True: Input should be a valid number"):
        LossConfig(kind="whole", parameters={"beta": True})


def test_a_row_that_forgets_a_hyper_parameter_cannot_be_used():
    forgetful = Row(f"{__name__}:whole_beta", inputs=LOSSES["sigmoid"].inputs)
    with pytest.raises(TypeError, match=r"beta: float = 1 is not in the row; cap: .*None is not in the row"):
        forgetful.check_against(whole_beta)
