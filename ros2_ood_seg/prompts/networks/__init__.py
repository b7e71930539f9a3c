"""Detectors that find boxes in score maps."""

from ros2_ood_seg.lean import import_torchvision

# Before any module here imports torchvision.
import_torchvision()
