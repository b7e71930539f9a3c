"""From topics to frames: raw or compressed images, alone or together with anomaly maps of the same stamp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import QoSCompatibility, qos_check_compatible
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from ros2_ood_seg.ros import compat, qos
from ros2_ood_seg.ros.images import image_to_rgb, image_to_scores
from ros2_ood_seg.ros.parameters import NodeConfig

_AHEAD_NS = 1_000_000_000
"""Maps may come so much before their images."""
_IN_FLIGHT_NS = 10_000_000_000
"""So much time before a jump back maps may still be on their way after it."""


def stamp_ns(message: Any) -> int:
    """The stamp in a message's header, ns."""
    return int(message.header.stamp.sec) * 1_000_000_000 + int(message.header.stamp.nanosec)


@dataclass(frozen=True)
class Frame:
    """One image as it came in, with its anomaly map where the scorer is ``external``."""

    image: Image | CompressedImage
    anomaly_map: Image | None = None
    epoch: int = 0
    """How often the images' time had jumped back when it came."""

    @property
    def header(self) -> Header:
        """The image's header."""
        return self.image.header

    @property
    def stamp_ns(self) -> int:
        """The image's stamp, ns."""
        return stamp_ns(self.image)

    def decode(self) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """(H, W, 3) uint8 RGB, and (h, w) float32 scores or None.

        Raises:
            InputError: The image or the map cannot be used.
        """
        return image_to_rgb(self.image), None if self.anomaly_map is None else image_to_scores(self.anomaly_map)


def _incompatible(topic: str, reason: str) -> str:
    return f"a publisher of {topic} offers an incompatible quality of service ({reason}); nothing of it arrives"


class FrameSource:
    """Subscribes to ``image``, or to ``image/compressed``, and on request to ``anomaly_map``.

    Args:
        node: Who subscribes.
        config: Transport and matching.
        external: Whether every image needs an anomaly map.
        on_image: Called for each image as it comes in, before it has a map.
        on_late: Called for each image whose map came after a newer frame.
        on_frame: Called with each frame, in the executor's thread.
        on_problem: Called with a text when a publisher's quality of service does not fit, or a stamp.

    Raises:
        Exception: A quality of service that a parameter overrides cannot be used; no subscription is left behind.
    """

    def __init__(
        self,
        node: Node,
        config: NodeConfig,
        external: bool,
        on_image: Callable[[], None],
        on_late: Callable[[], None],
        on_frame: Callable[[Frame], None],
        on_problem: Callable[[str], None],
    ) -> None:
        self._node = node
        self._on_arrival = on_image
        self._on_late = on_late
        self._on_frame = on_frame
        self._on_problem = on_problem
        self._last_stamp_ns = 0
        self._jumped_from_ns = 0
        self._epoch = 0
        self._passed_on_ns: int | None = None
        self._images = 0
        self._frames = 0
        self._subscribers: list[Any] = []
        try:
            self._subscribe(config, external)
        except Exception:
            self.destroy()
            raise

    def _subscribe(self, config: NodeConfig, external: bool) -> None:
        node = self._node
        compressed = config.image_transport == "compressed"
        # A remapping of the base topic carries over to its transports, as with image_transport.
        topic = node.resolve_topic_name("image") + ("/compressed" if compressed else "")
        depth = config.external.queue_size if external else 1
        images = self._subscriber(CompressedImage if compressed else Image, topic, depth)
        images.registerCallback(self._on_image)
        self._synchronizer = None
        if external:
            maps = self._subscriber(Image, node.resolve_topic_name("anomaly_map"), depth)
            stamped = [self._stamped(images), self._stamped(maps, self._is_of_now)]
            if config.external.slop_s > 0:
                self._synchronizer = compat.ApproximateTimeSynchronizer(stamped, depth, config.external.slop_s)
            else:
                self._synchronizer = compat.TimeSynchronizer(stamped, depth)
            self._synchronizer.registerCallback(self._pass_on)
        else:
            images.registerCallback(self._pass_on)

    @property
    def waiting(self) -> int:
        """Images without an anomaly map so far."""
        return self._images - self._frames

    @property
    def matched(self) -> int:
        """Images that are frames: with their anomaly map, where one is needed."""
        return self._frames

    def unheard(self) -> str:
        """Which publisher there is whose quality of service does not fit, and why; empty when all fit."""
        for subscription in (subscriber.sub for subscriber in self._subscribers):
            for offered in self._node.get_publishers_info_by_topic(subscription.topic_name):
                compatibility, reason = qos_check_compatible(offered.qos_profile, subscription.qos_profile)
                if compatibility == QoSCompatibility.ERROR:
                    return _incompatible(subscription.topic_name, reason.removeprefix("ERROR: ").rstrip("; "))
        return ""

    def destroy(self) -> None:
        """Unsubscribes; call it from the executor's thread."""
        for subscriber in self._subscribers:
            self._node.destroy_subscription(subscriber.sub)

    def _subscriber(self, kind: type, topic: str, depth: int) -> Any:
        def incompatible(event: Any) -> None:
            self._on_problem(_incompatible(topic, str(event.last_policy_kind)))

        subscriber = compat.Subscriber(
            self._node,
            kind,
            topic,
            qos_profile=qos.input_image(depth),
            qos_overriding_options=qos.overridable(),
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=incompatible),
        )
        self._subscribers.append(subscriber)
        return subscriber

    def _stamped(self, source: Any, keep: Callable[[int], bool] = lambda stamp_ns: True) -> Any:
        """What of a source can be matched: rclpy's times, and with them the synchronizers, know nothing before 1970."""
        passed = compat.SimpleFilter()

        def check(message: Any) -> None:
            if message.header.stamp.sec < 0:
                self._on_problem(f"a message is stamped {message.header.stamp.sec} s, before 1970, and is left out")
            elif keep(stamp_ns(message)):
                passed.signalMessage(message)

        source.registerCallback(check)
        return passed

    def _is_of_now(self, map_stamp_ns: int) -> bool:
        """Whether a map is not one of before a jump back, which would keep the place of later ones until time comes there again."""
        of_before = map_stamp_ns >= self._jumped_from_ns - _IN_FLIGHT_NS and map_stamp_ns > self._last_stamp_ns + _AHEAD_NS
        return self._last_stamp_ns >= self._jumped_from_ns or not of_before

    def _on_image(self, image: Image | CompressedImage) -> None:
        self._images += 1
        self._on_arrival()
        now_ns = stamp_ns(image)
        if self._synchronizer is not None and now_ns < 0:
            # It is left out, and so is no jump of time.
            return
        if now_ns < self._last_stamp_ns:
            self._epoch += 1
            self._passed_on_ns, self._jumped_from_ns = None, self._last_stamp_ns
            if self._synchronizer is not None:
                # A bag that starts over: what waits from later times would push every new message out.
                for queue in self._synchronizer.queues:
                    queue.clear()
        self._last_stamp_ns = now_ns

    def _pass_on(self, image: Image | CompressedImage, anomaly_map: Image | None = None) -> None:
        now_ns = stamp_ns(image)
        self._frames += 1
        # Maps come in any order, answers do not go back in time.
        if self._passed_on_ns is not None and now_ns < self._passed_on_ns:
            self._on_late()
            return
        self._passed_on_ns = now_ns
        self._on_frame(Frame(image, anomaly_map, self._epoch))
