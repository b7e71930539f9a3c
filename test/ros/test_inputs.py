"""How images and anomaly maps become frames, with messages handed in directly instead of over DDS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("ros2_ood_seg.msg", reason="the messages are not built (colcon build)")

from sensor_msgs.msg import CompressedImage, Image

from ros2_ood_seg.ros.inputs import Frame, FrameSource
from ros2_ood_seg.ros.parameters import NodeConfig


class Wiring:
    """Stands for the node, and remembers what its source of frames tells it."""

    def __init__(self, external: bool = True, transport: str = "raw", **matching: Any) -> None:
        self.topics: dict[str, tuple[type, Callable[[Any], None]]] = {}
        self.frames: list[Frame] = []
        self.problems: list[str] = []
        self.images = self.late = self.closed = 0
        config = NodeConfig.model_validate({"image_transport": transport, "external": matching})
        told = (self._count_image, self._count_late, self.frames.append, self.problems.append)
        self.source = FrameSource(self, config, external, *told)  # type: ignore[arg-type]

    def _count_image(self) -> None:
        self.images += 1

    def _count_late(self) -> None:
        self.late += 1

    def resolve_topic_name(self, name: str) -> str:
        return f"/front/{name}"

    def create_subscription(self, kind: type, topic: str, callback: Callable[[Any], None], *args: Any, **kwargs: Any) -> str:
        self.topics[topic] = kind, callback
        return topic

    def destroy_subscription(self, topic: str) -> None:
        del self.topics[topic]

    def send(self, topic: str, *seconds: float) -> None:
        kind, callback = self.topics[f"/front/{topic}"]
        for second in seconds:
            message = kind()
            message.header.stamp.sec, fraction = int(second // 1), second % 1
            message.header.stamp.nanosec = round(fraction * 1e9)
            callback(message)

    @property
    def answered(self) -> list[tuple[int, float]]:
        """Epoch and stamp of each frame, s."""
        return [(frame.epoch, frame.stamp_ns / 1e9) for frame in self.frames]


def test_without_maps_every_image_is_a_frame_and_time_may_jump_back() -> None:
    wiring = Wiring(external=False)
    wiring.send("image", 10, 11, 11, 3, 4)
    assert wiring.answered == [(0, 10), (0, 11), (0, 11), (1, 3), (1, 4)]
    assert all(frame.anomaly_map is None for frame in wiring.frames)
    assert (wiring.images, wiring.source.matched, wiring.source.waiting, wiring.late) == (5, 5, 0, 0)


def test_compressed_images_are_taken_from_their_topic() -> None:
    wiring = Wiring(external=False, transport="compressed")
    assert {topic: kind for topic, (kind, _) in wiring.topics.items()} == {"/front/image/compressed": CompressedImage}
    wiring.send("image/compressed", 10)
    assert wiring.answered == [(0, 10)]
    wiring.source.destroy()
    assert not wiring.topics


@given(data=st.data(), count=st.integers(1, 8))
def test_frames_come_in_the_order_of_time_whenever_their_maps_come(data: st.DataObject, count: int) -> None:
    images, maps = list(range(100, 100 + count)), data.draw(st.permutations(range(100, 100 + count)))
    image_next = data.draw(st.permutations([True] * count + [False] * count))
    wiring = Wiring(queue_size=20)
    assert {topic: kind for topic, (kind, _) in wiring.topics.items()} == {"/front/image": Image, "/front/anomaly_map": Image}
    pending_maps = iter(maps)
    pending_images = iter(images)
    seen: tuple[set[int], set[int]] = set(), set()
    newest, expected, late = -1, [], 0
    for is_image in image_next:
        stamp = next(pending_images if is_image else pending_maps)
        wiring.send("image" if is_image else "anomaly_map", stamp)
        seen[is_image].add(stamp)
        if stamp in seen[not is_image]:
            late += stamp < newest
            expected += [(0, stamp)] if stamp > newest else []
            newest = max(newest, stamp)
    assert wiring.answered == expected
    assert (wiring.late, wiring.images, wiring.source.matched, wiring.source.waiting) == (late, count, count, 0)
    assert all(frame.anomaly_map is not None and frame.anomaly_map.header == frame.header for frame in wiring.frames)


def test_what_waits_when_time_jumps_back_is_dropped_and_maps_of_then_are_not_waited_for() -> None:
    wiring = Wiring(queue_size=3)
    wiring.send("image", 100)
    wiring.send("anomaly_map", 100)
    wiring.send("image", 101, 102, 103)
    # Images that wait from then would push out this one.
    wiring.send("image", 5)
    # These maps were still on their way; kept, they would push out those of now.
    wiring.send("anomaly_map", 101, 102, 103)
    wiring.send("anomaly_map", 5)
    # A map may come a little before its image.
    wiring.send("anomaly_map", 5.9)
    wiring.send("image", 5.9)
    assert wiring.answered == [(0, 100), (1, 5), (1, 5.9)]
    assert wiring.source.waiting == 3
    # Where time is again where it jumped from, maps count again.
    wiring.send("image", 103)
    wiring.send("anomaly_map", 103, 104)
    wiring.send("image", 104)
    assert wiring.answered[3:] == [(1, 103), (1, 104)]


def test_after_a_small_jump_back_maps_may_still_come_before_their_images() -> None:
    wiring = Wiring(queue_size=3)
    wiring.send("image", 100, 99)
    wiring.send("anomaly_map", 99.9, 100)
    wiring.send("image", 99.9)
    assert wiring.answered == [(1, 99.9)]
    # This one was on its way when time jumped, more than a second ahead of the images of now.
    wiring = Wiring(queue_size=1)
    wiring.send("image", 100, 97)
    wiring.send("anomaly_map", 97, 100)
    wiring.send("image", 98)
    wiring.send("anomaly_map", 98)
    assert wiring.answered == [(1, 97), (1, 98)]


def test_an_image_stamped_before_1970_changes_nothing_for_the_others() -> None:
    wiring = Wiring(queue_size=3)
    wiring.send("image", 100, 101)
    wiring.send("anomaly_map", 100)
    wiring.send("image", -1)
    wiring.send("anomaly_map", 101, 102)
    wiring.send("image", 102)
    assert len(wiring.problems) == 1
    assert "stamped -1 s, before 1970" in wiring.problems[0]
    assert wiring.answered == [(0, 100), (0, 101), (0, 102)]
    assert wiring.images == 4


def test_near_stamps_match_within_the_slop() -> None:
    wiring = Wiring(slop_s=0.1)
    wiring.send("image", 10, 11)
    wiring.send("anomaly_map", 10.05, 11.2)
    assert wiring.answered == [(0, 10)]
    assert wiring.frames[0].anomaly_map.header.stamp.nanosec == 50_000_000
