import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rlhf.engine.ranks import Ranks
from rlhf.train import throughput as measured
from rlhf.train.throughput import flops_per_token, peak_flops, throughput

TWO = Ranks(rank=0, world_size=2, local_rank=0, local_size=2, device=torch.device("cpu"))


def model(frozen: int = 0) -> nn.Sequential:
    layers = [nn.Embedding(50, 16), nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8), nn.Linear(8, 50)]
    found = nn.Sequential(*layers)
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    return found


@pytest.mark.parametrize("frozen", [0, 1])
def test_operations_of_a_token_are_those_that_pytorch_counts(frozen):
    net, tokens = model(frozen), 40
    with FlopCounterMode(display=False) as counter:
        net(torch.randint(50, (tokens,))).square().sum().backward()
    # An embedding that is trained asks for the gradient of what it gave; a frozen one ends the backward pass.
    first = 0 if not frozen else 2 * 16 * 32
    assert flops_per_token(net) == counter.get_total_flops() / tokens + first


def test_a_weight_that_is_not_trained_takes_four_operations_instead_of_six():
    net = model()
    whole = flops_per_token(net)
    net[3].weight.requires_grad_(False)
    assert whole - flops_per_token(net) == 2 * 32 * 8


def test_a_partitioned_weight_counts_whole():
    net = model()
    whole = flops_per_token(net)
    net[3].weight.ds_shape = net[3].weight.shape
    net[3].weight.data = torch.zeros(0)
    assert flops_per_token(net) == whole


def test_rates_are_of_all_ranks_and_of_one():
    found = throughput({"pairs": 8.0, "tokens": 1000.0, "loss": 1.0}, 2.0, TWO, token_flops=6e9)
    assert found["time/pairs_per_second"] == 4 and found["time/tokens_per_second"] == 500
    assert found["time/tokens_per_second_per_device"] == 250 and found["time/model_tflops_per_device"] == 1.5
    assert "time/mfu" not in found, "nobody knows what a CPU promises"
    assert 0.05 < found["memory/peak_gib"] < 500


@pytest.mark.parametrize(
    ("name", "flops"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("GeForce 256", None)],
)
def test_the_share_of_what_a_card_promises(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == flops
    monkeypatch.setattr(measured, "peak_flops", lambda device: flops)
    found = throughput({"tokens": 1000.0}, 1.0, TWO, token_flops=6e9)
    assert found.get("time/mfu") == (None if flops is None else 500 * 6e9 / flops)
