"""What fusions need to know about masks: where they are, how they overlap, and how they score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.types import boxes_from_masks

_BAND_PX = 64


@dataclass(frozen=True)
class MaskMeasures:
    """Exact figures of N masks at full resolution.

    Args:
        boxes_xyxy: N integer boxes on the host, maximum exclusive, zeros for an empty mask.
        area_px: (N,) float64.
        intersection_px: (N, N) float64.
        mean_score: (N,) float32 mean raw score inside; ``empty_score`` for an empty mask.
        ignored_px: (N,) float64 pixels on the ignore mask.
    """

    boxes_xyxy: list[tuple[int, int, int, int]]
    area_px: Tensor
    intersection_px: Tensor
    mean_score: Tensor
    ignored_px: Tensor

    def iou(self) -> Tensor:
        """(N, N) float64 intersection over union, 0 between empty masks."""
        union = self.area_px[:, None] + self.area_px[None, :] - self.intersection_px
        return self.intersection_px / union.clamp(min=1.0)

    def usable(self, config: FusionConfig, scores: Tensor) -> Tensor:
        """(N,) bool: not too small, not on the ignore mask, and with a calibrated score of at least ``min_score``."""
        return (self.area_px >= config.min_area_px) & (self.ignored_px < config.ignore_overlap_px) & (scores >= config.min_score)


def measure_masks(masks: Tensor, scores: Tensor, ignore: Tensor | None = None, empty_score: float = 0.0) -> MaskMeasures:
    """Measures all masks in one pass of matrix products over bands of rows, so that no float copy of all masks exists.

    Args:
        masks: (N, H, W) bool.
        scores: (H, W) float32 on the same device.
        ignore: (H, W) bool on the same device, or None.
        empty_score: Mean score of a mask without pixels.
    """
    count, height, _ = masks.shape
    boxes_tensor, area = boxes_from_masks(masks)
    boxes = [(int(a), int(b), int(c), int(d)) for a, b, c, d in boxes_tensor.tolist()]
    # Whole pixels up to 2**24 per band are exact in float32; the sum over bands is kept in float64.
    products = torch.zeros((count, count + 2), dtype=torch.float64, device=masks.device)
    for top in range(0, height, _BAND_PX):
        bottom = min(top + _BAND_PX, height)
        active = [n for n, (_, y_min, _, y_max) in enumerate(boxes) if y_min < bottom and y_max > top]
        if not active:
            continue
        left = min(boxes[n][0] for n in active)
        right = max(boxes[n][2] for n in active)
        index = torch.tensor(active, device=masks.device)
        band = masks[index, top:bottom, left:right].flatten(1).float()
        window = scores[top:bottom, left:right].reshape(1, -1)
        ignored = torch.zeros_like(window) if ignore is None else ignore[top:bottom, left:right].reshape(1, -1).float()
        columns = torch.cat([index, torch.tensor([count, count + 1], device=masks.device)])
        products[index[:, None], columns[None, :]] += (band @ torch.cat([band, window, ignored]).T).double()
    area = area.double()
    mean = torch.where(area > 0, products[:, count] / area.clamp(min=1.0), empty_score)
    return MaskMeasures(boxes, area, products[:, :count], mean.float(), products[:, count + 1])


def add_inside(target: Tensor, masks: Tensor, values: Tensor, boxes_xyxy: list[tuple[int, int, int, int]]) -> None:
    """Adds ``values[n]`` to the pixels of ``masks[n]`` of a (H, W) float32 map, in place."""
    for n, (x_min, y_min, x_max, y_max) in enumerate(boxes_xyxy):
        target[y_min:y_max, x_min:x_max].addcmul_(masks[n, y_min:y_max, x_min:x_max].to(target.dtype), values[n])


def write_inside(target: Tensor, masks: Tensor, values: Tensor, boxes_xyxy: list[tuple[int, int, int, int]]) -> None:
    """Sets the pixels of ``masks[n]`` of a (H, W) float32 map to ``values[n]``, in place; the last mask wins."""
    for n, (x_min, y_min, x_max, y_max) in enumerate(boxes_xyxy):
        window = target[y_min:y_max, x_min:x_max]
        window.copy_(torch.where(masks[n, y_min:y_max, x_min:x_max], values[n], window))
