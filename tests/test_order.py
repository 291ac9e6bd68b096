"""The shuffle: every sample once an epoch, found at any position without walking there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import Order

orders = st.builds(lambda seed, counts, window: Order(seed, tuple(np.cumsum([0, *counts]).tolist()), window),
                   st.integers(0, 2**63 - 1), st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 100))


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(0, 3), st.data())
def test_any_slice_of_the_stream_equals_the_whole(order, epoch, data):
    length = len(order)
    whole, epochs = order.rows(epoch * length, 2 * length)
    assert np.array_equal(np.sort(whole[:length]), np.arange(length))
    assert np.array_equal(np.sort(whole[length:]), np.arange(length))
    assert np.array_equal(epochs, np.repeat([epoch, epoch + 1], length))
    at = data.draw(st.integers(0, 2 * length - 1))
    count = data.draw(st.integers(1, 2 * length - at))
    assert np.array_equal(order.rows(epoch * length + at, count)[0], whole[at : at + count])


def test_epochs_and_seeds_differ():
    starts = tuple(range(0, 1001, 100))
    first, second = (Order(0, starts, 1000).rows(epoch * 1000, 1000)[0] for epoch in (0, 1))
    other = Order(1, starts, 1000).rows(0, 1000)[0]
    assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.15
    assert abs(np.corrcoef(np.argsort(first), np.argsort(other))[0, 1]) < 0.15


def test_reads_stay_inside_one_window_of_shards():
    order = Order(0, tuple(range(0, 1001, 100)), window_rows=300)
    rows = order.rows(0, 1000)[0]
    for start in (0, 300, 600):
        assert len(set(rows[start : start + 300] // 100)) == 3


def test_an_empty_index_has_no_order():
    with pytest.raises(ValueError, match="empty index"):
        Order(0, (0,)).rows(0, 1)
