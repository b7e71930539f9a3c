"""Component metrics of SegmentMeIfYouCan: sIoU, PPV and F1* (Chan et al., NeurIPS 2021, section 3.2; road-anomaly-benchmark).

Components are 8-connected. A ground-truth component is found when its sIoU reaches a threshold: the intersection with all
predicted components that touch it, over their union with it, less what of them lies in other ground-truth components. A predicted
component is a false alarm when its PPV, the share of it on anomalies, is below the threshold. F1* averages F1 over 11 thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

TAUS: NDArray[np.float64] = np.linspace(0.25, 0.75, 11)


@dataclass(frozen=True)
class Minimum:
    """Sizes below which components do not count.

    Args:
        predicted_px: Smaller predicted components are dropped.
        truth_px: Smaller ground-truth components become ignored area.
    """

    predicted_px: int
    truth_px: int


TRACKS = {"anomaly": Minimum(500, 100), "obstacle": Minimum(50, 10)}
"""The benchmark's two tracks."""


@dataclass(frozen=True)
class ComponentMatch:
    """One image.

    Args:
        siou: (G,) float64, of each ground-truth component.
        ppv: (P,) float64, of each predicted component.
    """

    siou: NDArray[np.float64]
    ppv: NDArray[np.float64]


def components(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """(H, W) int32 8-connected components of a mask: 0 outside, 1..n."""
    labels = np.zeros(mask.shape, np.int32)
    # Only where the mask is: searching a whole image takes longer than anything else that is measured.
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size:
        band = mask[rows[0] : rows[-1] + 1]
        columns = np.flatnonzero(band.any(axis=0))
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        labels[window] = cv2.connectedComponents(mask[window].astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)[1]
    return labels


def match(predicted: NDArray[np.bool_], label: NDArray[np.uint8], minimum: Minimum) -> ComponentMatch:
    """Compares the components of one image.

    Args:
        predicted: (H, W) bool, predicted anomalous.
        label: (H, W) uint8: 0 normal, 1 anomaly, 255 ignore.
        minimum: Least sizes; ``Minimum(0, ...)`` for the benchmark's way with masks that are not made by a threshold.
    """
    anomalous = label == 1
    truth, truth_px = _measured(anomalous)
    found, found_px = _measured(predicted & (label != 255))
    # Only on anomalous pixels does it matter which components meet.
    pairs = truth[anomalous].astype(np.int64) * (found_px.size + 1) + found[anomalous]
    shape = (truth_px.size + 1, found_px.size + 1)
    joint = np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)[1:, 1:]
    large = truth_px >= minimum.truth_px
    counted_px = found_px - joint[~large].sum(axis=0)
    kept = (found_px >= minimum.predicted_px) & (counted_px > 0)
    inside, truth_px, found_px = joint[large][:, kept], truth_px[large], counted_px[kept]
    touching = (inside > 0).astype(np.int64)
    hit = inside.sum(axis=1)
    union = touching @ found_px + truth_px - hit
    elsewhere = touching @ inside.sum(axis=0) - hit
    return ComponentMatch(hit / (union - elsewhere), inside.sum(axis=0) / found_px)


def _measured(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Components and the size of each, px."""
    labels = components(mask)
    return labels, np.bincount(labels[mask])[1:]


@dataclass(frozen=True)
class ComponentScores:
    """The benchmark's columns; None where nothing is to be averaged.

    Args:
        siou: Mean over ground-truth components.
        ppv: Mean over predicted components.
        f1: F1*, mean over the thresholds.
    """

    siou: float | None
    ppv: float | None
    f1: float | None


def counts_at_taus(image: ComponentMatch) -> NDArray[np.int64]:
    """(3, 11) int64: true positives, false negatives and false positives at each threshold."""
    return np.array(
        [
            [np.count_nonzero(image.siou >= tau) for tau in TAUS],
            [np.count_nonzero(image.siou < tau) for tau in TAUS],
            [np.count_nonzero(image.ppv < tau) for tau in TAUS],
        ]
    )


def summarise(images: Iterable[ComponentMatch]) -> ComponentScores:
    """Sums over images, then averages over thresholds."""
    kept = list(images)
    siou = np.concatenate([np.zeros(0), *(m.siou for m in kept)])
    ppv = np.concatenate([np.zeros(0), *(m.ppv for m in kept)])
    return scores_of(ComponentMatch(siou, ppv))


def scores_of(pooled: ComponentMatch) -> ComponentScores:
    """The columns from the components of all images together."""
    siou, ppv = pooled.siou, pooled.ppv
    mean_siou, mean_ppv = (float(values.mean()) if values.size else None for values in (siou, ppv))
    return ComponentScores(mean_siou, mean_ppv, f1_star(counts_at_taus(pooled)))


def f1_star(counts: NDArray[np.int64] | NDArray[np.float64]) -> float | None:
    """F1* of (3, 11) summed counts; None when there was neither a ground-truth nor a predicted component."""
    hits, misses, alarms = counts
    total = 2 * hits + misses + alarms
    return float(np.mean(2 * hits / total)) if np.all(total > 0) else None
