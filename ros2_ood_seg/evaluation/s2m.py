"""S2M's mask metrics: IoU and F1 per image, averaged over images, at 101 thresholds.

For an image and a threshold ``t``: prediction = score > t, I = anomalous pixels predicted, U = pixels anomalous or predicted,
IoU = I/U and F1 = 2I/(I+U), both 0 when U is 0. The means over images give IoU at ``t`` = 0 (all masks, no threshold), the best
IoU over the thresholds, AuIoU (trapezoid over ``t``) and the mean of the 101 mean F1 values. S2M's released code counts
predictions on ignore pixels as wrong; leaving those pixels out is the other reading, and both are offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.evaluation.pixel import ScoreCounts

THRESHOLDS: NDArray[np.float64] = np.arange(101) / 100.0


@dataclass(frozen=True)
class MaskSweep:
    """Pixel counts of one image at each threshold.

    Args:
        hits: (101,) int64 anomalous pixels predicted.
        extra: (101,) int64 other pixels predicted: normal ones, and ignored ones when those count.
        positives: Anomalous pixels.
    """

    hits: NDArray[np.int64]
    extra: NDArray[np.int64]
    positives: int

    def table(self) -> NDArray[np.int64]:
        """(3, 101) int64: hits, extra, and the anomalous pixels at every threshold."""
        return np.stack([self.hits, self.extra, np.full_like(self.hits, self.positives)])

    @classmethod
    def from_table(cls, table: NDArray[np.int64]) -> MaskSweep:
        """What :meth:`table` was made of."""
        return cls(table[0], table[1], int(table[2, 0]))


def sweep(positives: ScoreCounts, others: list[ScoreCounts], thresholds: NDArray[np.float64] = THRESHOLDS) -> MaskSweep:
    """Counts one image.

    Args:
        positives: Scores of the anomalous pixels.
        others: Scores of the pixels that must not be predicted: the normal ones, as in the released code also the ignored ones.
        thresholds: (101,) in the scores' own range.
    """
    extra = np.zeros(thresholds.size, np.int64)
    for part in others:
        extra += part.above(thresholds)
    return MaskSweep(positives.above(thresholds), extra, positives.total)


def scaled_thresholds(lowest: float, highest: float) -> NDArray[np.float64]:
    """The 101 thresholds in a scorer's own range, whose extremes over the data set are mapped to 0 and 1 (S2M Eq. 8)."""
    return THRESHOLDS * (highest - lowest) + lowest


@dataclass(frozen=True)
class MaskScores:
    """S2M's figures over a set of images; fractions in [0, 1].

    Args:
        iou: At the first threshold: no threshold at all.
        iou_best: The greatest over the thresholds.
        threshold: Where that is, in [0, 1].
        auiou: Area under IoU over the threshold.
        mean_f1: Mean over thresholds.
        iou_curve: (101,) mean IoU.
        f1_curve: (101,) mean F1.
    """

    iou: float
    iou_best: float
    threshold: float
    auiou: float
    mean_f1: float
    iou_curve: NDArray[np.float64]
    f1_curve: NDArray[np.float64]


def per_image(sweeps: Sequence[MaskSweep]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU and F1 of each image at each threshold, both (N, 101)."""
    hits = np.array([s.hits for s in sweeps], dtype=np.float64).reshape(-1, THRESHOLDS.size)
    union = np.array([s.extra + s.positives for s in sweeps], dtype=np.float64).reshape(-1, THRESHOLDS.size)
    iou = np.divide(hits, union, out=np.zeros_like(hits), where=union > 0)
    f1 = np.divide(2 * hits, hits + union, out=np.zeros_like(hits), where=union > 0)
    return iou, f1


class CurveMean:
    """Means over images, added up one by one."""

    def __init__(self) -> None:
        self._count = 0
        self._iou = np.zeros(THRESHOLDS.size)
        self._f1 = np.zeros(THRESHOLDS.size)

    def add(self, image: MaskSweep) -> tuple[float, float]:
        """Adds an image; its IoU and F1 at the first threshold."""
        iou, f1 = per_image([image])
        self._count += 1
        self._iou += iou[0]
        self._f1 += f1[0]
        return float(iou[0, 0]), float(f1[0, 0])

    def scores(self) -> MaskScores | None:
        """The figures; None without images."""
        return from_curves(self._iou / self._count, self._f1 / self._count) if self._count else None


def summarise(sweeps: Iterable[MaskSweep]) -> MaskScores | None:
    """Averages over images; None without images."""
    mean = CurveMean()
    for image in sweeps:
        mean.add(image)
    return mean.scores()


def from_curves(iou: NDArray[np.float64], f1: NDArray[np.float64]) -> MaskScores:
    """The figures of mean IoU and mean F1 curves, both (101,)."""
    best = int(np.argmax(iou))
    area = float(np.sum((iou[1:] + iou[:-1]) * np.diff(THRESHOLDS)) / 2.0)
    return MaskScores(float(iou[0]), float(iou[best]), float(THRESHOLDS[best]), area, float(f1.mean()), iou, f1)
