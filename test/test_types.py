from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.types import Calibration, Instances, Masks, Prompts, ScoreMap, boxes_from_masks, label_image


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    raw = np.cumsum(draw(st.lists(st.floats(0.1, 10), min_size=2, max_size=9))) - 20.0
    unit = np.cumsum(draw(st.lists(st.floats(0.05, 1.0), min_size=len(raw), max_size=len(raw))))
    return Calibration(tuple(raw.tolist()), tuple((unit / unit[-1]).tolist()))


@settings(max_examples=100)
@given(calibration=calibrations(), raw=arrays(np.float32, 20, elements=st.floats(-40, 90, width=32)))
def test_calibration_is_interpolation_between_its_knots(calibration: Calibration, raw: NDArray[np.float32]) -> None:
    unit = calibration.to_unit(torch.from_numpy(np.sort(raw))).numpy()
    np.testing.assert_allclose(unit, np.interp(np.sort(raw), calibration.raw, calibration.unit), atol=1e-5)
    assert (np.diff(unit) >= -1e-6).all()


@settings(max_examples=100)
@given(calibration=calibrations(), share=st.floats(0, 1))
def test_calibration_is_inverted(calibration: Calibration, share: float) -> None:
    unit = calibration.unit[0] + share * (calibration.unit[-1] - calibration.unit[0])
    assert calibration.to_unit(torch.tensor([calibration.to_raw(unit)])).item() == pytest.approx(unit, abs=1e-4)


def test_calibration_from_scores_means_what_it_says() -> None:
    scores = np.random.default_rng(0).normal(size=200_000)
    calibration = Calibration.from_scores(scores)
    for survival in (0.5, 0.1, 1e-2, 1e-3):
        raw = np.quantile(scores, 1.0 - survival)
        assert calibration.to_unit(torch.tensor([raw])).item() == pytest.approx(-np.log10(survival) / 6, abs=0.01)
    assert calibration.unit[-1] == 1.0


@pytest.mark.parametrize("decades", [3, 4, 5])
def test_calibration_goes_on_beyond_the_sample_as_steeply_as_over_its_last_decade(decades: int) -> None:
    # One in 10**k scores above k; in the last decade that 10 values tell apart, scores grow twice as fast.
    k = -np.log10(1.0 - (np.arange(10**decades) + 0.5) / 10**decades)
    bend = decades - 2
    calibration = Calibration.from_scores(np.random.default_rng(0).permutation(k + np.maximum(k - bend, 0.0)))
    expected = torch.linspace(0.05, 7.0, 50)
    raw = expected + (expected - bend).clamp(min=0.0)
    torch.testing.assert_close(calibration.to_unit(raw), (expected / 6).clamp(max=1.0), atol=0.02, rtol=0)


def test_calibration_survives_json() -> None:
    calibration = Calibration.from_scores(np.random.default_rng(0).normal(size=5000))
    assert Calibration.from_dict(calibration.to_dict()) == calibration


@pytest.mark.parametrize(
    ("raw", "unit", "words"),
    [
        ((0.0,), (0.0,), "2 or more"),
        ((0.0, 1.0), (0.0,), "2 and 1"),
        ((1.0, 1.0), (0.0, 1.0), "'raw' must be finite and strictly increasing"),
        ((0.0, float("nan")), (0.0, 1.0), "'raw' must be finite"),
        ((0.0, 1.0), (0.5, 0.2), "'unit' must be finite and strictly increasing"),
        ((0.0, 1.0), (0.0, 1.5), r"within \[0, 1\]"),
    ],
)
def test_impossible_calibrations_are_refused(raw: tuple[float, ...], unit: tuple[float, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Calibration(raw, unit)


@pytest.mark.parametrize("scores", [np.zeros(10), np.zeros(5000), np.full(5000, np.nan)])
def test_calibration_needs_enough_finite_scores_that_vary(scores: NDArray[np.float64]) -> None:
    with pytest.raises(InputError, match="calibration needs"):
        Calibration.from_scores(scores)


def test_a_calibration_dict_without_its_keys_is_refused() -> None:
    with pytest.raises(InputError, match="'raw' and 'unit'"):
        Calibration.from_dict({"raw": [0.0, 1.0]})


def test_score_map_calibrates_itself() -> None:
    score_map = ScoreMap(torch.tensor([[0.0, 5.0], [10.0, 20.0]]), "test", Calibration.linear(0.0, 10.0))
    assert score_map.shape_hw == (2, 2)
    assert score_map.calibrated().tolist() == [[0.0, 0.5], [1.0, 1.0]]


def test_prompts_of_both_kinds() -> None:
    boxes = Prompts.from_boxes(torch.zeros(2, 4), torch.ones(2))
    points = Prompts.from_points(torch.ones(3, 2))
    both = Prompts.empty().merged(boxes).merged(points)
    assert (len(both), both.num_boxes, both.num_points) == (5, 2, 3)
    assert len(Prompts.empty()) == 0


@settings(deadline=None, max_examples=100)
@given(arrays(bool, st.tuples(st.integers(0, 5), st.integers(1, 12), st.integers(1, 12))))
def test_boxes_are_tight(values: NDArray[np.bool_]) -> None:
    boxes, area = boxes_from_masks(torch.from_numpy(values))
    assert boxes.shape == (len(values), 4)
    for mask, box, pixels in zip(values, boxes.tolist(), area.tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert pixels == len(x)
        assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])


@settings(deadline=None, max_examples=100)
@given(arrays(bool, st.tuples(st.integers(0, 5), st.just(4), st.just(6))))
def test_label_image_shows_the_best_mask(values: NDArray[np.bool_]) -> None:
    labels = label_image(torch.from_numpy(values)).numpy()
    first = np.where(values.any(axis=0), values.argmax(axis=0) + 1, 0) if len(values) else np.zeros((4, 6))
    np.testing.assert_array_equal(labels, first)


def test_instances_are_ranked_measured_and_never_empty() -> None:
    masks = torch.zeros(4, 10, 10, dtype=torch.bool)
    masks[0, 2:4, 3:8] = True
    masks[2, 9, 9] = True
    masks[3, 0:2, 0:2] = True
    instances = Instances.from_masks(masks, torch.tensor([0.3, 0.9, 0.8, 0.3]), torch.arange(4.0), torch.full((4,), torch.nan))
    assert len(instances) == 3
    torch.testing.assert_close(instances.scores, torch.tensor([0.8, 0.3, 0.3]))
    assert instances.raw_scores.tolist() == [2.0, 0.0, 3.0]
    assert instances.boxes_xyxy.tolist() == [[9, 9, 10, 10], [3, 2, 8, 4], [0, 0, 2, 2]]
    assert instances.area_px.tolist() == [1, 10, 4]
    assert instances.track_ids.tolist() == [0, 0, 0]
    assert instances.select(torch.tensor([2, 0])).area_px.tolist() == [4, 1]
    assert instances.select(instances.scores > 0.5).raw_scores.tolist() == [2.0]
    assert len(instances.to("cpu")) == 3


def test_empty_instances_and_masks() -> None:
    assert Instances.empty((7, 9)).masks.shape == (0, 7, 9)
    assert Masks.empty((7, 9)).masks.shape == (0, 7, 9)
    assert len(Masks.empty((7, 9))) == 0
