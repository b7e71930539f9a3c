"""Holds the stand-ins to message_filters' own classes wherever those are installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from builtin_interfaces.msg import Time
from hypothesis import given
from hypothesis import strategies as st

from ros2_ood_seg.ros import message_sync

try:
    import message_filters
except ImportError:
    message_filters = None

IMPLEMENTATIONS = [message_sync] if message_filters is None else [message_sync, message_filters]
ARRIVALS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12)), max_size=40)


def run(module: Any, arrivals: list[tuple[int, int]], queue_size: int, slop: float | None = None) -> list[tuple[int, ...]]:
    """Numbers of the arrivals that came out together."""
    sources = [module.SimpleFilter(), module.SimpleFilter()]
    kind = module.TimeSynchronizer if slop is None else module.ApproximateTimeSynchronizer
    synchronizer = kind(sources, queue_size, *([] if slop is None else [slop]))
    matched: list[tuple[int, ...]] = []
    synchronizer.registerCallback(lambda *messages: matched.append(tuple(m.number for m in messages)))
    for number, (source, tenths) in enumerate(arrivals):
        header = SimpleNamespace(stamp=Time(sec=tenths // 10, nanosec=tenths % 10 * 100_000_000))
        sources[source].signalMessage(SimpleNamespace(header=header, number=number))
    return matched


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
def test_equal_stamps_meet_in_any_order(module: Any) -> None:
    assert run(module, [(0, 1), (0, 2), (1, 2), (1, 1), (1, 3)], queue_size=5) == [(1, 2), (0, 3)]


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
def test_the_oldest_gives_way_when_the_queue_is_full(module: Any) -> None:
    assert run(module, [(0, 1), (0, 2), (0, 3), (1, 1), (1, 3)], queue_size=2) == [(2, 4)]


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
def test_near_stamps_meet_within_the_slop(module: Any) -> None:
    assert run(module, [(0, 1), (0, 4), (1, 3), (1, 9)], queue_size=5, slop=0.15) == [(1, 2)]


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize(("waiting", "nearest"), [((1, 4), 1), ((4, 1), 0), ((2, 5), 0), ((5, 2), 1)])
def test_of_several_near_stamps_the_nearest_is_taken(module: Any, waiting: tuple[int, int], nearest: int) -> None:
    assert run(module, [(1, waiting[0]), (1, waiting[1]), (0, 3)], queue_size=5, slop=0.31) == [(2, nearest)]


@pytest.mark.skipif(message_filters is None, reason="message_filters is not installed")
@given(arrivals=ARRIVALS, queue_size=st.integers(1, 4), slop=st.none() | st.sampled_from([0.05, 0.15, 0.31]))
def test_the_stand_in_does_what_message_filters_does(arrivals: list[tuple[int, int]], queue_size: int, slop: float | None) -> None:
    assert run(message_sync, arrivals, queue_size, slop) == run(message_filters, arrivals, queue_size, slop)
