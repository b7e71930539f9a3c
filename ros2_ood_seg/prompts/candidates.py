"""Pixels anomalous enough to prompt the segmenter."""

from __future__ import annotations

import math

from torch import Tensor

from ros2_ood_seg.types import Calibration, ScoreMap


def raw_threshold(calibration: Calibration, unit: float) -> float:
    """The raw score from which the calibrated one is at least ``unit``; infinite where all or no scores are."""
    if unit <= calibration.unit[0]:
        return -math.inf
    if unit > calibration.unit[-1]:
        return math.inf
    return calibration.to_raw(unit)


def candidate_pixels(score_map: ScoreMap, raw: float, ignore: Tensor | None) -> Tensor:
    """Pixels that score at least ``raw`` outside the ignore mask.

    Args:
        score_map: Scores of one image.
        raw: Threshold in the scorer's own range.
        ignore: (H, W) bool on the same device, or None.

    Returns:
        (H, W) bool on the same device.
    """
    candidates = score_map.scores >= raw
    return candidates if ignore is None else candidates & ~ignore
