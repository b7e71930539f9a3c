from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ros2_ood_seg.fusion.nms import drop_contained, greedy_nms
from ros2_ood_seg.fusion.overlaps import measure_masks


def pairwise_iou(first: torch.Tensor, second: torch.Tensor) -> float:
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 0.0


def loops(masks: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """The published nested loops (kumuji/ugains), one pair at a time."""
    remaining = sorted(range(len(masks)), key=lambda n: (-scores[n].item(), n))
    kept = []
    while remaining:
        best = remaining.pop(0)
        kept.append(best)
        remaining = [n for n in remaining if pairwise_iou(masks[best], masks[n]) <= threshold]
    return kept


@st.composite
def rectangles(draw: st.DrawFn) -> torch.Tensor:
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 40))
    masks = torch.zeros((draw(st.integers(0, 8)), height, width), dtype=torch.bool)
    for mask in masks:
        x = sorted(draw(st.tuples(st.integers(0, width), st.integers(0, width))))
        y = sorted(draw(st.tuples(st.integers(0, height), st.integers(0, height))))
        mask[y[0] : y[1], x[0] : x[1]] = True
    return masks


@settings(deadline=None, max_examples=80)
@given(masks=rectangles(), seed=st.integers(0, 1000), threshold=st.sampled_from([0.1, 0.5, 0.7, 1.0]))
def test_nms_is_that_of_nested_loops(masks: torch.Tensor, seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct scores, so that ties happen.
    scores = torch.randint(0, 4, (len(masks),), generator=generator).float()
    iou = measure_masks(masks, torch.zeros(masks.shape[1:])).iou()
    assert greedy_nms(iou, scores, threshold).tolist() == loops(masks, scores, threshold)


def test_masks_whose_iou_is_the_threshold_are_both_kept_and_of_equal_ones_the_first_counts() -> None:
    iou = torch.eye(40, dtype=torch.float64).masked_fill_(torch.ones(40, 40, dtype=torch.bool).triu(1), 0.5)
    iou = torch.maximum(iou, iou.T)
    scores = torch.ones(40)
    assert greedy_nms(iou, scores, 0.5).tolist() == list(range(40))
    assert greedy_nms(iou, scores, 0.499).tolist() == [0]


@settings(deadline=None, max_examples=80)
@given(masks=rectangles(), seed=st.integers(0, 1000), share=st.sampled_from([0.3, 0.5, 1.0]))
def test_a_part_is_what_a_better_mask_that_stays_covers(masks: torch.Tensor, seed: int, share: float) -> None:
    ranked = np.random.default_rng(seed).permutation(len(masks))
    measures = measure_masks(masks, torch.zeros(masks.shape[1:]))
    expected: list[int] = []
    for n in ranked:
        area = int(masks[n].sum())
        if not any(int((masks[n] & masks[m]).sum()) > share * max(area, 1) for m in expected):
            expected.append(int(n))
    assert drop_contained(measures.inside(), torch.from_numpy(ranked), share).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(masks=rectangles(), seed=st.integers(0, 1000))
def test_measures_are_those_of_plain_numpy(masks: torch.Tensor, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = masks & torch.from_numpy(rng.random(masks.shape) < 0.8)
    scores = torch.from_numpy(rng.normal(-5.0, 3.0, masks.shape[1:]).astype(np.float32))
    ignore = torch.from_numpy(rng.random(masks.shape[1:]) < 0.3)
    measures = measure_masks(masks, scores, ignore, empty_score=-1.0)
    for n, mask in enumerate(masks):
        inside = scores[mask].double()
        expected = inside.mean().item() if len(inside) else -1.0
        np.testing.assert_allclose(measures.mean_score[n].item(), expected, rtol=1e-5, atol=1e-5)
        assert measures.area_px[n] == mask.sum()
        assert measures.ignored_px[n] == (mask & ignore).sum()
        for k, other in enumerate(masks):
            assert measures.intersection_px[n, k] == (mask & other).sum()
            assert measures.iou()[n, k] == pairwise_iou(mask, other)
