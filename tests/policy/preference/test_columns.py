import math

import numpy as np
import pytest
import torch

from policy.preference.columns import RowSums, response_lengths, row_sums, view
from policy.preference.config import LossConfig
from rlhf.data.batching import MicroBatchPlan, collate


@pytest.fixture
def batch(tiny_data):
    """Three pairs in three buckets, one of them filler."""
    plan = MicroBatchPlan((0, 1, 2), ((0, 3, 5), (1, 2, 4)), 0)
    return collate(tiny_data.train, np.array([4, 7, 9]), plan, 3)


def by_hand(model, pair):
    """Log-probabilities of each response token of both sides, from whole logits."""
    hf = model.plain()
    sides = ((pair.chosen, pair.chosen_response_start), (pair.rejected, pair.rejected_response_start))
    for tokens, start in sides:
        ids = torch.from_numpy(tokens).long()[None]
        whole = hf(input_ids=ids).logits[0, :-1].log_softmax(-1)
        yield whole.gather(1, ids[0, 1:, None]).squeeze(1)[start - 1 :]


def test_sums_split_where_the_shorter_response_ends(batch, tiny_policy, tiny_data):
    sums = row_sums(tiny_policy()(batch.buckets), batch)
    lengths = response_lengths(batch)
    for place, index in enumerate((4, 7, 9)):
        sides = list(by_hand(tiny_policy(), tiny_data.train.pair(index)))
        shorter = min(map(len, sides))
        for side, values in enumerate(sides):
            torch.testing.assert_close(sums.head[side, place], values[:shorter].sum())
            torch.testing.assert_close(sums.tail[side, place], values[shorter:].sum(), rtol=1e-4, atol=1e-4)
            assert lengths[side, place] == len(values)
    assert (sums.tail.abs() > 1e-3).any(dim=0).sum() >= 2, "responses of one length prove little"


def test_padding_and_neighbors_do_not_change_a_row(batch, tiny_policy, tiny_data):
    model = tiny_policy()
    alone = collate(tiny_data.train, np.array([7]), MicroBatchPlan((0,), ((0,), (1,)), 0), 2)
    together, single = row_sums(model(batch.buckets), batch), row_sums(model(alone.buckets), alone)
    torch.testing.assert_close(together.head[:, 1], single.head[:, 0], rtol=1e-5, atol=1e-4)


def sums(head, tail):
    return RowSums(torch.tensor(head), torch.tensor(tail))


def test_the_tail_weight_leaves_drift_alone(batch):
    policy = sums([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], [[-1.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    reference = sums([[-2.0, -2.0, -2.0], [-2.0, -2.0, -2.0]], [[-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = view(policy, reference, batch, LossConfig(kind="sigmoid", tail_weight=0.5))
    assert found.columns["chosen_logratios"].tolist() == [1.5, 0.0, -1.0]
    assert found.columns["rejected_logratios"].tolist() == [-2.0, -4.0, -4.0]
    assert found.drift.tolist() == [[2.0, 0.0, -1.0], [-2.0, -5.0, -4.0]]


def test_a_divergence_changes_scores_but_not_drift(batch):
    policy, reference = sums([[1.0] * 3, [0.0] * 3], [[0.0] * 3] * 2), sums([[0.0] * 3] * 2, [[0.0] * 3] * 2)
    found = view(policy, reference, batch, LossConfig(kind="sigmoid", divergence="forward_kl"))
    assert found.columns["chosen_logratios"].tolist() == pytest.approx([1 - math.exp(-1)] * 3)
    assert found.drift[0].tolist() == [1.0] * 3


def test_without_a_reference_there_are_no_ratios(batch):
    found = view(sums([[1.0] * 3] * 2, [[0.0] * 3] * 2), None, batch, LossConfig(kind="simpo"))
    assert found.drift is None and "chosen_logratios" not in found.columns


def test_embeddings_are_means_over_the_response_alone(batch, tiny_policy, tiny_data):
    model = tiny_policy()
    chosen, _ = batch.sides(model(batch.buckets, with_embeddings=True).embeddings)
    pair = tiny_data.train.pair(4)
    states = model.hf.base_model(input_ids=torch.from_numpy(pair.chosen).long()[None]).last_hidden_state
    torch.testing.assert_close(chosen[0], states[0, pair.chosen_response_start :].mean(dim=0), rtol=1e-4, atol=1e-5)
    assert not chosen.requires_grad
