from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco

from ros2_ood_seg.evaluation import instance
from ros2_ood_seg.evaluation.component import components
from ros2_ood_seg.evaluation.datasets import open_dataset
from ros2_ood_seg.evaluation.instance import InstanceMatch, truth_instances

Prediction = list[tuple[NDArray[np.bool_], float]]


def cityscapes(tmp_path: Path, truths: list[NDArray[np.int32]], predictions: list[Prediction]) -> tuple[float, float]:
    """AP and AP50 of the official evaluator, with one class and a minimum region of 10 px as OoDIS sets it."""
    # The evaluator still calls numpy.in1d, which NumPy 2.4 removed.
    vars(np).setdefault("in1d", np.isin)
    official = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    folder = tmp_path / "official"
    folder.mkdir(exist_ok=True)
    truth_files, prediction_files = [], []
    for k, (truth, found) in enumerate(zip(truths, predictions, strict=True)):
        # Class 26 is "car"; 0 is void and 7 is "road", which is not.
        ids = np.where(truth > 0, 26_000 + truth, np.where(truth < 0, 0, 7)).astype(np.uint16)
        truth_files.append(str(folder / f"c_{k:06d}_000000_gtFine_instanceIds.png"))
        cv2.imwrite(truth_files[-1], ids)
        lines = []
        for j, (mask, score) in enumerate(found):
            cv2.imwrite(str(folder / f"{k}_{j}.png"), mask.astype(np.uint8))
            lines.append(f"{k}_{j}.png 26 {score!r}")
        prediction_files.append(str(folder / f"c_{k:06d}_000000.txt"))
        Path(prediction_files[-1]).write_text("\n".join(lines))
    args: Any = official.args
    args.quiet, args.JSONOutput, args.colorized = True, False, False
    args.minRegionSizes = np.array([10, 10, 10])
    args.distanceAvailable = False
    args.instLabels = ["car"]
    args.predictionPath = str(folder)
    args.gtInstancesFile = str(folder / "truth.json")
    Path(args.gtInstancesFile).unlink(missing_ok=True)
    found_truth = official.getGtInstances(truth_files, args)
    matches = official.matchGtWithPreds(prediction_files, truth_files, found_truth, args)
    averages = official.computeAverages(official.evaluateMatches(matches, args), args)
    return float(averages["allAp"]), float(averages["allAp50%"])


def ours(truths: list[NDArray[np.int32]], predictions: list[Prediction]) -> instance.InstanceScores:
    return instance.summarise(overlaps(truth, found) for truth, found in zip(truths, predictions, strict=True))


def overlaps(truth: NDArray[np.int32], found: Prediction) -> InstanceMatch:
    masks = np.array([mask for mask, _ in found], bool).reshape(-1, *truth.shape)
    boxes = np.zeros((len(found), 4), np.float32)
    for k, mask in enumerate(masks):
        rows, columns = np.nonzero(mask)
        boxes[k] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return instance.match(masks, boxes, np.array([score for _, score in found]), truth)


def shifted(mask: NDArray[np.bool_], rng: np.random.Generator, most: int) -> NDArray[np.bool_]:
    moved = np.roll(mask, tuple(rng.integers(-most, most + 1, 2)), (0, 1))
    return moved if rng.uniform() < 0.5 else cv2.dilate(moved.astype(np.uint8), np.ones((2, 2), np.uint8)).astype(bool)


def random_case(rng: np.random.Generator) -> tuple[list[NDArray[np.int32]], list[Prediction]]:
    truths, predictions = [], []
    for _ in range(int(rng.integers(1, 4))):
        label = np.zeros((40, 50), np.uint8)
        for _ in range(int(rng.integers(0, 6))):
            x, y = rng.integers(0, 45), rng.integers(0, 35)
            w, h = rng.integers(1, 14, 2)
            label[y : y + h, x : x + w] = 1
        label[:, : int(rng.integers(0, 12))] = 255
        truth = truth_instances(label, None)
        found: Prediction = []
        for k in range(1, int(truth.max()) + 1):
            for _ in range(int(rng.integers(0, 3))):
                found.append((shifted(truth == k, rng, 2), float(rng.integers(0, 5)) / 4))
        for _ in range(int(rng.integers(0, 3))):
            noise = np.zeros(label.shape, bool)
            x, y = rng.integers(0, 40), rng.integers(0, 30)
            noise[y : y + 8, x : x + 8] = True
            found.append((noise, float(rng.uniform())))
        truths.append(truth)
        predictions.append([(mask, score) for mask, score in found if mask.any()])
    return truths, predictions


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_cityscapes_evaluator(tmp_path: Path, seed: int) -> None:
    truths, predictions = random_case(np.random.default_rng(seed))
    result = ours(truths, predictions)
    try:
        ap, ap50 = cityscapes(tmp_path, truths, predictions)
    except IndexError:
        # The official code cannot handle it when all predictions are excused and no instance is found.
        assert result.ap == 0.0
        return
    assert (np.nan if result.ap is None else result.ap) == pytest.approx(ap, abs=1e-6, nan_ok=True)
    assert (np.nan if result.ap50 is None else result.ap50) == pytest.approx(ap50, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", ["road_anomaly_21", "road_obstacle_21", "fishyscapes_static"])
def test_equals_cityscapes_evaluator_on_real_labels(shared_dir: Path, tmp_path: Path, name: str) -> None:
    dataset = open_dataset("folder", shared_dir / "data" / name)
    rng = np.random.default_rng(5)
    truths = [truth_instances(dataset.load(source).label, None) for source in (*dataset.sources[:2], *dataset.sources[8:10])]
    predictions = [[(shifted(truth == k, rng, 8), float(rng.uniform())) for k in range(1, int(truth.max()) + 1)] for truth in truths]
    predictions[0].append((truths[0] < 0, 0.5))
    ap, ap50 = cityscapes(tmp_path, truths, predictions)
    result = ours(truths, predictions)
    assert 0.0 < ap < 1.0
    assert (result.ap, result.ap50) == (pytest.approx(ap, abs=1e-6), pytest.approx(ap50, abs=1e-6))


def compressed(masks: list[NDArray[np.bool_]]) -> list[dict[str, Any]]:
    return [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


def assert_like_coco(truth: NDArray[np.int32], found: Prediction) -> None:
    image = overlaps(truth, found)
    masks = compressed([mask for mask, _ in found])
    truths = compressed([truth == k for k in range(1, int(truth.max()) + 1)])
    np.testing.assert_array_equal(image.area_px, coco.area(masks))
    np.testing.assert_array_equal(image.truth_px, coco.area(truths) if truths else [])
    if truths:
        np.testing.assert_allclose(image.iou(), coco.iou(masks, truths, [0] * len(truths)), rtol=0, atol=1e-12)
    # Against a crowd, COCO divides by the area of the prediction.
    void = coco.iou(masks, compressed([truth < 0]), [1])[:, 0]
    np.testing.assert_allclose(image.void_px / image.area_px, void, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_overlaps_equal_pycocotools(seed: int) -> None:
    for truth, found in zip(*random_case(np.random.default_rng(seed)), strict=True):
        if found:
            assert_like_coco(truth, found)


@pytest.mark.parametrize("name", ["road_anomaly_21", "road_obstacle_21", "fishyscapes_static"])
def test_overlaps_equal_pycocotools_on_real_labels(shared_dir: Path, name: str) -> None:
    dataset = open_dataset("folder", shared_dir / "data" / name)
    rng = np.random.default_rng(5)
    for source in dataset.sources[:2]:
        truth = truth_instances(dataset.load(source).label, None)
        found: Prediction = [(shifted(truth == k, rng, 8), 0.5) for k in range(1, int(truth.max()) + 1)]
        assert_like_coco(truth, [*found, (truth == 0, 0.5)])


def square(x: int, y: int, side: int, shape: tuple[int, int] = (40, 50)) -> NDArray[np.bool_]:
    mask = np.zeros(shape, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_no_truth_no_value_and_no_prediction_zero() -> None:
    nothing = truth_instances(np.zeros((40, 50), np.uint8), None)
    something = truth_instances(square(3, 3, 8).astype(np.uint8), None)
    assert ours([nothing], [[(square(3, 3, 8), 0.5)]]).ap is None
    assert ours([something], [[]]).ap == 0.0
    assert ours([something], [[(square(3, 3, 8), 0.5)]]).ap == 1.0


def test_where_all_is_ignored_nothing_is_wrong() -> None:
    truth = truth_instances(np.full((40, 50), 255, np.uint8), None)
    judged = instance.judge(overlaps(truth, [(square(3, 3, 8), 0.5)]))
    assert not judged.right.any()
    assert ours([truth], [[(square(3, 3, 8), 0.5)]]).ap is None


def test_one_pixel_objects_only_excuse_predictions() -> None:
    label = np.zeros((40, 50), np.uint8)
    label[5, 5] = 1
    truth = truth_instances(label, None)
    assert ours([truth], [[(square(5, 5, 1), 0.9)]]).ap is None
    with_object = truth.copy()
    with_object[20:30, 20:30] = 2
    assert ours([with_object], [[(square(5, 5, 1), 0.9), (square(20, 20, 10), 0.1)]]).ap == 1.0
    assert ours([with_object], [[(square(0, 30, 2), 0.9), (square(20, 20, 10), 0.1)]]).ap == pytest.approx(0.25)


def test_predictions_on_ignored_area_are_excused() -> None:
    label = np.zeros((40, 50), np.uint8)
    label[20:30, 20:30] = 1
    label[:10] = 255
    truth = truth_instances(label, None)
    found = [(square(0, 0, 8), 0.9), (square(20, 20, 10), 0.1)]
    assert ours([truth], [found]).ap == 1.0


def test_truth_from_files_and_from_components() -> None:
    label = np.array([[1, 1, 0, 1, 255], [0, 0, 0, 0, 1]], np.uint8)
    np.testing.assert_array_equal(truth_instances(label, None), np.where(label == 255, -1, components(label == 1)))
    ids = np.array([[7, 0, 9, 7, 3], [0, 0, 0, 0, 3]], np.int32)
    np.testing.assert_array_equal(truth_instances(label, ids), [[2, -1, 0, 2, -1], [0, 0, 0, 0, 1]])
    nothing = np.where(label == 1, 0, label)
    np.testing.assert_array_equal(truth_instances(nothing, ids), [[0, 0, 0, 0, -1], [0, 0, 0, 0, 0]])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_prediction_has_one_verdict_and_every_instance_one_fate(seed: int) -> None:
    truths, predictions = random_case(np.random.default_rng(seed))
    for truth, found in zip(truths, predictions, strict=True):
        image = overlaps(truth, found)
        judged = instance.judge(image)
        large = np.count_nonzero(image.truth_px >= instance.MIN_REGION_PX)
        np.testing.assert_array_equal((judged.right == 1).sum(axis=0) + judged.missed, large)
        for k, overlap in enumerate(instance.OVERLAPS):
            best = image.iou().max(axis=1, initial=0.0)
            assert (best[judged.right[:, k] == 1] > overlap).all()
            # Whoever is false although it fits was outscored by another one on the same instance.
            for rival in np.flatnonzero((judged.right[:, k] == -1) & (best > overlap)):
                column = image.iou()[:, image.iou()[rival].argmax()]
                winner = (column > overlap) & (judged.right[:, k] == 1)
                assert image.scores[winner] >= image.scores[rival]


@given(raw=st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=20), low=st.floats(-2, 0))
def test_the_ranking_goes_on_where_calibrated_scores_end(raw: list[float], low: float) -> None:
    raw_scores = np.array(raw, np.float32)
    scores = np.clip(raw_scores - np.float32(low), 0, 1)
    key = instance.ranking_key(scores, raw_scores)
    assert np.abs(key - scores).max() <= 1e-9
    for a in range(len(raw)):
        assert all(key[a] >= key[b] for b in range(len(raw)) if raw_scores[a] >= raw_scores[b])
    order = np.argsort(-key, kind="stable")
    np.testing.assert_array_equal(scores[order], -np.sort(-scores))
