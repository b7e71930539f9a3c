"""From a frame's result to topics: small messages first, images only for those who listen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from ros2_ood_seg.msg import AnomalyInstanceArray, BoundingBoxArray, FrameTiming
from ros2_ood_seg.ros import compat, messages, qos
from ros2_ood_seg.ros.diagnostics import FrameStatistics
from ros2_ood_seg.ros.images import array_to_image, rgb_to_compressed
from ros2_ood_seg.ros.parameters import NodeConfig
from ros2_ood_seg.types import FrameResult
from ros2_ood_seg.visualization.overlay import draw_overlay

SMALL_TOPICS: dict[str, type] = {"instances": AnomalyInstanceArray, "boxes": BoundingBoxArray, "timing": FrameTiming}
IMAGE_TOPICS: dict[str, type] = {
    "instance_mask": Image,
    "anomaly_map": Image,
    "semantic": Image,
    "overlay": Image,
    "overlay/compressed": CompressedImage,
}


class Outputs:
    """The node's publishers.

    Args:
        node: Who publishes; the publishers follow its lifecycle.
        statistics: Told of every frame that is answered.

    Raises:
        Exception: A quality of service that a parameter overrides cannot be used; no publisher is left behind.
    """

    def __init__(self, node: LifecycleNode, statistics: FrameStatistics) -> None:
        self._node = node
        self._statistics = statistics
        small = dict(SMALL_TOPICS)
        if compat.vision_msgs is not None:
            small["detections"] = compat.vision_msgs.Detection2DArray
        profiles = [(small, qos.small_output), (IMAGE_TOPICS, qos.image_output)]
        self._publishers: dict[str, Any] = {}
        try:
            for topics, profile in profiles:
                for name, kind in topics.items():
                    made = node.create_lifecycle_publisher(kind, f"~/{name}", profile(), qos_overriding_options=qos.overridable())
                    self._publishers[name] = made
        except Exception:
            self.destroy()
            raise

    def destroy(self) -> None:
        """Removes all publishers."""
        for publisher in self._publishers.values():
            self._node.destroy_lifecycle_publisher(publisher)

    def publish(self, header: Header, image: NDArray[np.uint8], result: FrameResult, config: NodeConfig) -> None:
        """Publishes everything that someone wants to have.

        Args:
            header: Of the source image; goes out unchanged with every message.
            image: (H, W, 3) uint8 RGB source image.
            result: What the pipeline found in it.
            config: Which topics are on, and how the overlay looks.
        """
        on = config.publish
        disjoint = messages.DisjointInstances.from_instances(result.instances, result.min_area_px)
        instances = messages.instances_message(disjoint, result, header)
        self._send("instances", instances)
        if on.boxes:
            self._send("boxes", messages.boxes_message(instances))
        latency_ms = messages.latency_ms(self._node.get_clock().now().nanoseconds, header)
        self._statistics.answered({**result.timings_ms, "latency": latency_ms})
        if on.timing:
            self._send("timing", messages.timing_message(result, latency_ms, self._statistics.counts(), header))
        if on.detections and self._wanted("detections"):
            self._send("detections", messages.detections_message(instances))
        if on.instance_mask and self._wanted("instance_mask"):
            self._send("instance_mask", array_to_image(disjoint.labels, "mono16", header))
        if on.anomaly_map and self._wanted("anomaly_map"):
            self._send("anomaly_map", array_to_image(result.refined.float().cpu().numpy(), "32FC1", header))
        # Asking for the classes computes them, so it is done when somebody listens only.
        if on.semantic and self._wanted("semantic") and (semantic := result.score_map.semantic) is not None:
            self._send("semantic", array_to_image(semantic.cpu().numpy(), "mono8", header))
        if on.overlay and (self._wanted("overlay") or self._wanted("overlay/compressed")):
            overlay = draw_overlay(image, disjoint.instances(), result.score_map if config.overlay.heat else None)
            if self._wanted("overlay"):
                self._send("overlay", array_to_image(overlay, "rgb8", header))
            if self._wanted("overlay/compressed"):
                self._send("overlay/compressed", rgb_to_compressed(overlay, config.overlay.jpeg_quality, header))

    def _wanted(self, name: str) -> bool:
        return name in self._publishers and self._publishers[name].get_subscription_count() > 0

    def _send(self, name: str, message: Any) -> None:
        self._publishers[name].publish(message)
