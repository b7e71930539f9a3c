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
from ros2_ood_seg.ros.images import image_to_rgb, image_to_scores, rgb_to_compressed
from ros2_ood_seg.ros.outputs import IMAGE_TOPICS, SMALL_TOPICS, Outputs
from ros2_ood_seg.ros.parameters import NodeConfig
from ros2_ood_seg.types import Calibration, FrameResult, Instances, Prompts, ScoreMap
from ros2_ood_seg.visualization import draw_overlay

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


@pytest.mark.parametrize("heat", [True, False])
def test_messages_hold_what_was_found(context: rclpy.Context, monkeypatch: pytest.MonkeyPatch, heat: bool) -> None:
    node = LifecycleNode("outputs", context=context)
    statistics = FrameStatistics()
    outputs = Outputs(node, statistics)
    depths = {name: publisher.qos_profile.depth for name, publisher in outputs._publishers.items()}
    assert depths == {**dict.fromkeys(outputs._publishers, 5), **dict.fromkeys(IMAGE_TOPICS, 2)}
    made = {name: Listened(1) for name in (*SMALL_TOPICS, *IMAGE_TOPICS, "detections")}
    outputs._publishers = made
    monkeypatch.setattr("ros2_ood_seg.ros.messages.detections_message", lambda instances: instances.header)
    masks = torch.zeros((2, 32, 40), dtype=torch.bool)
    masks[0, 4:16, 4:20] = masks[1, 4:16, 4:21] = True
    # Of the second one, 12 px remain beside the first.
    found = Instances.from_masks(masks, torch.tensor([0.9, 0.6]), torch.zeros(2), torch.zeros(2))
    scores = torch.linspace(0, 1, 32 * 40).reshape(32, 40)
    score_map = ScoreMap(scores, "test", Calibration.linear())
    result = FrameResult(found, score_map, Prompts.empty(), scores + 1, {"score": 3.0, "total": 8.0}, min_area_px=13)
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    header = Header(frame_id="front", stamp=node.get_clock().now().to_msg())

    def publish(**switched: bool) -> dict[str, Any]:
        for publisher in made.values():
            publisher.sent.clear()
        config = NodeConfig(overlay={"heat": heat, "jpeg_quality": 20}, publish=switched)
        outputs.publish(header, image, result, config)
        return {name: publisher.sent[0] for name, publisher in made.items() if publisher.sent}

    sent = publish()
    assert len(sent["instances"].instances) == len(sent["boxes"].boxes) == 1
    assert sent["instance_mask"].encoding == "mono16"
    labels = np.frombuffer(sent["instance_mask"].data, np.uint16).reshape(32, 40)
    assert np.array_equal(labels, masks[0].numpy())
    assert np.array_equal(image_to_scores(sent["anomaly_map"]), (scores + 1).numpy())
    overlay = draw_overlay(image, found.select(torch.tensor([0])), score_map if heat else None)
    assert np.array_equal(image_to_rgb(sent["overlay"]), overlay)
    assert sent["overlay/compressed"] == rgb_to_compressed(overlay, 20, header)
    assert "semantic" not in sent, "the scorer has no classes"
    assert sent["detections"] == header
    assert "detections" not in publish(detections=False)
    latency_ms = sent["timing"].latency_ms
    assert 0 < latency_ms < 60_000
    assert list(sent["timing"].stages) == ["score", "total"]
    values = {entry.key: entry.value for entry in statistics.status("outputs", "active", {}).values}
    assert {"score p50 [ms]": "3.0", "total p95 [ms]": "8.0"}.items() <= values.items()
    assert float(values["latency p95 [ms]"]) > 0
    node.destroy_node()


def test_a_quality_of_service_that_cannot_be_used_leaves_no_publisher_behind(context: rclpy.Context) -> None:
    given = [Parameter("qos_overrides./outputs/overlay.publisher.depth", value="two")]
    node = LifecycleNode("outputs", context=context, parameter_overrides=given)
    before = sum(1 for _ in node.publishers)
    with pytest.raises(Exception, match="depth"):
        Outputs(node, FrameStatistics())
    assert sum(1 for _ in node.publishers) == before
    node.destroy_node()
