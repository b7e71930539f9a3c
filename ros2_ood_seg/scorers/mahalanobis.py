"""Mahalanobis distance of features to the known classes: Lee et al., NeurIPS 2018, per pixel as in the SegmentMeIfYouCan baselines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.scorers.statistics import FeatureStatistics

_ROWS = 64


def mahalanobis_distance(features: Tensor, statistics: FeatureStatistics) -> tuple[Tensor, Tensor]:
    """Least squared Mahalanobis distance over the classes.

    Args:
        features: (D, H, W) float32.
        statistics: Of D-dimensional features, on the same device.

    Returns:
        (H, W) float32 ``min_c (z - mu_c)^T S_c^-1 (z - mu_c)`` and (H, W) int64 nearest class.
    """
    pixels = features.flatten(1)
    distances = []
    for mean, inverse in zip(statistics.mean, statistics.inverse, strict=True):
        centred = pixels - mean[:, None]
        distances.append(((inverse.T @ centred) * centred).sum(dim=0))
    smallest, classes = torch.stack(distances).min(dim=0)
    return smallest.view(features.shape[1:]), classes.view(features.shape[1:])


def upsampled_mahalanobis_distance(features: Tensor, statistics: FeatureStatistics, size_hw: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The distance of features that are first upsampled with aligned corners, in strips: the features of a full image would fill gigabytes.

    Args:
        features: (D, h, w) float32.
        statistics: Of D-dimensional features, on the same device.
        size_hw: Height H and width W to upsample to.

    Returns:
        (H, W) float32 distances and (H, W) int64 nearest classes.
    """
    height, width = size_hw
    low_height = features.shape[1]
    position = torch.arange(height, device=features.device) * ((low_height - 1) / max(height - 1, 1))
    above = position.floor().long().clamp(max=max(low_height - 2, 0))
    below = (above + 1).clamp(max=low_height - 1)
    weight = (position - above).view(1, -1, 1)
    strips = []
    for start in range(0, height, _ROWS):
        rows = slice(start, start + _ROWS)
        strip = torch.lerp(features[:, above[rows]], features[:, below[rows]], weight[:, rows])
        strip = F.interpolate(strip[None], size=(strip.shape[1], width), mode="bilinear", align_corners=True)[0]
        strips.append(mahalanobis_distance(strip, statistics))
    return torch.cat([distance for distance, _ in strips]), torch.cat([nearest for _, nearest in strips])
