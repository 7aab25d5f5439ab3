"""Values that ranks hold in parts. Whole runs with them, under each ZeRO stage: tests/policy/ppo/test_stage.py."""

import contextlib

import pytest
import torch
from torch import nn

from rlhf.core.errors import CheckpointError
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.portions import Portions
from rlhf.engine.ranks import Ranks


class Asked(ReplicatedModel):
    """Notes which parameters are whole at once."""

    def whole(self, tensors, *, modify=False):
        self.most = max(getattr(self, "most", 0), len(tensors))
        return contextlib.nullcontext()


class Unheard(Ranks):
    """One of several that are asked one after the other: what it would tell the others is lost."""

    def any(self, flag: bool) -> bool:
        return flag

    def gather_rows(self, rows):
        if self.world_size > 1:
            raise AssertionError("the others are not here")
        return rows


def module() -> nn.Module:
    """Tensors of sizes that no number of ranks divides, one of a single number."""
    made = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in [(3, 5), (7,), (1,), (2, 2, 3)]])
    return made.bfloat16()


def portions(values: nn.Module, rank: int, ranks: int, dtype=None) -> tuple[Portions, Asked]:
    at = Unheard(rank=rank, world_size=ranks, local_rank=rank, local_size=ranks, device=torch.device("cpu"))
    model = Asked(values, at)
    return Portions(model, list(values.parameters()), dtype), model


@pytest.mark.parametrize("then", [1, 3, 4])
def test_what_some_ranks_have_written_any_number_of_ranks_reads(tmp_path, then):
    torch.manual_seed(0)
    written, other = module(), module()
    for rank in range(2):
        portions(written, rank, 2, torch.float32)[0].save(tmp_path)
    found = []
    for rank in range(then):
        mine, _ = portions(other, rank, then, torch.float32)
        mine.load(tmp_path)
        found.append(mine.parts)
    for place, parameter in enumerate(written.parameters()):
        whole = torch.cat([parts[place] for parts in found])
        assert whole.dtype == torch.float32 and torch.equal(whole, parameter.flatten().float())


def test_a_rank_holds_its_part_alone_and_one_tensor_at_a_time():
    values = module()
    total = sum(parameter.numel() for parameter in values.parameters())
    held = 0
    for rank in range(4):
        mine, model = portions(values, rank, 4)
        sizes = [len(part) for part in mine.parts]
        assert all(size <= -(-p.numel() // 4) for size, p in zip(sizes, values.parameters(), strict=True))
        assert model.most == 1 and all(part.dtype == torch.bfloat16 for part in mine.parts)
        held += sum(sizes)
    assert held == total


def test_values_come_back_bit_for_bit():
    values = module()
    before = [parameter.detach().clone() for parameter in values.parameters()]
    mine, _ = portions(values, 0, 1)
    with torch.no_grad():
        for parameter in values.parameters():
            parameter.mul_(1.7)
    mine.put()
    assert all(torch.equal(*pair) for pair in zip(values.parameters(), before, strict=True))


def test_values_that_are_not_there_or_of_another_model_are_refused(tmp_path):
    mine, _ = portions(module(), 0, 1)
    with pytest.raises(CheckpointError, match="expected 4 tensors, found none"):
        mine.load(tmp_path / "of an earlier version")
    few, _ = portions(nn.ParameterList([nn.Parameter(torch.zeros(3))]), 0, 1)
    few.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected 4 tensors, found \[1\]"):
        mine.load(tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_block_that_fails_on_one_of_several_ranks_waits_for_nobody(ranks):
    values = module()
    before = [parameter.detach().clone() for parameter in values.parameters()]
    mine, _ = portions(values, 0, ranks)
    with pytest.raises(ZeroDivisionError), mine.put_back():
        with torch.no_grad():
            values[0].mul_(1.7)
        raise ZeroDivisionError
    undone = all(torch.equal(*pair) for pair in zip(values.parameters(), before, strict=True))
    assert undone == (ranks == 1)
