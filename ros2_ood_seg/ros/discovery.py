"""Whether a node knows all our subscriptions, which no count on our own side tells."""

from __future__ import annotations

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node


class DiscoveredBy:
    """True once another node has matched every subscription that ``listener`` made before; until then its first messages get lost.

    DDS announces subscriptions one after the other, so that a node whose diagnostics arrive here has heard of all earlier ones.

    Args:
        listener: Subscribes to ``/diagnostics``.
        name: Full name of the other node, which must report on ``/diagnostics``.
    """

    def __init__(self, listener: Node, name: str) -> None:
        self._name = name
        self._heard = False
        listener.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def __bool__(self) -> bool:
        return self._heard

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self._heard = self._heard or any(status.name == self._name for status in message.status)
