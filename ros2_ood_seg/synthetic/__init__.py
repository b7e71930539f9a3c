"""Procedural road scenes with exact labels, for tests and the demo."""

from ros2_ood_seg.synthetic.drive import CLASS_NAMES, DriveFrame, SyntheticDrive

__all__ = ["CLASS_NAMES", "DriveFrame", "SyntheticDrive"]
