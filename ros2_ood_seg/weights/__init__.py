"""Bundled compact weights, and where to find the others."""

from ros2_ood_seg.weights.store import WeightFile, find_weights, load_weights, save_weights

__all__ = ["WeightFile", "find_weights", "load_weights", "save_weights"]
