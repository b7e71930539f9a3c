from __future__ import annotations

import pytest
import torch

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.external import ExternalScorer, build

IMAGE = torch.zeros((40, 60, 3), dtype=torch.uint8)


def make(low: float = -30.0, high: float = 0.0) -> ExternalScorer:
    return build(ScorerConfig(name="external", external_low=low, external_high=high), Runtime(torch.device("cpu")))


def test_map_of_image_size_passes_unchanged_and_calibrated() -> None:
    scores = torch.linspace(-30, 0, 2400).view(40, 60)
    result = make()(IMAGE, scores)
    assert torch.equal(result.scores, scores)
    assert result.scorer == "external"
    assert result.semantic is None
    torch.testing.assert_close(result.calibrated(), (scores + 30) / 30)


def test_smaller_map_is_scaled_keeping_places() -> None:
    scores = torch.zeros(20, 30)
    scores[2, 25] = 1.0
    result = make()(IMAGE, scores)
    assert result.shape_hw == (40, 60)
    y, x = divmod(int(result.scores.argmax()), 60)
    assert y in (4, 5)
    assert x in (50, 51)


def test_larger_map_is_averaged_not_sampled() -> None:
    scores = torch.zeros(160, 240)
    scores[::4] = 4.0
    result = make()(IMAGE, scores)
    torch.testing.assert_close(result.scores[5:-5], torch.ones(30, 60), atol=0.1, rtol=0)


def test_half_precision_map_is_widened() -> None:
    assert make()(IMAGE, torch.zeros((40, 60), dtype=torch.float16)).scores.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_values_are_counted(value: float) -> None:
    scores = torch.zeros(40, 60)
    scores[3, 4:7] = value
    with pytest.raises(InputError, match="3 NaN or infinite values of 2400"):
        make()(IMAGE, scores)


@pytest.mark.parametrize(("shape", "message"), [((60, 40), "40x60"), ((40, 60, 1), "shape"), ((0, 60), "shape"), ((40, 40), "aspect")])
def test_wrong_shape_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()(IMAGE, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(20, 30), (13, 20), (14, 20), (40, 60), (80, 120)])
def test_rounded_sizes_are_accepted(shape: tuple[int, int]) -> None:
    assert make()(IMAGE, torch.zeros(shape)).shape_hw == (40, 60)


def test_missing_map_and_empty_range_are_refused() -> None:
    with pytest.raises(InputError, match="needs a score map"):
        make()(IMAGE, None)
    with pytest.raises(InputError, match="external_low is 1"):
        make(1.0, 1.0)
