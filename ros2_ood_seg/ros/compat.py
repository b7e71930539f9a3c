"""What a robot's ROS 2 has and the wheels from PyPI lack. This is the only place that asks whether it is installed."""

from __future__ import annotations

try:
    from cv_bridge import CvBridge
# Built for another NumPy, cv_bridge fails on import in more ways than being absent.
except Exception:
    CvBridge = None

try:
    from message_filters import ApproximateTimeSynchronizer, SimpleFilter, Subscriber, TimeSynchronizer
except ImportError:
    from ros2_ood_seg.ros.message_sync import ApproximateTimeSynchronizer, SimpleFilter, Subscriber, TimeSynchronizer

try:
    import vision_msgs.msg as vision_msgs
except ImportError:
    vision_msgs = None

__all__ = ["ApproximateTimeSynchronizer", "CvBridge", "SimpleFilter", "Subscriber", "TimeSynchronizer", "vision_msgs"]
