"""A node counts as having discovered us when its own diagnostics arrive, not when another's do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from harness import PATIENCE_S
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from ros2_ood_seg.ros.discovery import DiscoveredBy

pytestmark = pytest.mark.dds


@pytest.fixture
def nodes(dds: int) -> Iterator[tuple[Node, Node, Callable[[Callable[[], bool]], None]]]:
    """Two nodes and a way to work for both until something holds."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=dds)
    executor = SingleThreadedExecutor(context=context)
    both = [rclpy.create_node(name, context=context) for name in ("listener", "other")]
    for node in both:
        executor.add_node(node)

    def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end
            executor.spin_once(timeout_sec=0.05)

    yield both[0], both[1], until
    for node in both:
        node.destroy_node()
    rclpy.shutdown(context=context)


def test_only_the_named_node_counts(nodes):
    listener, other, until = nodes
    wanted = DiscoveredBy(listener, "/camera/segmenter")
    heard = []
    listener.create_subscription(DiagnosticArray, "/diagnostics", heard.append, 10)
    publisher = other.create_publisher(DiagnosticArray, "/diagnostics", 10)
    names = ["/segmenter"]
    other.create_timer(0.05, lambda: publisher.publish(DiagnosticArray(status=[DiagnosticStatus(name=name) for name in names])))
    until(lambda: len(heard) >= 3)
    assert not wanted
    names.append("/camera/segmenter")
    until(lambda: bool(wanted))
    names.clear()
    count = len(heard)
    until(lambda: len(heard) > count + 2)
    assert wanted, "what was discovered stays so"
