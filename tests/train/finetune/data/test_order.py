"""Which sample stands at which position: every one equally often, in an order that depends on the seed alone."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from train.finetune.batches.batches import batch_positions, upcoming_positions
from train.finetune.config import FinetuneConfig
from train.finetune.data.order import SampleOrder

COUNTS = [3, 12, 5, 4]
BUCKETS = [np.arange(count) * 7 % 5 % 3 for count in COUNTS]  # of three buckets, one of them rare


def bucket_of(shard: int) -> np.ndarray:
    return BUCKETS[shard]


def bucketed(**changes) -> SampleOrder:
    settings = {"window": 2, "seed": 3, "batch_size": 4, "buckets": 3, "bucket_of": bucket_of}
    return SampleOrder(COUNTS, **settings | changes)


def test_every_epoch_visits_every_sample_once_in_another_order():
    order = SampleOrder(COUNTS, window=2, seed=0)
    epochs = [[order.at(epoch * 24 + i) for i in range(24)] for epoch in range(3)]
    assert all(sorted(row for row, _ in epoch) == list(range(24)) for epoch in epochs)
    assert [{visit for _, visit in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.locate(3) == (1, 0) and order.locate(2) == (0, 2) and order.locate(23) == (3, 3)


def test_a_window_of_shards_is_read_before_the_next_one_begins():
    order = SampleOrder([4] * 6, window=2, seed=1)
    shards = [order.locate(order.at(i)[0])[0] for i in range(24)]
    assert [len(set(shards[start : start + 8])) for start in (0, 8, 16)] == [2, 2, 2]


def test_a_repeated_shard_stands_in_an_epoch_that_often_with_visits_of_its_own():
    order = SampleOrder(COUNTS, window=2, seed=0, repeats=[1, 1, 3, 1])
    assert order.size == 3 + 12 + 3 * 5 + 4
    seen = [order.at(i) for i in range(2 * order.size)]
    assert len(set(seen)) == len(seen)  # no visit twice: each is augmented in its own way
    visits = Counter(row for row, _ in seen)
    assert {visits[row] for row in range(15, 20)} == {6}
    assert {visits[row] for row in [*range(15), *range(20, 24)]} == {2}
    places = [i for i, (row, _) in enumerate(seen[: order.size]) if row == 15]
    assert len(places) == 3


@pytest.mark.parametrize("repeats", [[1, 1, 1, 1], [2, 1, 3, 1]])
def test_every_batch_is_of_one_bucket_and_every_sample_is_visited_equally_often(repeats):
    order = bucketed(repeats=repeats)
    flat = np.concatenate(BUCKETS)
    seen = []
    for batch in range(120):
        at = [order.at(4 * batch + slot) for slot in range(4)]
        assert {flat[row] for row, _ in at} == {order.bucket(4 * batch)}
        seen += at
    assert len(set(seen)) == len(seen)  # no visit twice
    whole = 480 // order.size - 2  # epochs that are behind in every bucket, though the rare ones wait for a full batch
    assert whole > 5
    per_epoch = np.repeat(repeats, COUNTS).tolist()
    assert {(row, visit) for row in range(24) for visit in range(whole * per_epoch[row])} <= set(seen)  # and none lost


def test_the_last_batch_of_an_epoch_is_filled_from_the_next_one_of_the_same_bucket():
    order = bucketed()
    rare = int(np.bincount(np.concatenate(BUCKETS)).argmin())
    size = int((np.concatenate(BUCKETS) == rare).sum())
    assert size % 4
    of_rare = [batch for batch in range(60) if order.bucket(4 * batch) == rare]
    visits = [order.at(4 * batch + slot)[1] for batch in of_rare for slot in range(4)]
    assert visits == [i // size for i in range(len(visits))]


def test_batches_come_in_the_order_in_which_their_last_samples_stand():
    order, plain = bucketed(), SampleOrder(COUNTS, window=2, seed=3)
    place = {plain.at(i): i for i in range(24 * 4)}
    last = [max(place[order.at(4 * batch + slot)] for slot in range(4)) for batch in range(20)]
    assert last == sorted(last)


def test_one_bucket_gives_the_plain_order():
    plain = SampleOrder(COUNTS, window=2, seed=3)
    one = bucketed(buckets=1, bucket_of=lambda shard: np.zeros(COUNTS[shard], dtype=np.uint16))
    assert [one.at(i) for i in range(100)] == [plain.at(i) for i in range(100)]


def test_half_a_batch_is_of_one_bucket_too_so_that_smaller_passes_take_the_same_samples():
    order = bucketed()
    for half in range(60):
        assert len({order.bucket(2 * half + slot) for slot in range(2)}) == 1


def test_a_position_holds_the_same_whatever_was_asked_for_before_and_in_another_process():
    order = bucketed()
    expected = {i: order.at(i) for i in range(200)}
    fresh = pickle.loads(pickle.dumps(order))
    assert len(pickle.dumps(order)) < 4096  # no epoch travels to the workers
    for i in np.random.default_rng(0).permutation(200).tolist():
        assert fresh.at(i) == expected[i]
    assert [bucketed(seed=4).at(i) for i in range(50)] != [order.at(i) for i in range(50)]


def test_substitutes_are_of_the_same_bucket_first_of_the_same_window_and_differ_by_position():
    order = bucketed(window=1)
    flat = np.concatenate(BUCKETS)
    for position in range(0, 96, 5):
        row = order.at(position)[0]
        others = [other for other, _ in order.substitutes(position)]
        assert row not in others and len(set(others)) == len(others)
        assert set(others) == set(np.flatnonzero(flat == flat[row]).tolist()) - {row}
        shard = order.locate(row)[0]
        near = [order.locate(other)[0] == shard for other in others]
        assert near == sorted(near, reverse=True)
        assert others == [other for other, _ in bucketed(window=1).substitutes(position)]
    one = SampleOrder([200], window=1, seed=0)
    assert len({next(one.substitutes(position)) for position in range(30)}) > 20  # not one for all of a lost shard


def test_processes_share_positions_without_gap_or_overlap_and_lazily():
    config = FinetuneConfig(model="", out="", shards=[], steps=2, batch_size=3, gradient_accumulation=2)
    positions = [
        p for step in range(2) for micro in range(2) for rank in range(2)
        for p in batch_positions(step, micro, rank, 2, config)
    ]  # fmt: skip
    assert positions == list(range(24))
    assert [list(batch) for batch in upcoming_positions(1, 1, 2, config)] == [[15, 16, 17], [21, 22, 23]]
    endless = FinetuneConfig(model="", out="", shards=[], steps=10**12)
    assert next(upcoming_positions(0, 0, 1, endless)) == range(8)
