"""One frame's result against its ground truth, reduced to what the pooled metrics need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ros2_ood_seg import rle
from ros2_ood_seg.evaluation import component, instance, s2m
from ros2_ood_seg.evaluation.datasets import LabelledImage
from ros2_ood_seg.evaluation.pixel import ScoreCounts, check_scores
from ros2_ood_seg.types import FrameResult

MapCounts = tuple[ScoreCounts, ScoreCounts]
"""Scores of a frame's anomalous pixels and of its normal ones."""


@dataclass(frozen=True)
class Truth:
    """Size and fate of one frame's ground-truth instances, G of them.

    Args:
        area_px: (G,) int64.
        bottom: (G,) float64, lowest row of the instance over the image height, in [0, 1]: on a road, lower is nearer.
        mask_iou: (G,) float64, greatest IoU with a predicted instance.
        box_iou: (G,) float64, greatest box IoU with a box prompt; NaN when the profile has no box prompts.
    """

    area_px: NDArray[np.int64]
    bottom: NDArray[np.float64]
    mask_iou: NDArray[np.float64]
    box_iou: NDArray[np.float64]


@dataclass(frozen=True)
class FrameMeasure:
    """What one frame contributes, but for the sorted scores, which are large and stay on disk (:data:`MapCounts`).

    Args:
        name: Of the frame.
        height: px.
        width: px.
        score_range: Lowest and highest raw score, ignored pixels included (S2M Eq. 8 takes the whole data set's).
        masks: S2M's counts with ignored pixels left out.
        masks_code: The same as the released code counts, ignored pixels as normal ones.
        components: SegmentMeIfYouCan components of the union of the instance masks.
        instances: Instance overlaps.
        truth: Ground-truth instances.
        timings_ms: Pipeline stages.
        outside_ms: Time spent beside the pipeline: ``load``, ``measure`` with writing it down, and ``idle``, how long the pipeline
            waited for both before this frame.
    """

    name: str
    height: int
    width: int
    score_range: tuple[float, float]
    masks: s2m.MaskSweep
    masks_code: s2m.MaskSweep
    components: component.ComponentMatch
    instances: instance.InstanceMatch
    truth: Truth
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    outside_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Maps:
    """A frame's maps and masks on the CPU.

    Args:
        score: (H, W) float32 raw scores.
        refined: (H, W) float32 final map.
        confidence: (H, W) float32 in [0, 1], what S2M's metrics threshold: 0 outside all masks.
        masks: (N, H, W) bool.
        boxes_xyxy: (N, 4) float32 px.
        scores: (N,) float32 in [0, 1].
        raw_scores: (N,) float32.
        prompt_boxes_xyxy: (B, 4) float32 px; None when the profile has no box prompts.
    """

    score: NDArray[np.float32]
    refined: NDArray[np.float32]
    confidence: NDArray[np.float32]
    masks: NDArray[np.bool_]
    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    raw_scores: NDArray[np.float32]
    prompt_boxes_xyxy: NDArray[np.float32] | None

    @classmethod
    def from_result(cls, result: FrameResult, refined_is_confidence: bool, has_boxes: bool) -> Maps:
        """Copies a result from the device.

        Args:
            result: Of one frame.
            refined_is_confidence: The refined map is S2M's confidence map; otherwise the map is made of the instances, the highest score
                where they overlap, so that ``confidence > t`` covers the instances that score above ``t``.
            has_boxes: The profile has box prompts.
        """
        found = result.instances
        masks = found.masks.cpu().numpy()
        scores = found.scores.cpu().numpy()
        boxes = found.boxes_xyxy.cpu().numpy()
        refined = result.refined.cpu().numpy()
        confidence = refined
        if not refined_is_confidence:
            confidence = np.zeros(refined.shape, np.float32)
            # Ranked best first, so the best is written last; the least positive number keeps a mask of score 0 in the union.
            for mask, box, score in zip(masks[::-1], boxes[::-1], scores[::-1], strict=True):
                window = box_slice(box)
                confidence[window][mask[window]] = max(score, np.finfo(np.float32).tiny)
        return cls(
            result.score_map.scores.cpu().numpy(),
            refined,
            confidence,
            masks,
            boxes,
            scores,
            found.raw_scores.cpu().numpy(),
            result.prompts.boxes_xyxy.cpu().numpy() if has_boxes else None,
        )


def box_slice(box_xyxy: NDArray[np.float32]) -> tuple[slice, slice]:
    """Rows and columns of a tight box."""
    x0, y0, x1, y1 = (int(v) for v in box_xyxy)
    return slice(y0, y1), slice(x0, x1)


def measure(
    frame: LabelledImage,
    maps: Maps,
    minimum: component.Minimum,
    dropped_bits: int = 0,
) -> tuple[FrameMeasure, MapCounts, MapCounts]:
    """Reduces one frame.

    Args:
        frame: With its ground truth.
        maps: The pipeline's result.
        minimum: Least component sizes.
        dropped_bits: Coarseness of the sorted scores, see :meth:`~ros2_ood_seg.evaluation.pixel.ScoreCounts.from_values`.

    Returns:
        The small part; the sorted scores of the score map; those of the refined map.

    Raises:
        InputError: Maps of another shape than the labels, or not finite.
    """
    label = frame.label
    score = check_scores(maps.score, label, f"score map of '{frame.name}'")
    refined = check_scores(maps.refined, label, f"refined map of '{frame.name}'")
    anomalous, normal, ignored = label == 1, label == 0, label == 255
    score_counts = _counts(score, anomalous, normal, dropped_bits)
    refined_counts = _counts(refined, anomalous, normal, dropped_bits)
    same = maps.confidence is maps.refined and dropped_bits == 0
    inside, outside = refined_counts if same else _counts(maps.confidence, anomalous, normal, 0)
    void = ScoreCounts.from_values(maps.confidence[ignored])
    truth = instance.truth_instances(label, frame.instances)
    overlaps = instance.match(maps.masks, maps.boxes_xyxy, instance.ranking_key(maps.scores, maps.raw_scores), truth)
    figures = FrameMeasure(
        name=frame.name,
        height=label.shape[0],
        width=label.shape[1],
        score_range=(float(score.min()), float(score.max())),
        masks=s2m.sweep(inside, [outside]),
        masks_code=s2m.sweep(inside, [outside, void]),
        components=component.match(maps.confidence > 0, label, component.Minimum(0, minimum.truth_px)),
        instances=overlaps,
        truth=_truth(truth, overlaps, maps.prompt_boxes_xyxy),
    )
    return figures, score_counts, refined_counts


def _counts(scores: NDArray[np.float32], anomalous: NDArray[np.bool_], normal: NDArray[np.bool_], dropped_bits: int) -> MapCounts:
    return ScoreCounts.from_values(scores[anomalous], dropped_bits), ScoreCounts.from_values(scores[normal], dropped_bits)


def _truth(truth: NDArray[np.int32], overlaps: instance.InstanceMatch, prompts: NDArray[np.float32] | None) -> Truth:
    count = overlaps.truth_px.size
    windows = ndimage.find_objects(np.maximum(truth, 0), max_label=count)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in windows], dtype=np.float64).reshape(count, 4)
    iou = overlaps.iou()
    none = np.full(count, np.nan)
    return Truth(
        overlaps.truth_px,
        boxes[:, 3] / truth.shape[0],
        iou.max(axis=0) if iou.shape[0] else np.zeros(count),
        none if prompts is None else _best_box_iou(boxes, prompts),
    )


def _best_box_iou(boxes: NDArray[np.float64], prompts: NDArray[np.float32]) -> NDArray[np.float64]:
    if not len(prompts):
        return np.zeros(len(boxes))
    low = np.maximum(boxes[:, None, :2], prompts[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], prompts[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None] + (prompts[:, 2:] - prompts[:, :2]).prod(axis=1)[None] - shared
    best: NDArray[np.float64] = (shared / np.maximum(area, 1e-9)).max(axis=1)
    return best


def instances_json(maps: Maps, profile: str) -> dict[str, Any]:
    """The instances of a frame as plain data: COCO uncompressed run lengths (column-major, first run background), boxes, scores."""
    height, width = maps.refined.shape
    return {
        "profile": profile,
        "height": height,
        "width": width,
        "instances": [
            {
                "segmentation": {"size": [height, width], "counts": [int(run) for run in rle.encode(mask)]},
                "box_xyxy": [float(v) for v in box],
                "score": float(score),
                "raw_score": float(raw),
            }
            for mask, box, score, raw in zip(maps.masks, maps.boxes_xyxy, maps.scores, maps.raw_scores, strict=True)
        ],
    }
