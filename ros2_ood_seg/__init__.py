"""Anomaly instance segmentation for vehicles: S2M and UGainS as a library, a command and a ROS 2 node."""

# The generated `ros2_ood_seg.msg` may live in another folder (a colcon overlay) than this source tree or wheel.
__path__ = __import__("pkgutil").extend_path(__path__, __name__)

__version__ = "0.1.0"
