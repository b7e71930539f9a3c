from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ros2_ood_seg.msg", reason="the messages are not built (colcon build)")

from pycocotools import mask as coco
from std_msgs.msg import Header

from ros2_ood_seg import rle
from ros2_ood_seg.ros import compat
from ros2_ood_seg.ros.messages import (
    DisjointInstances,
    boxes_message,
    detections_message,
    instances_message,
    latency_ms,
    timing_message,
)
from ros2_ood_seg.types import Calibration, FrameResult, Instances, Prompts, ScoreMap

HEADER = Header(frame_id="camera_optical")
HEADER.stamp.sec, HEADER.stamp.nanosec = 12, 345


def make_result(masks: np.ndarray, scores: list[float] | None = None) -> FrameResult:
    count = len(masks)
    scores_t = torch.tensor(scores if scores is not None else [1.0 - k / (count + 1) for k in range(count)])
    instances = Instances.from_masks(torch.from_numpy(masks), scores_t, scores_t * 10, torch.full((count,), math.nan))
    score_map = ScoreMap(torch.zeros(masks.shape[1:]), "external", Calibration.linear())
    return FrameResult(instances, score_map, Prompts.empty(), score_map.scores, {"score": 1.5, "total": 2.5}, "test")


def test_what_better_masks_leave_of_one_is_no_instance_when_it_is_too_small() -> None:
    masks = np.zeros((3, 12, 20), bool)
    masks[0, 2:10, 1:10] = masks[1, 2:10, 1:11] = masks[2, 2:10, 10:19] = True
    instances = make_result(masks).instances
    assert DisjointInstances.from_instances(instances).kept.tolist() == [0, 1, 2]
    disjoint = DisjointInstances.from_instances(instances, min_area_px=9)
    assert disjoint.kept.tolist() == [0, 2]
    # Its pixels fall to the next one that claims them.
    np.testing.assert_array_equal(disjoint.labels, 1 * masks[0] + 2 * masks[2])
    assert [runs.area_px for runs in disjoint.runs] == [72, 72]
    assert not DisjointInstances.from_instances(instances, min_area_px=1000).labels.any()


@given(seed=st.integers(0, 10_000), count=st.integers(0, 8), least=st.integers(1, 30))
def test_an_instance_is_dropped_only_when_better_ones_that_stay_leave_too_little_of_it(seed: int, count: int, least: int) -> None:
    random = np.random.default_rng(seed)
    masks = np.zeros((count, 10, 14), bool)
    for mask in masks:
        y, x = random.integers(0, 10), random.integers(0, 14)
        mask[y : y + random.integers(1, 8), x : x + random.integers(1, 8)] = True
    labels = np.zeros((10, 14), int)
    kept = []
    for k, mask in enumerate(masks):
        own = mask & (labels == 0)
        if own.sum() >= least:
            kept.append(k)
            labels[own] = len(kept)
    disjoint = DisjointInstances.from_instances(make_result(masks).instances, least)
    assert disjoint.kept.tolist() == kept
    np.testing.assert_array_equal(disjoint.labels, labels)
    assert [runs.area_px for runs in disjoint.runs] == [np.count_nonzero(labels == k + 1) for k in range(len(kept))]


@given(seed=st.integers(0, 10_000), count=st.integers(0, 8), height=st.integers(1, 12), width=st.integers(1, 12))
def test_masks_label_image_boxes_and_areas_agree(seed: int, count: int, height: int, width: int) -> None:
    random = np.random.default_rng(seed)
    masks = random.random((count, height, width)) < random.choice([0.02, 0.3, 0.9])
    result = make_result(masks)
    disjoint = DisjointInstances.from_instances(result.instances)
    message = instances_message(disjoint, result, HEADER)
    labels = disjoint.labels
    assert labels.dtype == np.uint16
    # Nothing that the pipeline found is lost, and nothing is added.
    np.testing.assert_array_equal(labels > 0, result.instances.masks.any(dim=0).numpy() if len(result.instances) else labels > 0)
    assert [instance.id for instance in message.instances] == list(range(1, labels.max() + 1))
    for instance in message.instances:
        decoded = rle.decode(instance.mask.counts, instance.mask.height, instance.mask.width)
        np.testing.assert_array_equal(decoded, labels == instance.id)
        compressed = coco.frPyObjects({"size": [height, width], "counts": list(instance.mask.counts)}, height, width)
        np.testing.assert_array_equal(coco.decode(compressed).astype(bool), decoded)
        assert instance.area == decoded.sum() > 0
        rows, columns = np.nonzero(decoded)
        tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert (instance.box.x_min, instance.box.y_min, instance.box.x_max, instance.box.y_max) == tight


def test_the_best_score_wins_and_what_is_hidden_is_dropped() -> None:
    masks = np.zeros((3, 4, 6), bool)
    masks[0, :, :3] = True
    masks[1, 1:3, 1:2] = True
    masks[2, :, 2:] = True
    result = make_result(masks, scores=[0.9, 0.5, 0.7])
    disjoint = DisjointInstances.from_instances(result.instances)
    message = instances_message(disjoint, result, HEADER)
    np.testing.assert_array_equal(disjoint.labels, [[1, 1, 1, 2, 2, 2]] * 4)
    assert [i.score for i in message.instances] == pytest.approx([0.9, 0.7])
    assert [i.raw_score for i in message.instances] == pytest.approx([9.0, 7.0])
    assert [i.box.confidence for i in message.instances] == pytest.approx([0.9, 0.7])
    assert all(math.isnan(i.mask_quality) for i in message.instances)
    torch.testing.assert_close(disjoint.instances().scores, torch.tensor([0.9, 0.7]))


def test_a_hidden_instance_in_the_middle_leaves_no_gap_in_the_ids() -> None:
    masks = np.zeros((3, 4, 6), bool)
    masks[0, :2], masks[1, :2, :2], masks[2, 3] = True, True, True
    result = make_result(masks)
    disjoint = DisjointInstances.from_instances(result.instances)
    assert disjoint.kept.tolist() == [0, 2]
    assert sorted(np.unique(disjoint.labels)) == [0, 1, 2]
    assert instances_message(disjoint, result, HEADER).instances[1].area == 6


def test_headers_and_names_go_through() -> None:
    result = make_result(np.ones((1, 2, 3), bool))
    disjoint = DisjointInstances.from_instances(result.instances)
    message = instances_message(disjoint, result, HEADER)
    assert (message.header, message.profile, message.scorer) == (HEADER, "test", "external")
    boxes = boxes_message(message)
    assert boxes.header == HEADER
    assert list(boxes.boxes) == [message.instances[0].box]
    timing = timing_message(result, 3.5, {"received": 4, "answered": 3, "replaced": 1, "rejected": 0}, HEADER)
    assert timing.header == HEADER
    assert dict(zip(timing.stages, timing.duration_ms, strict=True)) == {"score": 1.5, "total": 2.5}
    assert (timing.received, timing.answered, timing.replaced, timing.rejected) == (4, 3, 1, 0)


def test_latency_counts_from_the_stamp() -> None:
    assert latency_ms(12_000_000_345 + 7_500_000, HEADER) == pytest.approx(7.5)
    assert math.isnan(latency_ms(5, Header()))
    assert math.isnan(latency_ms(0, HEADER))


def vision_stand_in() -> SimpleNamespace:
    """The fields of vision_msgs that are filled in, for environments without it."""

    def detection(header: Header, id: str) -> SimpleNamespace:
        box = SimpleNamespace(center=SimpleNamespace(position=SimpleNamespace()))
        return SimpleNamespace(header=header, id=id, bbox=box, results=[])

    return SimpleNamespace(
        Detection2DArray=lambda header: SimpleNamespace(header=header, detections=[]),
        Detection2D=detection,
        ObjectHypothesisWithPose=lambda: SimpleNamespace(hypothesis=SimpleNamespace()),
    )


def test_detections_are_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    if compat.vision_msgs is None:
        monkeypatch.setattr(compat, "vision_msgs", vision_stand_in())
    masks = np.zeros((1, 10, 10), bool)
    masks[0, 2:6, 1:9] = True
    result = make_result(masks, scores=[0.75])
    message = detections_message(instances_message(DisjointInstances.from_instances(result.instances), result, HEADER))
    (detection,) = message.detections
    box = detection.bbox
    assert (box.center.position.x, box.center.position.y, box.size_x, box.size_y) == (5.0, 4.0, 8.0, 4.0)
    assert detection.results[0].hypothesis.class_id == "anomaly"
    assert detection.results[0].hypothesis.score == pytest.approx(0.75)
    assert detection.header == HEADER
    assert detection.id == "", "tracking is off"
    array = instances_message(DisjointInstances.from_instances(result.instances), result, HEADER)
    array.instances[0].track_id = 7
    assert detections_message(array).detections[0].id == "7"
