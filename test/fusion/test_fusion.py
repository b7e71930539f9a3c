from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.fusion import FUSIONS
from ros2_ood_seg.fusion.overlaps import inside_scores, measure_masks
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Calibration, Fused, Masks, Prompts, ScoreMap

CPU = Runtime(torch.device("cpu"))
HEIGHT, WIDTH = 40, 60
CALIBRATION = Calibration((-4.0, 0.0, 4.0), (0.0, 0.5, 1.0))


def mask_of(*rectangles_xyxy: tuple[int, int, int, int]) -> torch.Tensor:
    masks = torch.zeros((len(rectangles_xyxy), HEIGHT, WIDTH), dtype=torch.bool)
    for mask, (x_min, y_min, x_max, y_max) in zip(masks, rectangles_xyxy, strict=True):
        mask[y_min:y_max, x_min:x_max] = True
    return masks


def random_masks(seed: int, count: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.integers(0, WIDTH + 1, (count, 2))), np.sort(rng.integers(0, HEIGHT + 1, (count, 2)))
    return mask_of(*((int(a), int(c), int(b), int(d)) for (a, b), (c, d) in zip(x, y, strict=True)))


def random_scores(seed: int) -> torch.Tensor:
    return torch.randn((HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed)) * 2.0


def fuse(
    name: str,
    masks: torch.Tensor,
    scores: torch.Tensor | None = None,
    confidence: Sequence[float] | torch.Tensor = (),
    ignore: torch.Tensor | None = None,
    **changes: Any,
) -> Fused:
    """Fuses masks of which the first len(confidence) come from boxes, the others from points."""
    sure = torch.as_tensor(confidence, dtype=torch.float32)
    prompts = Prompts(torch.zeros(len(sure), 4), sure, torch.zeros(len(masks) - len(sure), 2))
    score_map = ScoreMap(torch.zeros(HEIGHT, WIDTH) if scores is None else scores, "test", CALIBRATION)
    fusion = FUSIONS.get(name)(FusionConfig.model_validate({"name": name, **changes}), CPU)
    return fusion(score_map, prompts, Masks(masks, torch.linspace(0.1, 0.9, len(masks))), ignore)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 7))
def test_s2m_takes_the_lowest_confidence_of_the_union(seed: int, count: int) -> None:
    masks = random_masks(seed, count)
    confidence = torch.from_numpy(np.random.default_rng(seed).uniform(0.05, 1.0, count).astype(np.float32))
    refined = fuse("s2m", masks, confidence=confidence).refined
    expected = torch.where(masks, confidence[:, None, None], torch.inf).amin(dim=0) if count else torch.full((HEIGHT, WIDTH), torch.inf)
    assert torch.equal(refined, expected.masked_fill(expected.isinf(), 0.0))
    # Detectors give boxes by descending confidence: then the released code's last write is the same.
    order = confidence.argsort(descending=True)
    assert torch.equal(fuse("s2m", masks[order], confidence=confidence[order], compat="code").refined, refined)


def test_s2m_code_lets_the_last_box_win() -> None:
    masks = mask_of((0, 0, 20, 20), (10, 10, 30, 30))
    assert fuse("s2m", masks, confidence=[0.2, 0.8], compat="code").refined[15, 15] == torch.tensor(0.8)
    assert fuse("s2m", masks, confidence=[0.2, 0.8], compat="paper").refined[15, 15] == torch.tensor(0.2)


def test_s2m_merges_masks_of_one_object() -> None:
    masks = mask_of((0, 0, 20, 20), (5, 5, 15, 15), (18, 0, 30, 20), (40, 30, 50, 40))
    found = fuse("s2m", masks, confidence=[0.6, 0.9, 0.7, 0.3], box_weight=1.0).instances
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.3]))
    assert torch.equal(found.raw_scores, found.scores)
    assert found.area_px.tolist() == [400, 240, 100]
    assert torch.equal(found.masks[0], masks[0] | masks[1])
    torch.testing.assert_close(found.mask_quality, torch.linspace(0.1, 0.9, 4)[[1, 2, 3]])
    assert len(fuse("s2m", masks, confidence=[0.6, 0.9, 0.7, 0.3], merge_overlap=0.1).instances) == 2


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 8), share=st.sampled_from([0.2, 0.5, 1.0]))
def test_s2m_instances_are_unions_of_masks_that_overlap_directly_or_through_others(seed: int, count: int, share: float) -> None:
    masks = random_masks(seed, count)
    confidence = torch.from_numpy(np.random.default_rng(seed).permutation(count).astype(np.float32) + 1) / (count + 1)
    expected: list[set[int]] = []
    for n in (n for n in range(count) if masks[n].any()):
        near = [g for g in expected if any((masks[n] & masks[m]).sum() >= share * min(masks[n].sum(), masks[m].sum()) for m in g)]
        expected = [g for g in expected if g not in near] + [{n}.union(*near)]
    expected.sort(key=lambda group: -max(confidence[n].item() for n in group))
    found = fuse("s2m", masks, confidence=confidence, box_weight=1.0, merge_overlap=share).instances
    torch.testing.assert_close(found.scores, torch.tensor([max(confidence[n].item() for n in group) for group in expected]))
    for mask, group in zip(found.masks, expected, strict=True):
        assert torch.equal(mask, masks[sorted(group)].any(dim=0))


def test_s2m_finds_nothing_on_the_ignore_mask() -> None:
    masks = mask_of((0, 0, 20, 20), (30, 10, 50, 30))
    ignore = mask_of((0, 0, WIDTH, 3))[0]
    found = fuse("s2m", masks, confidence=[0.9, 0.4], ignore=ignore, box_weight=1.0, ignore_overlap_px=60)
    assert found.instances.scores.tolist() == [pytest.approx(0.4)]
    assert torch.equal(found.refined, masks[1] * torch.tensor(0.4))
    found = fuse("s2m", masks, confidence=[0.9, 0.4], ignore=ignore, box_weight=1.0, ignore_overlap_px=61)
    assert found.instances.scores.tolist() == [pytest.approx(0.9), pytest.approx(0.4)]
    # What is left of a mask that reaches over.
    assert torch.equal(found.refined, (masks[0] & ~ignore) * torch.tensor(0.9) + masks[1] * torch.tensor(0.4))


def test_s2m_gives_point_masks_their_calibrated_mean_score() -> None:
    scores = torch.full((HEIGHT, WIDTH), -4.0)
    scores[:10, :10] = 2.0
    found = fuse("s2m", mask_of((0, 0, 10, 10)), scores).instances
    assert found.scores.tolist() == [0.75]


def published_ugains(masks: torch.Tensor, scores: torch.Tensor, floor: float) -> tuple[list[int], torch.Tensor]:
    """Mean score, nested loops, sum, in float64."""
    means = [scores[m].double().mean().item() if m.any() else -1.0 for m in masks]
    kept: list[int] = []
    for n in sorted(range(len(masks)), key=lambda i: -means[i]):
        if all((masks[n] & masks[k]).sum() <= 0.7 * max(1, int((masks[n] | masks[k]).sum())) for k in kept):
            kept.append(n)
    total = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    for n in kept:
        total[masks[n]] += means[n]
    total[total == 0] = floor
    return [n for n in kept if masks[n].any()], total + scores


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 9))
def test_ugains_is_the_published_procedure(seed: int, count: int) -> None:
    masks, scores = random_masks(seed, count), random_scores(seed)
    kept, refined = published_ugains(masks, scores, -1.0)
    found = fuse("ugains", masks, scores, floor="value", floor_value=-1.0, nms_containment=1.0)
    torch.testing.assert_close(found.refined.double(), refined, rtol=1e-5, atol=1e-5)
    assert found.instances.area_px.tolist() == [int(masks[n].sum()) for n in kept]
    assert not found.instances.track_ids.any()
    torch.testing.assert_close(found.instances.scores, CALIBRATION.to_unit(found.instances.raw_scores))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(0, 9),
    shift=st.sampled_from([-20.0, 0.0, 20.0]),
    name=st.sampled_from(["ugains", "hybrid"]),
)
def test_the_calibrated_ensemble_never_lowers_a_pixel(seed: int, count: int, shift: float, name: str) -> None:
    masks, scores = random_masks(seed, count), random_scores(seed) + shift
    confidence = np.linspace(0.9, 0.1, count // 2).tolist()
    added = fuse(name, masks, scores, confidence).refined - scores
    assert added.min() >= -1e-4
    outside = ~masks.any(dim=0)
    torch.testing.assert_close(added[outside], torch.zeros(int(outside.sum())), rtol=0, atol=0)


def test_calibrated_ensemble_adds_what_the_best_mask_has_above_the_zero() -> None:
    scores = torch.full((HEIGHT, WIDTH), -3.0)
    masks = mask_of((0, 0, 10, 10), (5, 5, 20, 20))
    refined = fuse("ugains", masks, scores).refined
    # The masks lie 1 above the zero of -4, with predicted IoUs of 0.1 and 0.9.
    torch.testing.assert_close(refined[[0, 7, 15, 30], [0, 7, 15, 30]], torch.tensor([-2.9, -2.1, -2.1, -3.0]))
    # From calibrated 0.5 on, which is raw 0, these masks do not count.
    assert torch.equal(fuse("ugains", masks, scores, floor_unit=0.5).refined, scores)


def test_masks_without_predicted_iou_count_in_full() -> None:
    score_map = ScoreMap(torch.full((HEIGHT, WIDTH), -3.0), "test", CALIBRATION)
    masks = Masks(mask_of((0, 0, 10, 10)), torch.tensor([torch.nan]))
    prompts = Prompts(torch.zeros(0, 4), torch.zeros(0), torch.zeros(1, 2))
    refined = FUSIONS.get("ugains")(FusionConfig(name="ugains"), CPU)(score_map, prompts, masks).refined
    assert (refined[0, 0].item(), refined[30, 30].item()) == (-2.0, -3.0)


def test_masks_on_the_ignore_mask_are_dropped_after_suppression() -> None:
    ignore = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    ignore[30:] = True
    scores = torch.zeros(HEIGHT, WIDTH)
    scores[30:] = 3.0
    # The first mask, on the hood, scores higher and suppresses the second before it is dropped itself.
    masks = mask_of((0, 19, 10, 40), (0, 19, 10, 39), (20, 0, 30, 10), (40, 21, 50, 39))
    found = fuse("ugains", masks, scores, ignore=ignore)
    assert found.instances.area_px.tolist() == [180, 100]
    assert found.instances.boxes_xyxy[0].tolist() == [40, 21, 50, 39]
    assert (found.refined[30:] == -4.0).all()
    assert len(fuse("ugains", masks, scores, ignore=ignore, ignore_overlap_px=90).instances) == 1


@pytest.mark.parametrize("name", FUSIONS.names)
def test_small_and_weak_instances_are_dropped(name: str) -> None:
    masks = mask_of((0, 0, 10, 10), (20, 20, 23, 23))
    assert fuse(name, masks, confidence=[0.9, 0.8], min_area_px=10).instances.area_px.tolist() == [100]
    scores = torch.full((HEIGHT, WIDTH), -4.0)
    scores[:10, :10] = 3.0
    assert fuse(name, masks, scores, confidence=[0.9, 0.2], min_score=0.6).instances.area_px.tolist() == [100]


@pytest.mark.parametrize("name", ["ugains", "hybrid"])
def test_weak_masks_count_in_the_ensemble(name: str) -> None:
    masks = mask_of((0, 0, 10, 10), (20, 20, 30, 30))
    scores = torch.full((HEIGHT, WIDTH), -4.0)
    scores[:10, :10], scores[20:30, 20:30] = 3.0, 1.0
    every, strong = (fuse(name, masks, scores, [0.9, 0.2], min_score=least, quality_power=0.0) for least in (0.0, 0.7))
    assert [len(every.instances), len(strong.instances)] == [2, 1]
    assert torch.equal(every.refined, strong.refined)
    assert (every.refined[20:30, 20:30] > 1.0).all()


@pytest.mark.parametrize("name", FUSIONS.names)
def test_half_score_changes_scores_and_nothing_else(name: str) -> None:
    masks, scores = random_masks(5, 8), random_scores(5)
    plain, scaled = (fuse(name, masks, scores, [0.9, 0.6, 0.3], half_score=half) for half in (0.5, 0.6))
    assert torch.equal(plain.instances.masks, scaled.instances.masks)
    assert torch.equal(plain.refined, scaled.refined)
    assert torch.equal(plain.instances.raw_scores, scaled.instances.raw_scores)
    before = plain.instances.scores
    torch.testing.assert_close(scaled.instances.scores, torch.where(before < 0.6, before / 1.2, 1 - (1 - before) / 0.8))


@pytest.mark.parametrize("name", FUSIONS.names)
def test_no_masks(name: str) -> None:
    scores = random_scores(0)
    found = fuse(name, mask_of(), scores)
    assert len(found.instances) == 0
    assert found.instances.masks.shape == (0, HEIGHT, WIDTH)
    assert torch.equal(found.refined, torch.zeros_like(scores) if name == "s2m" else scores)


@pytest.mark.parametrize("name", FUSIONS.names)
def test_an_empty_mask_is_no_instance(name: str) -> None:
    found = fuse(name, mask_of((0, 0, 0, 0), (0, 0, 9, 9)), random_scores(1), [0.9])
    assert found.instances.area_px.tolist() == [81]
    assert found.refined.isfinite().all()


def test_s2m_leaves_out_masks_of_sure_boxes_that_hold_little_score() -> None:
    scores = torch.full((HEIGHT, WIDTH), -4.0)
    masks = mask_of((0, 0, 10, 10), (20, 0, 30, 10))
    scores[masks[0]] = 2.0
    # The means are 0.75 and 0, the predicted IoUs 0.1 and 0.9.
    found = fuse("s2m", masks, scores, [0.5, 0.9])
    torch.testing.assert_close(found.instances.scores, torch.tensor([0.625, 0.45]))
    assert found.instances.raw_scores.tolist() == pytest.approx([0.5, 0.9])
    left = fuse("s2m", masks, scores, [0.5, 0.9], min_score=0.5)
    assert torch.equal(left.instances.masks, masks[:1])
    # What stays has the confidence of its box in the map, as published.
    assert torch.equal(left.refined, 0.5 * masks[0])
    assert len(fuse("s2m", masks, scores, [0.5, 0.9], min_score=0.5, box_weight=1.0).instances) == 2


@pytest.mark.parametrize("name", FUSIONS.names)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_scores_are_multiplied_by_the_predicted_iou(name: str, power: float) -> None:
    masks = mask_of((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 11))
    scores = random_scores(7)
    plain, scored = (fuse(name, masks, scores, [0.9, 0.2], quality_power=p).instances for p in (0.0, power))
    by_place = [{int(box[0]): score for box, score in zip(found.boxes_xyxy, found.scores, strict=True)} for found in (plain, scored)]
    quality = {0: 0.1, 20: 0.5, 40: 0.9}
    for x, score in by_place[0].items():
        torch.testing.assert_close(by_place[1][x], score * quality[x] ** power)
    assert scored.scores.tolist() == sorted(scored.scores.tolist(), reverse=True)
    assert sorted(scored.raw_scores.tolist()) == sorted(plain.raw_scores.tolist())


@pytest.mark.parametrize("name", FUSIONS.names)
def test_without_a_predicted_iou_there_is_no_mask_scoring(name: str) -> None:
    score_map = ScoreMap(random_scores(2), "test", CALIBRATION)
    masks = Masks(mask_of((0, 0, 10, 10), (20, 20, 30, 30)), torch.full((2,), torch.nan))
    prompts = Prompts(torch.zeros(1, 4), torch.tensor([0.7]), torch.zeros(1, 2))
    with_power, without = (
        FUSIONS.get(name)(FusionConfig(name=name, quality_power=p), CPU)(score_map, prompts, masks).instances.scores for p in (2.0, 0.0)
    )
    assert torch.equal(with_power, without)


@pytest.mark.parametrize("name", ["ugains", "hybrid"])
def test_of_two_masks_of_one_object_the_better_outline_stays(name: str) -> None:
    # The last one has the highest predicted IoU.
    masks = mask_of((0, 0, 20, 20), (0, 0, 20, 21))
    scores = torch.full((HEIGHT, WIDTH), -2.0)
    scores[masks[0]] = 2.0
    assert torch.equal(fuse(name, masks, scores).instances.masks, masks[:1])
    assert torch.equal(fuse(name, masks, scores, quality_power=1.0).instances.masks, masks[1:])


def test_hybrid_keeps_one_of_a_box_and_a_point_on_the_same_object() -> None:
    masks = mask_of((0, 0, 20, 20), (40, 0, 50, 10), (0, 0, 20, 19), (40, 20, 50, 30))
    found = fuse("hybrid", masks, confidence=[0.8, 0.6]).instances
    # All means are raw 0, calibrated 0.5: the score is 0.25 + confidence / 2, and the lone point has no box to support it.
    torch.testing.assert_close(found.scores, torch.tensor([0.65, 0.55, 0.25]))
    assert found.area_px.tolist() == [400, 100, 100]
    assert found.raw_scores.tolist() == [0.0, 0.0, 0.0]


def test_hybrid_joins_what_lies_in_a_better_mask_of_a_box() -> None:
    # Half of the second mask lies in the first; the third is alone, and so is the point's, which touches the second.
    masks = mask_of((0, 0, 20, 20), (10, 0, 30, 20), (40, 20, 50, 30), (28, 0, 40, 20))
    scores = torch.full((HEIGHT, WIDTH), 2.0)
    found = fuse("hybrid", masks, scores, confidence=[0.8, 0.6, 0.7]).instances
    assert torch.equal(found.masks, torch.stack([masks[0] | masks[1], masks[2], masks[3]]))
    alone = fuse("hybrid", masks, scores, confidence=[0.8, 0.6, 0.7], merge_overlap=0.6).instances
    assert torch.equal(alone.masks, masks[[0, 2, 1, 3]])
    torch.testing.assert_close(found.scores, alone.scores[[0, 1, 3]])
    # What is not reported is joined to nothing.
    strict = fuse("hybrid", masks, scores, confidence=[0.8, 0.6, 0.7], min_score=0.7).instances
    assert torch.equal(strict.masks, masks[[0, 2]])


def test_hybrid_keeps_a_small_object_before_a_larger_weaker_one() -> None:
    masks = mask_of((10, 10, 16, 16), (5, 5, 30, 30))
    found = fuse("hybrid", masks, confidence=[0.9, 0.5]).instances
    assert torch.equal(found.masks, masks)


def test_hybrid_point_masks_inherit_from_a_box_by_their_overlap() -> None:
    masks = mask_of((0, 0, 20, 20), (0, 0, 20, 10))
    found = fuse("hybrid", masks, confidence=[0.8], nms_containment=1.0).instances
    torch.testing.assert_close(found.scores, torch.tensor([0.65, 0.25 + 0.5 * 0.8 * 0.5]))


@pytest.mark.parametrize("name", ["ugains", "hybrid"])
def test_a_part_of_a_better_mask_counts_in_the_refined_map_only(name: str) -> None:
    masks = mask_of((12, 12, 18, 18), (10, 10, 30, 30), (40, 5, 50, 15))
    scores = torch.full((HEIGHT, WIDTH), -4.0)
    scores[masks[0]] = 3.0
    # The part scores higher, but its outline is the worse one by far.
    whole = fuse(name, masks, scores, quality_power=4.0, nms_containment=0.5)
    every = fuse(name, masks, scores, quality_power=4.0, nms_containment=1.0)
    assert torch.equal(whole.refined, every.refined)
    assert len(every.instances) == 3
    assert torch.equal(whole.instances.masks, every.instances.masks[[0, 2]])


@pytest.mark.parametrize("name", FUSIONS.names)
def test_the_quantile_of_a_partly_seen_object_is_what_was_seen(name: str) -> None:
    scores = torch.full((HEIGHT, WIDTH), -4.0)
    masks = mask_of((0, 0, 20, 10), (30, 20, 40, 30))
    scores[:, :5] = 2.0
    # A quarter of the first mask scores 0.75 and the rest 0, so that the mean raw score is -2.5.
    mean, quantile, lower = (fuse(name, masks, scores, [0.9], box_weight=0.0, min_area_px=150, inside_quantile=q) for q in (0.0, 0.9, 0.7))
    assert mean.instances.scores.tolist() == pytest.approx([0.1875])
    assert quantile.instances.scores.tolist() == pytest.approx([0.75])
    assert lower.instances.scores.tolist() == pytest.approx([0.0])
    # The refined map adds mean scores, whatever instances are ranked by.
    assert torch.equal(mean.refined, quantile.refined)
    assert torch.equal(mean.instances.raw_scores, quantile.instances.raw_scores)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 6), quantile=st.floats(0.01, 0.99))
def test_inside_quantiles_are_those_of_the_pixels(seed: int, count: int, quantile: float) -> None:
    masks, scores = random_masks(seed, count), random_scores(seed)
    measures = measure_masks(masks, scores, empty_score=-7.0)
    inside = inside_scores(FusionConfig(inside_quantile=quantile), masks, scores, measures)
    for mask, value in zip(masks.numpy(), inside.tolist(), strict=True):
        pixels = np.sort(scores.numpy()[mask])
        assert value == pytest.approx(pixels[round(quantile * (len(pixels) - 1))] if len(pixels) else -7.0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 6), with_ignore=st.booleans())
def test_measures_of_tall_pictures_are_those_of_the_pixels(seed: int, count: int, with_ignore: bool) -> None:
    # Several bands of rows, in pictures that are higher than wide.
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(1, 260)), int(rng.integers(1, 40))
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        (x_min, x_max), (y_min, y_max) = np.sort(rng.integers(0, width + 1, 2)), np.sort(rng.integers(0, height + 1, 2))
        mask[y_min:y_max, x_min:x_max] = rng.random((y_max - y_min, x_max - x_min)) < 0.7
    scores, ignore = rng.normal(-3.0, 2.0, (height, width)).astype(np.float32), rng.random((height, width)) < 0.3
    found = measure_masks(torch.from_numpy(masks), torch.from_numpy(scores), torch.from_numpy(ignore) if with_ignore else None, -7.0)
    assert found.area_px.tolist() == [mask.sum() for mask in masks]
    assert found.intersection_px.tolist() == [[(a & b).sum() for b in masks] for a in masks]
    assert found.ignored_px.tolist() == [(mask & ignore).sum() if with_ignore else 0 for mask in masks]
    np.testing.assert_allclose(found.mean_score, [scores[mask].mean() if mask.any() else -7.0 for mask in masks], rtol=1e-4, atol=1e-5)


def test_the_quantile_of_a_large_mask_is_taken_from_a_part_of_its_pixels() -> None:
    scores = torch.randn((600, 800), generator=torch.Generator().manual_seed(0))
    masks = torch.ones((1, 600, 800), dtype=torch.bool)
    inside = inside_scores(FusionConfig(inside_quantile=0.9), masks, scores, measure_masks(masks, scores))
    assert ((scores > inside).float().mean() - 0.1).abs() < 0.006


def test_hybrid_without_box_weight_ranks_as_ugains() -> None:
    masks, scores = random_masks(3, 8), random_scores(3)
    hybrid, ugains = (fuse(name, masks, scores, [0.9, 0.4], box_weight=0.0, nms_containment=1.0) for name in ("hybrid", "ugains"))
    assert torch.equal(hybrid.instances.masks, ugains.instances.masks)
    torch.testing.assert_close(hybrid.refined, ugains.refined)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FUSIONS.names)
def test_the_gpu_gives_the_same(name: str) -> None:
    masks, scores = random_masks(5, 8), random_scores(5)
    prompts = Prompts(torch.zeros(4, 4), torch.linspace(0.9, 0.3, 4), torch.zeros(4, 2))
    fusion = FUSIONS.get(name)(FusionConfig(name=name), CPU)
    quality = torch.full((8,), torch.nan)
    here = fusion(ScoreMap(scores, "test", CALIBRATION), prompts, Masks(masks, quality))
    on_gpu = Prompts(prompts.boxes_xyxy.cuda(), prompts.confidence.cuda(), prompts.points_xy.cuda())
    there = fusion(ScoreMap(scores.cuda(), "test", CALIBRATION), on_gpu, Masks(masks.cuda(), quality.cuda()))
    assert torch.equal(there.instances.masks.cpu(), here.instances.masks)
    torch.testing.assert_close(there.refined.cpu(), here.refined, rtol=1e-5, atol=1e-5)
