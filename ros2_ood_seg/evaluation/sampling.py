"""How well sampled points hit the anomalous objects (UGainS Table 4, "point level")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.evaluation.instance import MIN_REGION_PX


@dataclass(frozen=True)
class PointMatch:
    """Points of one image against its objects.

    Args:
        right: Points on an object.
        wrong: Points on normal pixels; those on ignored pixels are in neither number.
        found: Objects with at least one point.
        missed: Objects without.
    """

    right: int
    wrong: int
    found: int
    missed: int


def match_points(points_xy: NDArray[np.floating], truth: NDArray[np.int32], min_region_px: int = MIN_REGION_PX) -> PointMatch:
    """Counts for one image.

    Args:
        points_xy: (P, 2) px, inside the image.
        truth: (H, W) as :func:`ros2_ood_seg.evaluation.instance.truth_instances` gives it.
        min_region_px: Smaller objects are no objects to be found; points on them still count as right, as in instance AP nothing is
            wrong about them.
    """
    columns, rows = points_xy.T.astype(np.int64)
    hit = truth[rows, columns]
    area = np.bincount(truth[truth > 0], minlength=1)
    large = area >= min_region_px
    large[0] = False
    found = np.bincount(hit[hit > 0], minlength=area.size) > 0
    return PointMatch(
        right=int(np.count_nonzero(hit > 0)),
        wrong=int(np.count_nonzero(hit == 0)),
        found=int(np.count_nonzero(large & found)),
        missed=int(np.count_nonzero(large & ~found)),
    )


@dataclass(frozen=True)
class PointScores:
    """Of a data set.

    Args:
        precision: Share of the points, pooled over all images, that lie on an object; None without points.
        recall: Share of the objects with at least one point; None without objects.
    """

    precision: float | None
    recall: float | None


def summarise(images: Iterable[PointMatch]) -> PointScores:
    """Pools images."""
    counts = np.array([(m.right, m.wrong, m.found, m.missed) for m in images], dtype=np.int64).reshape(-1, 4).sum(axis=0)
    right, wrong, found, missed = (int(count) for count in counts)
    return PointScores(
        right / (right + wrong) if right + wrong else None,
        found / (found + missed) if found + missed else None,
    )
