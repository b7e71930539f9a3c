"""A frame's result as ROS messages that agree with one another pixel by pixel."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from std_msgs.msg import Header

from ros2_ood_seg.msg import AnomalyInstance, AnomalyInstanceArray, BoundingBox, BoundingBoxArray, FrameTiming, InstanceMask
from ros2_ood_seg.ros import compat
from ros2_ood_seg.types import FrameResult, Instances, label_image

MAX_INSTANCES = 65534
"""Ids are pixel values of a 16-bit image in which 65535 means unlabelled (vision_msgs)."""


@dataclass(frozen=True)
class Runs:
    """One instance's pixels as runs of the column-major image.

    Args:
        starts: (R,) int64 first pixel of each run, ascending.
        ends: (R,) int64 one past the last pixel of each run.
        height: Rows of the image, px.
        width: Columns of the image, px.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    height: int
    width: int

    @property
    def area_px(self) -> int:
        """Number of pixels."""
        return int((self.ends - self.starts).sum())

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """Tight box, px, maximum exclusive."""
        last = self.ends - 1
        x_min, x_max = int(self.starts[0] // self.height), int(last[-1] // self.height) + 1
        # A run that goes on in the next column touches the lower and the upper border.
        if np.any(self.starts // self.height != last // self.height):
            return x_min, 0, x_max, self.height
        return x_min, int((self.starts % self.height).min()), x_max, int((last % self.height).max()) + 1

    def counts(self) -> NDArray[np.uint32]:
        """Run lengths as in InstanceMask.msg."""
        edges = np.empty(2 * len(self.starts) + 2, dtype=np.int64)
        edges[0], edges[-1] = 0, self.height * self.width
        edges[1:-1:2], edges[2:-1:2] = self.starts, self.ends
        counts = np.diff(edges).astype(np.uint32)
        return counts if counts[-1] else counts[:-1]


@dataclass(frozen=True)
class DisjointInstances:
    """Instances without overlaps: each pixel belongs to the best-scored instance that claims it.

    Args:
        source: The instances as the pipeline found them, by score.
        kept: (N,) int64 index of those that own a pixel, by score.
        labels: (H, W) uint16, 0 background, k the k-th of ``kept`` from 1.
        runs: The pixels of each in ``labels``.
    """

    source: Instances
    kept: NDArray[np.int64]
    labels: NDArray[np.uint16]
    runs: tuple[Runs, ...]

    @classmethod
    def from_instances(cls, instances: Instances) -> DisjointInstances:
        """Settles who owns each pixel; an instance that owns none is dropped."""
        masks = instances.masks[:MAX_INSTANCES]
        labels = label_image(masks, instances.boxes_xyxy).cpu().numpy().astype(np.uint16)
        runs = dict(_label_runs(labels))
        kept = np.array(list(runs), dtype=np.int64) - 1
        if len(kept) < len(masks):
            renumber = np.zeros(len(masks) + 1, dtype=np.uint16)
            renumber[kept + 1] = np.arange(1, len(kept) + 1)
            labels = renumber[labels]
        return cls(instances, kept, labels, tuple(runs.values()))

    def instances(self) -> Instances:
        """The kept instances with their whole masks, overlaps and all."""
        if len(self.kept) == len(self.source):
            return self.source
        return self.source.select(torch.as_tensor(self.kept, device=self.source.scores.device))


def _label_runs(labels: NDArray[np.uint16]) -> Iterator[tuple[int, Runs]]:
    """The runs of every label but 0, by label; a single pass over the frame finds all of them."""
    height, width = labels.shape
    flat = cv2.transpose(labels).ravel()
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    ends = np.append(starts[1:], height * width)
    values = flat[starts]
    for label in np.unique(values[values > 0]):
        own = values == label
        yield int(label), Runs(starts[own], ends[own], height, width)


def instances_message(disjoint: DisjointInstances, result: FrameResult, header: Header) -> AnomalyInstanceArray:
    """The instances with masks, boxes and scores, ids from 1 in order of score."""
    found = disjoint.source
    columns = (found.track_ids, found.scores, found.raw_scores, found.mask_quality)
    rows = zip(disjoint.runs, *(column.cpu().numpy()[disjoint.kept].tolist() for column in columns), strict=True)
    message = AnomalyInstanceArray(header=header, profile=result.profile, scorer=result.score_map.scorer)
    for number, (runs, track, score, raw, quality) in enumerate(rows, start=1):
        message.instances.append(
            AnomalyInstance(
                id=number,
                track_id=track,
                score=score,
                raw_score=raw,
                mask_quality=quality,
                area=runs.area_px,
                box=_box(runs, score),
                mask=InstanceMask(height=runs.height, width=runs.width, counts=array("I", runs.counts().tobytes())),
            )
        )
    return message


def boxes_message(instances: AnomalyInstanceArray) -> BoundingBoxArray:
    """The boxes of the instances alone."""
    return BoundingBoxArray(header=instances.header, boxes=[instance.box for instance in instances.instances])


def timing_message(result: FrameResult, latency_ms: float, counts: dict[str, int], header: Header) -> FrameTiming:
    """Where the frame's time went; ``counts`` holds received, answered, replaced and rejected."""
    return FrameTiming(
        header=header,
        profile=result.profile,
        stages=list(result.timings_ms),
        duration_ms=array("f", result.timings_ms.values()),
        latency_ms=latency_ms,
        **counts,
    )


def detections_message(instances: AnomalyInstanceArray) -> Any:
    """The instances as vision_msgs/Detection2DArray, class ``anomaly``; only where vision_msgs is installed."""
    vision = compat.vision_msgs
    message = vision.Detection2DArray(header=instances.header)
    for instance in instances.instances:
        box = instance.box
        detection = vision.Detection2D(header=instances.header, id=str(instance.track_id) if instance.track_id else "")
        detection.bbox.center.position.x = (box.x_min + box.x_max) / 2
        detection.bbox.center.position.y = (box.y_min + box.y_max) / 2
        detection.bbox.size_x, detection.bbox.size_y = box.x_max - box.x_min, box.y_max - box.y_min
        hypothesis = vision.ObjectHypothesisWithPose()
        hypothesis.hypothesis.class_id, hypothesis.hypothesis.score = "anomaly", instance.score
        detection.results.append(hypothesis)
        message.detections.append(detection)
    return message


def latency_ms(now_ns: int, header: Header) -> float:
    """Milliseconds from the header's stamp to now; NaN for a stamp of zero."""
    stamp_ns = header.stamp.sec * 1_000_000_000 + header.stamp.nanosec
    return (now_ns - stamp_ns) / 1e6 if stamp_ns else math.nan


def _box(runs: Runs, score: float) -> BoundingBox:
    x_min, y_min, x_max, y_max = (float(value) for value in runs.box_xyxy)
    return BoundingBox(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max, confidence=score)
