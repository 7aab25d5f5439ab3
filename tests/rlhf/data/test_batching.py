import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.core.epochs import steps_per_epoch
from rlhf.data.batching import (
    Item,
    MicroBatchPlan,
    Row,
    _planned,
    _split_rows,
    buckets_per_micro_step,
    collate,
    global_batch,
    plan_micro_batches,
)


class Source:
    """Row ``i`` of side ``s`` is filled with the number ``10 i + s``."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def item(self, index):
        rows = (
            Row(np.full(length, 10 * index + side, dtype=np.int32), np.arange(length) >= 1)
            for side, length in enumerate(self.lengths[index])
        )
        return Item(f"rows.jsonl:{index + 1}", tuple(rows))


lengths_of_pairs = st.lists(st.tuples(st.integers(2, 90), st.integers(2, 90)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths_of_pairs, st.integers(50, 600), st.integers(1, 4), st.integers(1, 4))
def test_every_pair_is_planned_once_and_the_budget_holds(lengths, budget, ranks, length_buckets):
    lengths = np.array(lengths)
    plan = plan_micro_batches(lengths, token_budget=budget, ranks=ranks, length_buckets=length_buckets)
    parts = [part for micro_step in plan for part in micro_step]
    assert sorted(pair for part in parts for pair in part.items) == list(range(len(lengths)))
    assert all(len(micro_step) == ranks for micro_step in plan)
    for part in parts:
        rows = [row for bucket in part.buckets for row in bucket]
        assert sorted(rows) == list(range(2 * len(part.items)))
        assert len(part.buckets) <= length_buckets
        assert part.padded_tokens <= budget or len(part.items) == 1


def cheapest_split(rows, buckets):
    """Least padded tokens by trying every cut: a slow second opinion."""
    rows = sorted(rows, reverse=True)
    if buckets == 1 or len(rows) == 1:
        return rows[0] * len(rows)
    cuts = (rows[0] * cut + cheapest_split(rows[cut:], buckets - 1) for cut in range(1, len(rows)))
    return min(rows[0] * len(rows), *cuts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4), st.integers(1, 4))
def test_length_buckets_are_the_fewest_that_come_near_the_cheapest_there_are(lengths, length_buckets):
    plan = plan_micro_batches(np.array(lengths), token_budget=10**6, ranks=1, length_buckets=length_buckets)
    assert len(plan) == 1
    part = plan[0][0]
    by_row = [chosen for chosen, _ in lengths], [rejected for _, rejected in lengths]
    rows = [by_row[0][pair] for pair in part.items] + [by_row[1][pair] for pair in part.items]
    enough = 1.04 * cheapest_split(rows, length_buckets)
    fewest = next(count for count in range(1, length_buckets + 1) if cheapest_split(rows, count) <= enough)
    assert part.padded_tokens == cheapest_split(rows, fewest)
    assert len(part.buckets) <= fewest
    assert part.padded_tokens == sum(max(rows[row] for row in bucket) * len(bucket) for bucket in part.buckets)


def planned_one_by_one(lengths, budget, ranks, buckets):
    """The same plans the slow way: every item tried behind the one before it, every split made to the end."""

    def pack(cap):
        bins, rows = [], []
        for item in order.tolist():
            longer = [*rows, *lengths[item].tolist()]
            if bins and _split_rows(np.array(longer), buckets)[0] <= cap:
                bins[-1].append(item)
                rows = longer
            else:
                bins.append([item])
                rows = lengths[item].tolist()
        return bins

    order = np.argsort(-lengths.sum(axis=1), kind="stable")
    bins = pack(budget)
    count = -(-len(bins) // ranks) * ranks
    low, high = int(lengths.sum()) // max(count, 1), budget
    while high - low > max(high // 50, 1):
        middle = (low + high) // 2
        trial = pack(middle)
        if len(trial) <= count:
            bins, high = trial, middle
        else:
            low = middle
    plans = []
    for items in bins:
        rows = lengths[items].T.reshape(-1)
        least = _split_rows(rows, buckets)[0]
        bound = max(least, min(1.04 * least, budget))
        tries = (_split_rows(rows, count) for count in range(1, buckets + 1))
        cost, split = next((cost, split) for cost, split in tries if cost <= bound)
        plans.append(MicroBatchPlan(tuple(items), split, cost))
    plans += [MicroBatchPlan((), (), 0)] * (count - len(plans))
    return [plans[start : start + ranks] for start in range(0, count, ranks)]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3).flatmap(lambda rows: st.lists(st.tuples(*[st.integers(1, 60)] * rows), min_size=1, max_size=40)),
    st.integers(40, 900),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_plans_are_those_of_trying_one_item_after_the_other(lengths, budget, ranks, buckets):
    lengths = np.array(lengths)
    plan = plan_micro_batches(lengths, token_budget=budget, ranks=ranks, length_buckets=buckets)
    assert plan == planned_one_by_one(lengths, budget, ranks, buckets)


def test_the_same_rows_are_planned_once():
    lengths = np.random.default_rng(5).integers(10, 900, size=(300, 1)).astype(np.int32)
    options = {"token_budget": 8192, "ranks": 2, "length_buckets": 4}
    first = plan_micro_batches(lengths, **options)
    first[0].clear()  # what a caller does with its plan is its own
    before = _planned.cache_info()
    assert len(plan_micro_batches(lengths.copy(), **options)[0]) == 2
    assert _planned.cache_info().hits == before.hits + 1


def test_ranks_get_nearly_equal_work():
    lengths = np.random.default_rng(0).integers(20, 400, size=(64, 2))
    plan = plan_micro_batches(lengths, token_budget=4096, ranks=2, length_buckets=4)
    waited = sum(2 * max(part.padded_tokens for part in micro_step) for micro_step in plan)
    assert waited < 1.15 * sum(part.padded_tokens for micro_step in plan for part in micro_step)


def test_padding_is_under_ten_percent_on_lengths_of_real_answers():
    generator = np.random.default_rng(1)
    lengths = np.clip(generator.gamma(2.6, 92, size=(640, 2)), 30, 1024).astype(int)
    computed = real = 0
    for step in range(10):
        batch = lengths[global_batch(step, items=640, batch_size=64, seed=0)]
        for micro_step in plan_micro_batches(batch, token_budget=4096, ranks=2, length_buckets=4):
            computed += sum(part.padded_tokens for part in micro_step)
        real += batch.sum()
    assert 1 - real / computed < 0.10
    fixed = sum(16 * lengths[start : start + 8].max() for start in range(0, 640, 8))
    assert 1 - real / fixed > 0.40


def test_a_lone_pair_leaves_the_second_rank_with_filler():
    plan = plan_micro_batches(np.array([[5, 7]]), token_budget=100, ranks=2, length_buckets=2)
    assert plan == [[MicroBatchPlan((0,), ((1,), (0,)), 12), MicroBatchPlan((), (), 0)]]


def test_an_epoch_is_every_pair_once_with_a_smaller_last_batch():
    steps = steps_per_epoch(10, 4)
    batches = [global_batch(step, items=10, batch_size=4, seed=3) for step in range(steps)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("items", "last", "sizes"),
    [
        (9, "keep", [4, 4, 1]),
        (9, "merge", [4, 5]),
        (9, "drop", [4, 4]),
        (10, "merge", [4, 4, 2]),
        (11, "drop", [4, 4]),
        (8, "merge", [4, 4]),
        (8, "drop", [4, 4]),
        (1, "merge", [1]),
        (3, "drop", [3]),
        (5, "merge", [5]),
    ],
)
def test_what_is_left_of_an_epoch_is_a_batch_of_its_own_joined_to_another_or_left_out(items, last, sizes):
    steps = steps_per_epoch(items, 4, last)
    for epoch in range(2):
        batches = [
            global_batch(epoch * steps + place, items=items, batch_size=4, seed=3, last=last) for place in range(steps)
        ]
        assert [len(batch) for batch in batches] == sizes
        assert len(set(np.concatenate(batches).tolist())) == sum(sizes)


def test_what_one_epoch_leaves_out_another_has():
    seen = np.concatenate([global_batch(step, items=9, batch_size=4, seed=3, last="drop") for step in range(8)])
    assert set(seen.tolist()) == set(range(9))


def test_epochs_and_seeds_have_orders_of_their_own():
    first = global_batch(0, items=50, batch_size=50, seed=0).tolist()
    assert global_batch(0, items=50, batch_size=50, seed=0).tolist() == first
    assert global_batch(1, items=50, batch_size=50, seed=0).tolist() != first
    assert global_batch(0, items=50, batch_size=50, seed=1).tolist() != first


def test_order_puts_rows_back_to_chosen_then_rejected():
    source = Source([[3, 9], [8, 2], [5, 5]])
    indices = np.array([2, 0, 1])
    (parts,) = plan_micro_batches(source.lengths[indices], token_budget=1000, ranks=1, length_buckets=3)
    batch = collate(source, indices, parts[0], buckets_per_micro_step(parts))
    first_tokens = torch.cat([bucket.tokens[:, 0] for bucket in batch.buckets])[batch.order]
    dataset = indices[batch.positions.numpy()]
    assert first_tokens.tolist() == [*(10 * dataset), *(10 * dataset + 1)]
    assert batch.row_ids == tuple(f"rows.jsonl:{index + 1}" for index in dataset)


def test_one_side_of_a_batch_is_its_rows_in_as_many_buckets():
    source = Source([[3, 9], [8, 2], [5, 5], [9, 9]])
    indices = np.array([2, 0, 3, 1])
    (parts,) = plan_micro_batches(source.lengths[indices], token_budget=1000, ranks=1, length_buckets=3)
    batch = collate(source, indices, parts[0], 5, packed=True, apart=True)
    whole = batch.sides(torch.cat([bucket.tokens[:, 0] for bucket in batch.buckets]))
    for side, part in enumerate(batch.parts):
        assert len(part.buckets) == 5 and part.row_ids == batch.row_ids
        (first,) = part.sides(torch.cat([bucket.tokens[:, 0] for bucket in part.buckets]))
        (counts,) = part.sides(torch.cat([bucket.token_mask.sum(dim=1) for bucket in part.buckets]))
        assert torch.equal(first, whole[side])
        assert counts.tolist() == source.lengths[batch.indices.numpy(), side].tolist()
        assert all(bool(bucket.token_mask[:, -1].any()) for bucket in part.buckets), "no padding for others"
        packing = part.buckets.packing
        assert packing is not None and len(packing.tokens) <= sum(counts.tolist()) + 5
    assert len(batch.parts) == 2
    filler = collate(source, indices, MicroBatchPlan((), (), 0), 5, apart=True)
    assert [(len(part), len(part.buckets)) for part in filler.parts] == [(0, 5), (0, 5)]


def test_masks_come_from_lengths_even_where_tokens_equal_zero():
    source = Source([[4, 2]])
    plan = MicroBatchPlan((0,), ((0, 1),), 8)
    (bucket,) = collate(source, np.array([0]), plan, 1).buckets
    assert bucket.token_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert bucket.response_mask.tolist() == [[False, True, True, True], [False, True, False, False]]


def test_filler_has_the_groups_of_the_others_and_no_pair():
    source = Source([[4, 2]])
    filler = collate(source, np.array([0]), MicroBatchPlan((), (), 0), 3)
    assert len(filler) == 0 and len(filler.buckets) == 3
    assert filler.order.shape == (0,)


def test_single_rows_are_items_too():
    source = Source([[4], [9], [2]])
    (parts,) = plan_micro_batches(source.lengths, token_budget=100, ranks=1, length_buckets=2)
    batch = collate(source, np.array([0, 1, 2]), parts[0], 2)
    (firsts,) = batch.sides(torch.cat([bucket.tokens[:, 0] for bucket in batch.buckets]))
    assert firsts.tolist() == [10 * index for index in batch.indices.tolist()]


def test_sides_of_filler_are_empty():
    filler = collate(Source([[4, 2]]), np.array([0]), MicroBatchPlan((), (), 0), 1)
    assert [len(side) for side in filler.sides(torch.zeros(1))] == [0, 0]
