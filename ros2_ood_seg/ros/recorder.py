"""Collects what the node publishes, byte for byte, by the stamp of the image it answers."""

from __future__ import annotations

import struct
from typing import Any

from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message

from ros2_ood_seg.evaluation.bags import RawMessage
from ros2_ood_seg.ros.outputs import IMAGE_TOPICS, SMALL_TOPICS

_SECOND = 1_000_000_000


class Recorder(Node):
    """Subscribes to outputs of the node and keeps their messages.

    Reliably, so the node's image outputs must be set to reliable by ``qos_overrides``.

    Args:
        outputs: Names of the node's outputs, for example ``instances`` or ``overlay/compressed``.
        segmenter: Fully qualified name of the node.

    Attributes:
        messages: For each output, stamp in ns to message.
    """

    def __init__(self, outputs: tuple[str, ...], segmenter: str = "/ood_segmenter") -> None:
        super().__init__("result_recorder")
        kinds = {**SMALL_TOPICS, **IMAGE_TOPICS}
        self._kinds = {name: kinds[name] for name in outputs}
        self.messages: dict[str, dict[int, RawMessage]] = {name: {} for name in outputs}
        profile = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=20, reliability=ReliabilityPolicy.RELIABLE)
        for name, kind in self._kinds.items():
            self.create_subscription(kind, f"{segmenter}/{name}", lambda data, n=name: self._keep(n, data), profile, raw=True)

    def message(self, output: str, stamp_ns: int) -> Any:
        """The ROS message of an output, None when it did not arrive."""
        raw = self.messages[output].get(stamp_ns)
        return None if raw is None else deserialize_message(raw.data, self._kinds[output])

    def _keep(self, output: str, data: bytes) -> None:
        kind = self._kinds[output]
        # All outputs begin with a header and that with its stamp; deserialising a whole image for it would cost milliseconds.
        seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
        stamp_ns = seconds * _SECOND + nanoseconds
        msgtype = f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}"
        self.messages[output][stamp_ns] = RawMessage(f"/ood_segmenter/{output}", msgtype, stamp_ns, bytes(data))
