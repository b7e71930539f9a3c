from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ros2_ood_seg.evaluation.pixel import ScoreCounts
from ros2_ood_seg.evaluation.s2m import THRESHOLDS, scaled_thresholds, summarise, sweep


def reference(maps: list[NDArray[np.float64]], labels: list[NDArray[np.uint8]], with_ignored: bool) -> dict[str, float]:
    """S2M's protocol written out pixel by pixel."""
    mean_iou, mean_f1 = [], []
    for t in np.linspace(0.0, 1.0, 101):
        ious, f1s = [], []
        for scores, label in zip(maps, labels, strict=True):
            counted = np.ones(label.shape, bool) if with_ignored else label != 255
            predicted = (scores > t) & counted
            hit = np.count_nonzero(predicted & (label == 1))
            union = np.count_nonzero(predicted | (label == 1))
            ious.append(hit / union if union else 0.0)
            f1s.append(2 * hit / (hit + union) if union else 0.0)
        mean_iou.append(np.mean(ious))
        mean_f1.append(np.mean(f1s))
    return {
        "iou": float(mean_iou[0]),
        "iou_best": float(max(mean_iou)),
        "auiou": float(sum((a + b) / 2 * 0.01 for a, b in pairwise(mean_iou))),
        "mean_f1": float(np.mean(mean_f1)),
    }


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 4), with_ignored=st.booleans())
def test_equals_the_protocol_written_out(seed: int, images: int, with_ignored: bool) -> None:
    rng = np.random.default_rng(seed)
    labels = [rng.choice(np.array([0, 0, 0, 1, 255], np.uint8), (12, 17)) for _ in range(images)]
    # 256ths and sparse zeros: ties and exact thresholds such as 0.25 and 0.5 occur.
    maps = [(rng.integers(0, 257, (12, 17)) / 256 * (rng.uniform(size=(12, 17)) < 0.6)).astype(np.float32) for _ in range(images)]
    sweeps = []
    for scores, label in zip(maps, labels, strict=True):
        parts = [ScoreCounts.from_values(scores[label == value]) for value in (1, 0, 255)]
        sweeps.append(sweep(parts[0], parts[1:] if with_ignored else parts[1:2]))
    result = summarise(sweeps)
    assert result is not None
    for key, value in reference([m.astype(np.float64) for m in maps], labels, with_ignored).items():
        assert getattr(result, key) == pytest.approx(value, abs=1e-12), key
    assert result.iou_curve[round(result.threshold * 100)] == result.iou_best


def test_an_image_without_anomaly_counts_zero_even_when_nothing_is_predicted() -> None:
    empty = ScoreCounts.from_values(np.zeros(0, np.float32))
    silent = sweep(empty, [ScoreCounts.from_values(np.zeros(9, np.float32))])
    perfect = sweep(ScoreCounts.from_values(np.ones(4, np.float32)), [ScoreCounts.from_values(np.zeros(5, np.float32))])
    result = summarise([silent, perfect])
    assert result is not None
    assert result.iou == 0.5


def test_the_last_threshold_is_never_exceeded() -> None:
    perfect = sweep(ScoreCounts.from_values(np.ones(4, np.float32)), [])
    result = summarise([perfect])
    assert result is not None
    assert (result.iou_curve[-1], result.iou_curve[-2]) == (0.0, 1.0)
    assert result.auiou == pytest.approx(0.995)
    assert result.mean_f1 == pytest.approx(100 / 101)


@pytest.mark.parametrize(
    ("label", "score", "iou", "code"),
    [
        ([255, 255, 255, 255], 0.5, 0.0, 0.0),
        ([0, 0, 0, 1], 0.5, 0.25, 0.25),
        ([255, 0, 0, 1], 0.5, 1 / 3, 0.25),
        ([0, 0, 0, 1], 0.0, 0.0, 0.0),
    ],
)
def test_constant_maps(label: list[int], score: float, iou: float, code: float) -> None:
    scores, labels = np.full(4, score, np.float32), np.array(label)
    parts = [ScoreCounts.from_values(scores[labels == value]) for value in (1, 0, 255)]
    for others, expected in ((parts[1:2], iou), (parts[1:], code)):
        result = summarise([sweep(parts[0], others)])
        assert result is not None
        assert result.iou == result.iou_best == pytest.approx(expected)


def test_no_images_no_value() -> None:
    assert summarise([]) is None


def test_scaled_thresholds_span_the_range() -> None:
    scaled = scaled_thresholds(-30.0, 10.0)
    assert (scaled[0], scaled[50], scaled[100]) == (-30.0, -10.0, 10.0)
    assert scaled.size == THRESHOLDS.size == 101
