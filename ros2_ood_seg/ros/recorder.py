"""Records what the node publishes, byte for byte, at the stamps of the images it answers."""

from __future__ import annotations

import rclpy
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy

from ros2_ood_seg.evaluation.bag_messages import header_stamp_ns
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.results_bag import NODE
from ros2_ood_seg.ros.discovery import DiscoveredBy
from ros2_ood_seg.ros.outputs import IMAGE_TOPICS, SMALL_TOPICS


class Recorder(Node):
    """Subscribes reliably to outputs of the node and writes their messages, one per output and stamp; log times are the stamps.

    Args:
        outputs: Names of the node's outputs, for example ``instances`` or ``anomaly_map``.
        bag: Open.
        context: rclpy's, None for the global one.

    Attributes:
        counts: For each output, how many messages came.
    """

    def __init__(self, outputs: tuple[str, ...], bag: BagWriter, context: rclpy.Context | None = None) -> None:
        super().__init__("result_recorder", context=context)
        kinds = {**SMALL_TOPICS, **IMAGE_TOPICS}
        self._bag = bag
        self.counts = dict.fromkeys(outputs, 0)
        profile = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=20, reliability=ReliabilityPolicy.RELIABLE)
        for name in outputs:
            # Raw: deserialising a whole image for its stamp would cost milliseconds.
            self.create_subscription(kinds[name], f"{NODE}/{name}", lambda data, n=name: self._keep(n, kinds[n], data), profile, raw=True)
        self._discovered = DiscoveredBy(self, NODE)

    @property
    def is_connected(self) -> bool:
        """The node offers all outputs and will send them here."""
        return bool(self._discovered) and all(self.count_publishers(f"{NODE}/{name}") for name in self.counts)

    def _keep(self, output: str, kind: type, data: bytes) -> None:
        self.counts[output] += 1
        msgtype = f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}"
        self._bag.write_raw(f"{NODE}/{output}", msgtype, header_stamp_ns(data), data)
