"""The shuffle: every sample once an epoch, found at any position without walking there."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import Order
from pipeline.plan import Plan


def whole(counts, seed=0, window=65_536) -> Order:
    return Order(seed, Plan.whole(np.cumsum([0, *counts])), window)


def weighted(seed: int, counts: np.ndarray, weights: list[float], skipped: list[int], window: int) -> Order:
    """Rows of each shard are of source row % C."""
    plan, sources = Plan.whole(np.cumsum([0, *counts])), len(weights)
    gone = np.array(sorted(set(skipped) & set(range(int(sum(counts))))), np.int64)
    starts = plan.shard_starts.tolist()
    kept = [np.setdiff1d(np.arange(a, b), gone) % sources for a, b in zip(starts, starts[1:], strict=False)]
    kept_SC = np.array([np.bincount(k, minlength=sources) for k in kept]).reshape(-1, sources)
    return Order(seed, replace(plan, skipped=gone, weight_C=np.array(weights), kept_SC=kept_SC,
                               source_of=lambda rows: rows % sources), window)


counts = st.lists(st.integers(1, 30), min_size=1, max_size=12)
orders = st.one_of(
    st.builds(whole, counts, st.integers(0, 2**63 - 1), st.integers(1, 100)),
    st.builds(weighted, st.integers(0, 2**63 - 1), counts, st.lists(st.floats(0.1, 3.5), min_size=1, max_size=3),
              st.lists(st.integers(0, 300), max_size=8), st.integers(1, 100))).filter(len)


def pairs(places) -> list[tuple[int, int]]:
    """(row, repeat) of each place."""
    return list(zip(places.rows.tolist(), places.repeats.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(0, 3), st.data())
def test_any_slice_of_the_stream_equals_the_whole(order, epoch, data):
    length = len(order)
    stream = order.places(epoch * length, 2 * length)
    assert np.array_equal(stream.epochs, np.repeat([epoch, epoch + 1], length))
    at = data.draw(st.integers(0, 2 * length - 1))
    count = data.draw(st.integers(1, 2 * length - at))
    part = order.places(epoch * length + at, count)
    for mine, theirs in zip(part, stream, strict=True):
        assert np.array_equal(mine, theirs[at : at + count])


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(0, 3))
def test_an_epoch_holds_each_row_exactly_as_often_as_it_weighs(order, epoch):
    places = order.places(epoch * len(order), len(order))
    rows = np.setdiff1d(np.arange(order.plan.shard_starts[-1]), order.plan.skipped)
    weight = order.plan.weight_C[order.plan.source_of(rows)]
    times = np.bincount(places.rows, minlength=order.plan.shard_starts[-1])
    assert times.sum() == times[rows].sum(), "a skipped row came"
    assert np.isin(times[rows] - np.floor(weight), (0, 1)).all()
    assert (times[rows][weight == np.floor(weight)] == weight[weight == np.floor(weight)]).all()
    for source, w in enumerate(order.plan.weight_C):
        mine = rows[order.plan.source_of(rows) == source]
        assert abs(times[mine].sum() - w * len(mine)) <= 0.5 + 1e-6, "not w times its rows"
    assert sorted(pairs(places)) == [(row, n) for row in rows.tolist() for n in range(times[row])]


def test_the_fraction_is_another_subset_every_epoch():
    order = weighted(1, np.array([100] * 10), [0.3], [], 250)
    first, second = (set(order.places(epoch * 300, 300).rows.tolist()) for epoch in (0, 1))
    assert len(first) == len(second) == 300
    assert 50 < len(first & second) < 130  # 90 expected of independent subsets
    seen = np.concatenate([order.places(epoch * 300, 300).rows for epoch in range(60)])
    assert len(set(seen.tolist())) == 1000


def test_small_shards_take_turns_at_a_small_weight():
    order = weighted(2, np.array([3] * 50), [0.1], [], 40)
    assert len(order) == 15
    assert len(set(order.places(0, 15 * 80).rows.tolist())) == 150


def test_epochs_and_seeds_differ():
    first, second = (whole([100] * 10).places(epoch * 1000, 1000).rows for epoch in (0, 1))
    other = whole([100] * 10, seed=1).places(0, 1000).rows
    assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.15
    assert abs(np.corrcoef(np.argsort(first), np.argsort(other))[0, 1]) < 0.15


def test_reads_stay_inside_one_window_of_shards():
    order = whole([100] * 10, window=300)
    rows = order.places(0, 1000).rows
    for start in (0, 300, 600):
        shards = set((rows[start : start + 300] // 100).tolist())
        assert len(shards) == 3
        assert set(order.window_shards(start)[:3]) == shards
    assert set(order.window_shards(0)[3:]) == set((rows[300:600] // 100).tolist())


def shuffle_quality(order: Order, shard_of: np.ndarray) -> tuple[float, float]:
    """Correlation of a row's positions in two epochs; neighbours from one shard, relative to a full shuffle."""
    length = len(order)
    first, second = (np.argsort(order.places(epoch * length, length).rows) for epoch in (0, 1))
    shard = shard_of[order.places(0, length).rows]
    share = np.bincount(shard) / length
    return float(np.corrcoef(first, second)[0, 1]), float((shard[1:] == shard[:-1]).mean() / (share**2).sum())


def test_the_shuffle_is_nearly_as_good_as_a_full_one():
    """1,024 shards of 1,000 rows, scaled down 16 times: a window of 64 shards is a 16th of the set."""
    shard_of = np.repeat(np.arange(1024), 62)
    correlation, neighbours = shuffle_quality(whole([62] * 1024, window=4096), shard_of)
    assert abs(correlation) < 0.15
    assert neighbours < 20, "66 shards a window of 1,024: at most 16 times a full shuffle's neighbours"
    correlation, neighbours = shuffle_quality(whole([62] * 1024), shard_of)
    assert abs(correlation) < 0.02
    assert 0.5 < neighbours < 1.5


def test_an_empty_index_has_no_order():
    with pytest.raises(ValueError, match="empty index"):
        whole([]).places(0, 1)
