from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ros2_ood_seg.scorers.sml import dilated_smoothing, standardized_max_logit, suppress_boundaries
from ros2_ood_seg.scorers.statistics import MaxLogitStatistics


def suppressed_by_loops(scores: np.ndarray, classes: np.ndarray, width: int) -> np.ndarray:
    """The paper's steps pixel by pixel, on scipy's morphology."""
    cross = ndimage.generate_binary_structure(2, 1)
    dilated = ndimage.grey_dilation(classes, footprint=cross, mode="nearest")
    eroded = ndimage.grey_erosion(classes, size=(3, 3), mode="nearest")
    boundary = dilated != eroded
    height, columns = scores.shape
    result = scores.astype(np.float64)
    for radius in range(width - 1, -1, -1):
        ring = ndimage.binary_dilation(boundary, cross, iterations=radius) if radius else boundary
        before = result.copy()
        for y, x in zip(*np.nonzero(ring), strict=True):
            rows = np.clip([y - 1, y, y + 1], 0, height - 1)
            cols = np.clip([x - 1, x, x + 1], 0, columns - 1)
            outside = ~ring[np.ix_(rows, cols)]
            if outside.any():
                result[y, x] = before[np.ix_(rows, cols)][outside].mean()
    return result


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 4), cells=st.integers(1, 4))
def test_boundary_suppression_is_the_papers(seed: int, width: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    classes = np.kron(rng.integers(0, 3, (cells, cells + 1)), np.ones((6, 7), dtype=int))
    scores = rng.normal(size=classes.shape).astype(np.float32)
    found = suppress_boundaries(torch.from_numpy(scores), torch.from_numpy(classes), width)
    np.testing.assert_allclose(found.numpy(), suppressed_by_loops(scores, classes, width), atol=2e-6)


def test_one_class_leaves_scores_alone() -> None:
    scores = torch.rand(9, 11)
    assert torch.equal(suppress_boundaries(scores, torch.zeros(9, 11, dtype=torch.int64)), scores)


@pytest.mark.parametrize("dilation", [1, 6])
def test_smoothing_is_a_spread_gaussian(dilation: int) -> None:
    scores = np.random.default_rng(0).normal(size=(30, 41)).astype(np.float32)
    taps = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    kernel = np.zeros((6 * dilation + 1, 6 * dilation + 1))
    kernel[::dilation, ::dilation] = np.outer(taps, taps) / taps.sum() ** 2
    expected = ndimage.correlate(scores.astype(np.float64), kernel, mode="nearest")
    np.testing.assert_allclose(dilated_smoothing(torch.from_numpy(scores), dilation).numpy(), expected, atol=1e-6)


def test_scores_are_deviations_below_the_class_mean() -> None:
    logits = torch.tensor([[[9.0, 1.0]], [[2.0, 5.0]]])
    scores, classes = standardized_max_logit(logits, MaxLogitStatistics(torch.tensor([10.0, 8.0]), torch.tensor([4.0, 9.0])))
    assert classes.tolist() == [[0, 1]]
    torch.testing.assert_close(scores, torch.tensor([[0.5, 1.0]]))
