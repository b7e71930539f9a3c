"""A frame's result as ROS messages that agree with one another pixel by pixel."""

from __future__ import annotations

import math
from array import array
from typing import Any

from std_msgs.msg import Header

from ros2_ood_seg.disjoint import DisjointInstances, Runs
from ros2_ood_seg.msg import AnomalyInstance, AnomalyInstanceArray, BoundingBox, BoundingBoxArray, FrameTiming, InstanceMask
from ros2_ood_seg.ros import compat
from ros2_ood_seg.types import FrameResult


def instances_message(disjoint: DisjointInstances, result: FrameResult, header: Header) -> AnomalyInstanceArray:
    """The instances with masks, boxes and scores, ids from 1 in order of score."""
    message = AnomalyInstanceArray(header=header, profile=result.profile, scorer=result.score_map.scorer)
    for number, (runs, track, score, raw, quality) in enumerate(disjoint.rows(), start=1):
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
    """Milliseconds from the header's stamp to now; NaN for a stamp of zero, and before the first message of a simulated clock."""
    stamp_ns = header.stamp.sec * 1_000_000_000 + header.stamp.nanosec
    return (now_ns - stamp_ns) / 1e6 if stamp_ns and now_ns else math.nan


def _box(runs: Runs, score: float) -> BoundingBox:
    x_min, y_min, x_max, y_max = (float(value) for value in runs.box_xyxy)
    return BoundingBox(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max, confidence=score)
