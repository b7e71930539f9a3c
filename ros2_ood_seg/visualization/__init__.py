"""Overlays and plots; no ROS types."""
