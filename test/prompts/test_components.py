from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from ros2_ood_seg.config import BoxPromptsConfig
from ros2_ood_seg.prompts import BOX_PROMPTS
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Calibration, Prompts, ScoreMap

CPU = Runtime(torch.device("cpu"))


def boxes_of(scores: torch.Tensor, ignore: torch.Tensor | None = None, **settings: float) -> Prompts:
    config = BoxPromptsConfig.model_validate({"method": "components", "min_area_px": 1, **settings})
    return BOX_PROMPTS.get("components")(config, CPU)(ScoreMap(scores, "test", Calibration.linear()), ignore)


def two_objects() -> torch.Tensor:
    scores = torch.full((40, 60), 0.1)
    scores[5:15, 10:30] = 0.6
    scores[20:24, 50:60] = 0.9
    return scores


def test_tight_boxes_by_confidence() -> None:
    prompts = boxes_of(two_objects())
    assert prompts.boxes_xyxy.tolist() == [[50, 20, 60, 24], [10, 5, 30, 15]]
    torch.testing.assert_close(prompts.confidence, torch.tensor([0.9, 0.6]))
    assert prompts.num_points == 0


@settings(deadline=None, max_examples=80)
@given(arrays(np.float32, (13, 17), elements=st.sampled_from([0.0, 0.25, 0.75, 1.0])))
def test_components_are_scipys(values: NDArray[np.float32]) -> None:
    labels, count = ndimage.label(values >= 0.5, structure=np.ones((3, 3)))
    expected = sorted((s[1].start, s[0].start, s[1].stop, s[0].stop) for s in ndimage.find_objects(labels))
    prompts = boxes_of(torch.from_numpy(values), max_boxes=1000)
    assert sorted(map(tuple, prompts.boxes_xyxy.tolist())) == expected
    means = ndimage.mean(values, labels, np.arange(1, count + 1)) if count else []
    np.testing.assert_allclose(prompts.confidence.numpy(), np.sort(means)[::-1], rtol=1e-5)


def test_diagonal_neighbours_belong_together() -> None:
    assert boxes_of(torch.eye(6)).boxes_xyxy.tolist() == [[0, 0, 6, 6]]


def test_small_weak_and_ignored_ones_are_dropped() -> None:
    assert [boxes_of(two_objects(), min_area_px=least).num_boxes for least in (40, 41)] == [2, 1]
    assert boxes_of(two_objects(), min_confidence=0.7).confidence.tolist() == [torch.tensor(0.9).item()]
    assert boxes_of(two_objects(), max_boxes=1).boxes_xyxy.tolist() == [[50, 20, 60, 24]]
    ignore = torch.zeros(40, 60, dtype=torch.bool)
    ignore[:, 20:] = True
    assert boxes_of(two_objects(), ignore).boxes_xyxy.tolist() == [[10, 5, 20, 15]]


def test_margin_stays_inside_the_image() -> None:
    assert boxes_of(two_objects(), margin=0.5).boxes_xyxy.tolist() == [[45, 18, 60, 26], [0, 0, 40, 20]]


def test_nothing_above_the_threshold() -> None:
    assert len(boxes_of(torch.zeros(10, 10))) == 0
    assert boxes_of(torch.ones(10, 10), torch.ones(10, 10, dtype=torch.bool)).boxes_xyxy.shape == (0, 4)
