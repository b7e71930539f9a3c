from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from ros2_ood_seg.evaluation.component import TAUS, TRACKS, ComponentMatch, Minimum, components, f1_star, match, summarise
from ros2_ood_seg.evaluation.datasets import open_dataset


def reference(predicted: NDArray[np.bool_], label: NDArray[np.uint8], minimum: Minimum) -> tuple[list[float], list[float]]:
    """The definitions with sets of pixels, no shortcuts."""
    eight = np.ones((3, 3))
    truth, truth_count = ndimage.label(label == 1, eight)
    found, found_count = ndimage.label(predicted & (label != 255), eight)
    flat = np.arange(label.size).reshape(label.shape)
    ignored = set(flat[label == 255])
    truths = []
    for k in range(1, truth_count + 1):
        pixels = set(flat[truth == k])
        if len(pixels) < minimum.truth_px:
            ignored |= pixels
        else:
            truths.append(pixels)
    kept = [set(flat[found == k]) for k in range(1, found_count + 1)]
    kept = [pixels - ignored for pixels in kept if len(pixels) >= minimum.predicted_px]
    kept = [pixels for pixels in kept if pixels]
    siou = []
    for k, pixels in enumerate(truths):
        union: set[int] = set().union(*(p for p in kept if p & pixels))
        others: set[int] = set().union(*(t for j, t in enumerate(truths) if j != k))
        siou.append(len(pixels & union) / len((pixels | union) - (union & others)))
    ppv = [len(p & set().union(*truths)) / len(p) for p in kept]
    return siou, ppv


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.05, 0.6), minimum=st.sampled_from([Minimum(0, 0), Minimum(3, 2), Minimum(6, 4)]))
def test_equals_the_definition(seed: int, density: float, minimum: Minimum) -> None:
    rng = np.random.default_rng(seed)
    label = (ndimage.uniform_filter(rng.uniform(size=(20, 24)), 3) > 0.55).astype(np.uint8)
    label[rng.uniform(size=label.shape) < 0.1] = 255
    predicted = rng.uniform(size=label.shape) < density
    siou, ppv = reference(predicted, label, minimum)
    result = match(predicted, label, minimum)
    np.testing.assert_allclose(sorted(result.siou), sorted(siou), atol=1e-12)
    np.testing.assert_allclose(sorted(result.ppv), sorted(ppv), atol=1e-12)


def test_tracks_have_the_sizes_of_the_benchmark() -> None:
    assert {"anomaly": Minimum(predicted_px=500, truth_px=100), "obstacle": Minimum(predicted_px=50, truth_px=10)} == TRACKS


def test_perfect_prediction_on_real_labels(shared_dir: Path) -> None:
    for name, track in (("road_anomaly_21", "anomaly"), ("road_obstacle_21", "obstacle")):
        dataset = open_dataset("folder", shared_dir / "data" / name)
        labels = [dataset.load(source).label for source in dataset.sources[:3]]
        scores = summarise(match(label == 1, label, TRACKS[track]) for label in labels)
        assert (scores.siou, scores.ppv, scores.f1) == (1.0, 1.0, 1.0)


def test_one_prediction_over_two_objects_is_charged_for_the_gap_only() -> None:
    label = np.zeros((10, 30), np.uint8)
    label[:, :10] = 1
    label[:, 20:] = 1
    result = match(np.ones(label.shape, bool), label, Minimum(0, 0))
    np.testing.assert_allclose(result.siou, [100 / 200, 100 / 200])
    np.testing.assert_allclose(result.ppv, [200 / 300])


def test_small_truth_is_ignored_and_small_predictions_are_dropped() -> None:
    label = np.zeros((20, 20), np.uint8)
    label[0, 0] = 1
    predicted = np.zeros(label.shape, bool)
    predicted[0, 0] = True
    predicted[10:12, 10:12] = True
    kept = match(predicted, label, Minimum(4, 2))
    assert kept.siou.size == 0
    np.testing.assert_array_equal(kept.ppv, [0.0])
    dropped = match(predicted, label, Minimum(5, 1))
    np.testing.assert_array_equal(dropped.siou, [0.0])
    assert dropped.ppv.size == 0


@pytest.mark.parametrize("fill", [0, 255])
def test_images_without_components(fill: int) -> None:
    label = np.full((6, 6), fill, np.uint8)
    result = match(np.zeros((6, 6), bool), label, TRACKS["obstacle"])
    assert result.siou.size == result.ppv.size == 0
    scores = summarise([result])
    assert (scores.siou, scores.ppv, scores.f1) == (None, None, None)


def test_an_empty_prediction_misses_everything_and_one_over_ignored_area_only_is_none() -> None:
    label = np.zeros((20, 20), np.uint8)
    label[5:9, 5:9] = 1
    scores = summarise([match(np.zeros(label.shape, bool), label, Minimum(0, 0))])
    assert (scores.siou, scores.ppv, scores.f1) == (0.0, None, 0.0)
    nothing = match(np.ones(label.shape, bool), np.full(label.shape, 255, np.uint8), Minimum(0, 0))
    assert nothing.siou.size == nothing.ppv.size == 0


def test_a_constant_map_is_one_component_over_everything() -> None:
    label = np.zeros((10, 20), np.uint8)
    label[:, :5] = 1
    scores = summarise([match(np.ones(label.shape, bool), label, Minimum(0, 0))])
    assert (scores.siou, scores.ppv) == (0.25, 0.25)
    # Only the lowest of the eleven thresholds is reached.
    assert scores.f1 == pytest.approx(1 / 11)


def test_one_pixel_objects_count_where_the_track_allows_them() -> None:
    label = np.zeros((6, 6), np.uint8)
    label[2, 2] = 1
    counted = match(label == 1, label, Minimum(1, 1))
    np.testing.assert_array_equal([counted.siou, counted.ppv], [[1.0], [1.0]])
    assert summarise([match(label == 1, label, TRACKS["obstacle"])]).f1 is None


def test_f1_star_averages_over_thresholds() -> None:
    image = ComponentMatch(siou=np.array([0.5, 0.1]), ppv=np.array([0.5, 0.9, 0.0]))
    expected = []
    for tau in TAUS:
        hits = sum(v >= tau for v in (0.5, 0.1))
        alarms = sum(v < tau for v in (0.5, 0.9, 0.0))
        expected.append(2 * hits / (2 * hits + 2 - hits + alarms))
    scores = summarise([image])
    assert scores.f1 == pytest.approx(np.mean(expected))
    assert scores.siou == pytest.approx(0.3)
    assert f1_star(np.zeros((3, 11))) is None


@pytest.mark.parametrize("seed", range(4))
def test_components_lie_where_the_mask_is(seed: int) -> None:
    mask = np.zeros((40, 50), bool)
    rng = np.random.default_rng(seed)
    mask[10:30, 5:45] = rng.random((20, 40)) < 0.3
    labels = components(mask)
    expected = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)[1]
    assert np.array_equal(labels, expected)
    assert not components(np.zeros((4, 5), bool)).any()
