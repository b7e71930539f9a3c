"""Quality of service of the node's topics; every one can be overridden by ``qos_overrides`` parameters."""

from __future__ import annotations

from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions


def input_image(depth: int) -> QoSProfile:
    """Input images: best effort matches any camera driver."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=depth, reliability=ReliabilityPolicy.BEST_EFFORT)


def small_output() -> QoSProfile:
    """Instances, boxes, timing: small, and none shall get lost."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=5, reliability=ReliabilityPolicy.RELIABLE)


def image_output() -> QoSProfile:
    """Output images: reliable, so that viewers of either kind match; only the newest are kept for a slow one."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=2, reliability=ReliabilityPolicy.RELIABLE)


def overridable() -> QoSOverridingOptions:
    """Lets users override history, depth and reliability."""
    return QoSOverridingOptions.with_default_policies()
