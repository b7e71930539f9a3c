"""Overlays and plots; no ROS types."""

from ros2_ood_seg.visualization.overlay import draw_legend, draw_overlay, heat_map, instance_color, side_by_side

__all__ = ["draw_legend", "draw_overlay", "heat_map", "instance_color", "side_by_side"]
