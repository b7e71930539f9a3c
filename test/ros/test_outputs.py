from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("ros2_ood_seg.msg", reason="the messages are not built (colcon build)")

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from ros2_ood_seg.ros.diagnostics import FrameStatistics
from ros2_ood_seg.ros.outputs import IMAGE_TOPICS, SMALL_TOPICS, Outputs
from ros2_ood_seg.ros.parameters import NodeConfig
from ros2_ood_seg.types import Calibration, FrameResult, Instances, Prompts, ScoreMap

pytestmark = pytest.mark.dds


@pytest.fixture
def context(dds: int) -> Iterator[rclpy.Context]:
    one = rclpy.Context()
    rclpy.init(context=one, domain_id=dds)
    yield one
    rclpy.shutdown(context=one)


def test_classes_are_computed_for_those_who_listen_only(context: rclpy.Context) -> None:
    computed = []

    def classes() -> torch.Tensor:
        computed.append(1)
        return torch.full((16, 20), 3, dtype=torch.uint8)

    node = LifecycleNode("outputs", context=context)
    outputs = Outputs(node, FrameStatistics())
    node.trigger_configure()
    node.trigger_activate()

    def publish() -> None:
        score_map = ScoreMap(torch.zeros(16, 20), "test", Calibration.linear(), classes, ("a", "b", "c", "d"))
        none = Instances.empty((16, 20))
        result = FrameResult(none, score_map, Prompts.empty(), score_map.scores, {"total": 1.0})
        outputs.publish(Header(), np.zeros((16, 20, 3), np.uint8), result, NodeConfig())

    publish()
    assert not computed
    heard: list[Image] = []
    node.create_subscription(Image, "outputs/semantic", heard.append, 5)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    for _ in range(200):
        if heard:
            break
        publish()
        executor.spin_once(timeout_sec=0.1)
    assert heard
    assert set(heard[0].data) == {3}
    node.destroy_node()


class Listened:
    """Stands for a publisher with so many subscribers."""

    def __init__(self, subscribers: int) -> None:
        self.subscribers = subscribers
        self.sent: list[Any] = []

    def get_subscription_count(self) -> int:
        return self.subscribers

    def publish(self, message: Any) -> None:
        self.sent.append(message)


def test_what_is_switched_off_or_has_no_listener_is_not_sent(context: rclpy.Context) -> None:
    node = LifecycleNode("outputs", context=context)
    statistics = FrameStatistics()
    outputs = Outputs(node, statistics)
    topics = {*SMALL_TOPICS, *IMAGE_TOPICS}
    header = Header(frame_id="front")

    def sent(listened_to: set[str], **publish: bool) -> set[str]:
        made = {name: Listened(int(name in listened_to)) for name in topics}
        outputs._publishers = made
        classes = torch.zeros((16, 20), dtype=torch.uint8)
        score_map = ScoreMap(torch.zeros(16, 20), "test", Calibration.linear(), lambda: classes, ("a",))
        result = FrameResult(Instances.empty((16, 20)), score_map, Prompts.empty(), score_map.scores, {"total": 1.0})
        outputs.publish(header, np.zeros((16, 20, 3), np.uint8), result, NodeConfig(publish=publish))
        messages = {name: publisher.sent for name, publisher in made.items() if publisher.sent}
        assert all(len(one) == 1 and one[0].header == header for one in messages.values())
        if "timing" in messages:
            # The frame of which it tells is among the answered ones.
            assert messages["timing"][0].answered == statistics.counts()["answered"]
        return set(messages)

    assert sent(topics) == topics
    assert sent(set()) == set(SMALL_TOPICS)
    for name in ("overlay", "overlay/compressed", "anomaly_map"):
        assert sent({name}) == {*SMALL_TOPICS, name}
    for name in ("boxes", "timing", "instance_mask", "anomaly_map", "semantic", "overlay"):
        assert sent(topics, **{name: False}) == {topic for topic in topics if topic.split("/")[0] != name}
    assert statistics.counts()["answered"] == 11
    node.destroy_node()


def test_a_quality_of_service_that_cannot_be_used_leaves_no_publisher_behind(context: rclpy.Context) -> None:
    given = [Parameter("qos_overrides./outputs/overlay.publisher.depth", value="two")]
    node = LifecycleNode("outputs", context=context, parameter_overrides=given)
    before = sum(1 for _ in node.publishers)
    with pytest.raises(Exception, match="depth"):
        Outputs(node, FrameStatistics())
    assert sum(1 for _ in node.publishers) == before
    node.destroy_node()
