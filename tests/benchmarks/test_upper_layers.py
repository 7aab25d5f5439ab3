import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

FOLDER = Path(__file__).parents[2] / "benchmarks" / "margin_study"


@pytest.fixture
def upper_layers(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module("upper_layers")
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def rows_with_equal_beginnings() -> list[list[int]]:
    first, second, third = (torch.randint(50, (length,)).tolist() for length in (7, 3, 12))
    return [first, second, third, third[:1], third[:5] + first, third[:5] + second, third[:3]]


@pytest.mark.parametrize("trained", [1, 2, 3])
def test_layers_trained_on_kept_states_give_the_rewards_and_gradients_of_the_whole_model(upper_layers, trained):
    torch.manual_seed(0)
    model = LlamaModel(
        LlamaConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    ).eval()
    rows = rows_with_equal_beginnings()
    weights = torch.randn(len(rows), 24)

    whole = torch.stack([model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows])
    (weights * whole).sum().backward()

    states, features = upper_layers.states_of(model, rows, trained)
    assert len(states.values) == 7 + 3 + 12 + 7 + 3 < len(states.places)
    layers = upper_layers.UpperLayers(model, trained)
    found = layers(*states.of(torch.arange(len(rows))))
    (weights * found).sum().backward()

    torch.testing.assert_close(found, whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.from_numpy(features), whole.detach(), rtol=0, atol=2e-5)
    kept = dict(model.layers[4 - trained :].named_parameters())
    for name, parameter in layers.layers.named_parameters():
        torch.testing.assert_close(parameter.grad, kept[name].grad, rtol=1e-4, atol=2e-4)


def test_answers_of_any_lengths_are_read_in_the_order_asked_for(upper_layers, monkeypatch):
    monkeypatch.setattr(upper_layers, "ROWS", 4)
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaModel(config).eval()
    states, features = upper_layers.states_of(model, rows_with_equal_beginnings(), 1)
    moments = features.mean(0), features.std(0)
    rewarded = upper_layers.RewardModel(upper_layers.UpperLayers(model, 1), moments, seed=0)
    asked = torch.tensor([2, 0, 3, 2, 5, 1])
    read, rewards = rewarded(states, asked)
    expected = (torch.from_numpy(features)[asked] - torch.from_numpy(moments[0])) / torch.from_numpy(moments[1])
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(rewards, rewarded.head(expected).squeeze(1), rtol=0, atol=1e-4)
