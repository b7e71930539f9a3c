"""Instance AP in the Cityscapes protocol for one class, as UGainS and OoDIS report it.

Ten overlaps 0.50:0.05:0.95, a match is IoU > overlap (strict); ground-truth instances under 10 px only serve to excuse
predictions; a prediction that matches nothing is excused when more than ``overlap`` of it lies on ignored area or such small
instances. Of several predictions on one instance the best-scored is right, the others are false. Precision over recall is
integrated step-wise with symmetric half-widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.evaluation.component import components

OVERLAPS: NDArray[np.float64] = np.arange(0.5, 1.0, 0.05)
MIN_REGION_PX = 10


@dataclass(frozen=True)
class InstanceMatch:
    """Overlaps of one image.

    Args:
        scores: (N,) float64 of the predictions.
        area_px: (N,) int64 of the predictions.
        void_px: (N,) int64, how much of each prediction lies on ignored area.
        truth_px: (G,) int64 areas of the ground-truth instances.
        intersection_px: (N, G) int64.
    """

    scores: NDArray[np.float64]
    area_px: NDArray[np.int64]
    void_px: NDArray[np.int64]
    truth_px: NDArray[np.int64]
    intersection_px: NDArray[np.int64]

    def iou(self) -> NDArray[np.float64]:
        """(N, G) IoU of every prediction with every instance."""
        union = self.area_px[:, None] + self.truth_px[None, :] - self.intersection_px
        iou: NDArray[np.float64] = self.intersection_px / np.maximum(union, 1)
        return iou


def truth_instances(label: NDArray[np.uint8], instances: NDArray[np.int32] | None) -> NDArray[np.int32]:
    """Ground truth as one image.

    Args:
        label: (H, W) uint8: 0 normal, 1 anomaly, 255 ignore.
        instances: (H, W) int32 ids, 0 for none, or None: then every 8-connected component of label 1 is an instance, as UGainS does.

    Returns:
        (H, W) int32: 0 background, 1..G instances, -1 ignored (label 255, and anomalous pixels that have no id).
    """
    if instances is None:
        truth = components(label == 1)
    else:
        anomalous = label == 1
        ids, rank = np.unique(instances[anomalous], return_inverse=True)
        truth = np.zeros(label.shape, np.int32)
        # Rank 0 is id 0 where there is one: anomalous, but of no instance.
        truth[anomalous] = np.where(ids[rank] == 0, -1, rank + (0 if 0 in ids else 1))
    truth[label == 255] = -1
    return truth


def ranking_key(scores: NDArray[np.float32], raw_scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """The scores, and where they are equal, the order of the raw ones.

    Calibrated scores end at 0 and 1, beyond which raw ones, by which UGainS ranks as published, still differ.

    Args:
        scores: (N,) in [0, 1].
        raw_scores: (N,) as the method defines them.

    Returns:
        (N,) float64, off from the scores by 1e-9 at most.
    """
    raw = raw_scores.astype(np.float64)
    return np.asarray(scores.astype(np.float64) + 1e-9 * raw / (1.0 + np.abs(raw)))


def match(
    masks: NDArray[np.bool_], boxes_xyxy: NDArray[np.float32], scores: NDArray[np.floating], truth: NDArray[np.int32]
) -> InstanceMatch:
    """Overlaps of predicted masks with the ground truth of one image.

    Args:
        masks: (N, H, W) bool, none empty; they may overlap.
        boxes_xyxy: (N, 4) tight boxes, px, maximum exclusive; only speed depends on them being tight.
        scores: (N,) ranking key.
        truth: As :func:`truth_instances` gives it.
    """
    count = max(int(truth.max(initial=0)), 0)
    truth_px = np.bincount(truth[truth > 0], minlength=count + 1)[1:]
    tables = np.zeros((len(masks), count + 2), np.int64)
    for k, (mask, box) in enumerate(zip(masks, boxes_xyxy, strict=True)):
        x0, y0, x1, y1 = (int(v) for v in box)
        inside = truth[y0:y1, x0:x1][mask[y0:y1, x0:x1]]
        tables[k] = np.bincount(inside + 1, minlength=count + 2)
    return InstanceMatch(np.asarray(scores, np.float64), tables.sum(axis=1), tables[:, 0], truth_px.astype(np.int64), tables[:, 2:])


@dataclass(frozen=True)
class Verdicts:
    """What the matching of one image, or of several, decided at each overlap.

    Args:
        scores: (N,) float64 of the predictions.
        right: (N, 10) int8: 1 found an instance, -1 false, 0 excused: on ignored area or on an instance that is too small to count.
        missed: (10,) int64 instances without a prediction.
    """

    scores: NDArray[np.float64]
    right: NDArray[np.int8]
    missed: NDArray[np.int64]


def judge(image: InstanceMatch, overlaps: NDArray[np.float64] = OVERLAPS, min_region_px: int = MIN_REGION_PX) -> Verdicts:
    """Matches one image at overlaps of 0.5 or more, so that a prediction fits at most one instance."""
    large = image.truth_px >= min_region_px
    right = np.zeros((image.scores.size, overlaps.size), np.int8)
    missed = np.full(overlaps.size, np.count_nonzero(large), np.int64)
    iou = image.iou()
    ignored = (image.void_px + image.intersection_px[:, ~large].sum(axis=1)) / np.maximum(image.area_px, 1)
    for k, overlap in enumerate(overlaps):
        fits = iou > overlap
        right[~fits.any(axis=1) & (ignored <= overlap), k] = -1
        for column in fits[:, large].T:
            if column.any():
                right[column, k] = -1
                right[np.argmax(np.where(column, image.scores, -np.inf)), k] = 1
                missed[k] -= 1
    return Verdicts(image.scores, right, missed)


def average_precision(right: NDArray[np.float64], wrong: NDArray[np.float64], missed: int) -> float | None:
    """AP at one overlap; None without ground-truth instances.

    Args:
        right: Scores of the predictions that found an instance.
        wrong: Scores of the false ones.
        missed: Instances without a prediction.
    """
    if missed + right.size == 0:
        return None
    if right.size == 0:
        return 0.0
    thresholds = np.unique(np.concatenate([right, wrong]))
    hits = right.size - np.searchsorted(np.sort(right), thresholds)
    alarms = wrong.size - np.searchsorted(np.sort(wrong), thresholds)
    precision = np.append(hits / (hits + alarms), 1.0)
    recall = np.append(hits / (right.size + missed), 0.0)
    widths = np.convolve(np.concatenate([recall[:1], recall, [0.0]]), [-0.5, 0.0, 0.5], "valid")
    return float(np.dot(precision, widths))


@dataclass(frozen=True)
class InstanceScores:
    """Means over the overlaps; None without ground-truth instances.

    Args:
        ap: Mean AP over the ten overlaps.
        ap50: AP at overlap 0.5.
        by_overlap: AP at each overlap.
    """

    ap: float | None
    ap50: float | None
    by_overlap: tuple[float | None, ...]


def summarise(images: Iterable[InstanceMatch], min_region_px: int = MIN_REGION_PX) -> InstanceScores:
    """AP over a data set."""
    judged = [judge(image, min_region_px=min_region_px) for image in images]
    scores = np.concatenate([np.zeros(0), *(v.scores for v in judged)])
    right = np.concatenate([np.zeros((0, OVERLAPS.size), np.int8), *(v.right for v in judged)])
    missed = np.sum([np.zeros(OVERLAPS.size, np.int64), *(v.missed for v in judged)], axis=0)
    return scores_of(Verdicts(scores, right, missed))


def scores_of(pooled: Verdicts) -> InstanceScores:
    """AP from the verdicts of all images together."""
    columns = zip(pooled.right.T, pooled.missed, strict=True)
    aps = [average_precision(pooled.scores[right > 0], pooled.scores[right < 0], int(missed)) for right, missed in columns]
    known = [ap for ap in aps if ap is not None]
    return InstanceScores(float(np.mean(known)) if known else None, aps[0], tuple(aps))
