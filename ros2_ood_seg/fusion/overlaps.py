"""What fusions need to know about masks: where they are, how they overlap, and how they score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.types import Instances, Masks, boxes_from_masks

_BAND_PX = 64
_QUANTILE_PX = 20_000
"""Pixels of a mask, evenly spread, that give its quantile: within half a percent of the pixels."""


@dataclass(frozen=True)
class MaskMeasures:
    """Exact figures of N masks at full resolution.

    Args:
        boxes_xyxy: (N, 4) float32, maximum exclusive, zeros for an empty mask.
        windows: Rows and columns of the boxes, on the host.
        area_px: (N,) float64.
        intersection_px: (N, N) float64.
        mean_score: (N,) float32 mean raw score inside; ``empty_score`` for an empty mask.
        ignored_px: (N,) float64 pixels on the ignore mask.
    """

    boxes_xyxy: Tensor
    windows: list[tuple[slice, slice]]
    area_px: Tensor
    intersection_px: Tensor
    mean_score: Tensor
    ignored_px: Tensor

    def iou(self) -> Tensor:
        """(N, N) float64 intersection over union, 0 between empty masks."""
        union = self.area_px[:, None] + self.area_px[None, :] - self.intersection_px
        return self.intersection_px / union.clamp(min=1.0)

    def inside(self) -> Tensor:
        """(N, N) float64 share of the row's mask that the column's mask covers, 0 for an empty mask."""
        return self.intersection_px / self.area_px.clamp(min=1.0)[:, None]

    def unions(self, masks: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        """(G, H, W) bool, the union of each group of masks.

        Args:
            masks: (N, H, W) bool, all of them.
            groups: Indices of the masks of each.
        """
        unions = masks.new_zeros((len(groups), *masks.shape[1:]))
        for union, group in zip(unions, groups, strict=True):
            for n in group:
                rows, columns = self.windows[n]
                union[rows, columns] |= masks[n, rows, columns]
        return unions

    def instances(self, config: FusionConfig, masks: Masks, kept: Tensor, scores: Tensor, raw_scores: Tensor) -> Instances:
        """The masks ``kept``, by descending score, without measuring them again.

        Args:
            config: Half score.
            masks: All N masks.
            kept: (K,) int64 indices of masks with pixels.
            scores: (N,) calibrated scores.
            raw_scores: (N,) raw scores.
        """
        order = kept[torch.argsort(scores[kept], descending=True, stable=True)]
        return Instances(
            masks=masks.masks[order],
            boxes_xyxy=self.boxes_xyxy[order],
            scores=reported(config, scores[order]),
            raw_scores=raw_scores[order],
            mask_quality=masks.quality[order],
            area_px=self.area_px[order].long(),
            track_ids=torch.zeros_like(order),
        )

    def usable(self, config: FusionConfig) -> Tensor:
        """(N,) bool: not too small and not on the ignore mask."""
        return (self.area_px >= config.min_area_px) & (self.ignored_px < config.ignore_overlap_px)


def inside_scores(config: FusionConfig, masks: Tensor, scores: Tensor, measures: MaskMeasures) -> Tensor:
    """The raw score that stands for each mask: the mean inside, or a quantile.

    The mean is low for a large object of which the scorer sees only parts; a high quantile is what it sees.

    Args:
        config: Quantile.
        masks: (N, H, W) bool.
        scores: (H, W) float32 raw scores.
        measures: Of these masks.

    Returns:
        (N,) float32; what ``measures`` has for empty masks.
    """
    inside = measures.mean_score.clone()
    if config.inside_quantile:
        for n, (rows, columns) in enumerate(measures.windows):
            values = scores[rows, columns][masks[n, rows, columns]]
            if len(values):
                values = values[:: math.ceil(len(values) / _QUANTILE_PX)]
                inside[n] = values.kthvalue(1 + round(config.inside_quantile * (len(values) - 1))).values
    return inside


def mask_scored(config: FusionConfig, scores: Tensor, quality: Tensor) -> Tensor:
    """Scores times the predicted IoU of their masks to the power of ``quality_power`` (1: Mask Scoring R-CNN, Huang et al. 2019, 3.2).

    Args:
        config: Quality power.
        scores: (N,) in [0, 1], how anomalous each mask is.
        quality: (N,) predicted IoU in [0, 1]; NaN, where the segmenter gives none, counts as 1.
    """
    return scores * quality.nan_to_num(nan=1.0).clamp(0.0, 1.0) ** config.quality_power if config.quality_power else scores


def reported(config: FusionConfig, scores: Tensor) -> Tensor:
    """Calibrated scores as they are reported: ``half_score`` becomes 0.5, linear from 0 and to 1, so that ranks stay.

    Args:
        config: Half score.
        scores: (N,) in [0, 1].
    """
    half = config.half_score
    return torch.where(scores < half, 0.5 * scores / half, 1.0 - 0.5 * (1.0 - scores) / (1.0 - half))


def strong(config: FusionConfig, scores: Tensor) -> Tensor:
    """(N,) bool: the reported score is at least ``min_score``.

    Args:
        config: Half score and least score.
        scores: (N,) in [0, 1].
    """
    return reported(config, scores) >= config.min_score


def measure_masks(masks: Tensor, scores: Tensor, ignore: Tensor | None = None, empty_score: float = 0.0) -> MaskMeasures:
    """Measures all masks in one pass of matrix products over bands of rows, so that no float copy of all masks exists.

    Args:
        masks: (N, H, W) bool.
        scores: (H, W) float32 on the same device.
        ignore: (H, W) bool on the same device, or None.
        empty_score: Mean score of a mask without pixels.
    """
    count, height, _ = masks.shape
    boxes, area = boxes_from_masks(masks)
    corners = boxes.long().tolist()
    # Whole pixels up to 2**24 per band are exact in float32; the sum over bands is kept in float64.
    products = torch.zeros((count, count + 2), dtype=torch.float64, device=masks.device)
    for top in range(0, height, _BAND_PX):
        bottom = min(top + _BAND_PX, height)
        active = [n for n, (_, y_min, _, y_max) in enumerate(corners) if y_min < bottom and y_max > top]
        if not active:
            continue
        left = min(corners[n][0] for n in active)
        right = max(corners[n][2] for n in active)
        index = torch.tensor(active, device=masks.device)
        band = masks[index, top:bottom, left:right].flatten(1).float()
        window = scores[top:bottom, left:right].reshape(1, -1)
        ignored = torch.zeros_like(window) if ignore is None else ignore[top:bottom, left:right].reshape(1, -1).float()
        columns = torch.cat([index, torch.tensor([count, count + 1], device=masks.device)])
        products[index[:, None], columns[None, :]] += (band @ torch.cat([band, window, ignored]).T).double()
    area = area.double()
    mean = torch.where(area > 0, products[:, count] / area.clamp(min=1.0), empty_score)
    windows = [(slice(y_min, y_max), slice(x_min, x_max)) for x_min, y_min, x_max, y_max in corners]
    return MaskMeasures(boxes, windows, area, products[:, :count], mean.float(), products[:, count + 1])
