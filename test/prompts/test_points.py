from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from ros2_ood_seg.config import PointPromptsConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.points_bench import farthest_points_float64
from ros2_ood_seg.prompts import POINT_PROMPTS
from ros2_ood_seg.prompts.points import _farthest_points_dense, farthest_points, kmeans_points, oracle_points, random_points
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Calibration, ScoreMap

CPU = Runtime(torch.device("cpu"))
MAPS = st.tuples(st.integers(1, 70), st.integers(1, 70)).flatmap(lambda shape: arrays(bool, shape))


def blobs(seed: int, height: int, width: int) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    found = np.zeros((height, width), dtype=bool)
    for _ in range(rng.integers(1, 8)):
        found |= (x - rng.integers(width)) ** 2 + (y - rng.integers(height)) ** 2 < rng.integers(2, height // 3) ** 2
    return found & (rng.random((height, width)) < rng.uniform(0.02, 1.0))


@settings(deadline=None, max_examples=80)
@given(candidates=MAPS, count=st.integers(1, 40))
def test_farthest_points_are_those_of_the_definition(candidates: NDArray[np.bool_], count: int) -> None:
    expected = farthest_points_float64(candidates, count)
    mask = torch.from_numpy(candidates)
    np.testing.assert_array_equal(_farthest_points_dense(mask, count).numpy(), expected)
    if candidates.any():
        np.testing.assert_array_equal(farthest_points(mask, count).numpy(), expected)


@pytest.mark.parametrize("seed", range(12))
def test_farthest_points_on_larger_maps(seed: int) -> None:
    candidates = blobs(seed, 211, 317)
    if not candidates.any():
        candidates[5, 7] = True
    expected = farthest_points_float64(candidates, 50)
    np.testing.assert_array_equal(farthest_points(torch.from_numpy(candidates), 50).numpy(), expected)


def test_farthest_points_of_a_full_map_break_ties_in_raster_order() -> None:
    candidates = torch.ones(64, 96, dtype=torch.bool)
    points = farthest_points(candidates, 200).numpy()
    np.testing.assert_array_equal(points, farthest_points_float64(candidates.numpy(), 200))
    assert points[0].tolist() == [0, 0]
    assert points[1].tolist() == [95, 63]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(4))
def test_farthest_points_on_the_gpu(seed: int) -> None:
    candidates = torch.from_numpy(blobs(seed, 211, 317))
    assert torch.equal(farthest_points(candidates.cuda(), 50).cpu(), farthest_points(candidates, 50))


def score_map(scores: torch.Tensor) -> ScoreMap:
    return ScoreMap(scores, "test", Calibration((-4.0, 0.0, 4.0), (0.0, 0.5, 1.0)))


@pytest.mark.parametrize("method", ["fps", "kmeans", "random"])
def test_points_lie_on_candidates_without_duplicates(method: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(60, 80)
    ignore = torch.zeros(60, 80, dtype=torch.bool)
    ignore[40:] = True
    generate = POINT_PROMPTS.get(method)(PointPromptsConfig(method=method, count=30, threshold=0.6), CPU)
    points = generate(score_map(scores), ignore).points_xy
    x, y = points.long().T
    assert 1 < len(points) <= 30
    # Calibrated 0.6 is raw 0.8 on this map's straight second half.
    assert (scores[y, x] >= 0.8).all()
    assert not ignore[y, x].any()
    assert len({tuple(point) for point in points.tolist()}) == len(points)
    assert torch.equal(generate(score_map(scores), ignore).points_xy, points)


@pytest.mark.parametrize("method", ["fps", "kmeans", "random"])
def test_fewer_candidates_than_points_are_taken_once_each(method: str) -> None:
    scores = torch.full((20, 30), -9.0)
    scores[3, 4] = scores[10, 20] = scores[19, 29] = 3.0
    points = POINT_PROMPTS.get(method)(PointPromptsConfig(count=50), CPU)(score_map(scores)).points_xy
    assert sorted(map(tuple, points.tolist())) == [(4, 3), (20, 10), (29, 19)]


@pytest.mark.parametrize("method", ["fps", "kmeans", "random"])
def test_nothing_uncertain_gives_no_points(method: str) -> None:
    config = PointPromptsConfig(count=50)
    prompts = POINT_PROMPTS.get(method)(config, CPU)(score_map(torch.full((20, 30), -9.0)))
    assert prompts.points_xy.shape == (0, 2)
    assert len(prompts) == 0


def test_too_few_candidates_count_as_nothing() -> None:
    scores = torch.full((20, 30), -9.0)
    scores[3, 4:9] = 3.0
    for least, expected in ((5, 5), (6, 0)):
        generate = POINT_PROMPTS.get("fps")(PointPromptsConfig(count=50, min_candidates=least), CPU)
        assert generate(score_map(scores)).num_points == expected


def test_raw_threshold_ignores_the_calibration() -> None:
    scores = torch.full((20, 30), -0.9)
    scores[3, 4] = -0.1
    config = PointPromptsConfig(count=5, threshold=1.0, use_raw_threshold=True, raw_threshold=-0.15)
    assert POINT_PROMPTS.get("fps")(config, CPU)(score_map(scores)).points_xy.tolist() == [[4, 3]]


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, 50), (1.0, 0)])
def test_thresholds_at_the_ends_of_the_scale(threshold: float, expected: int) -> None:
    scores = torch.full((20, 30), -9.0)
    generate = POINT_PROMPTS.get("random")(PointPromptsConfig(count=50, threshold=threshold), CPU)
    assert generate(score_map(scores)).num_points == expected


def test_grid_is_that_of_sams_automatic_masks() -> None:
    from segment_anything.utils.amg import build_point_grid

    scores = torch.zeros(90, 160)
    points = POINT_PROMPTS.get("grid")(PointPromptsConfig(grid_side=32), CPU)(score_map(scores)).points_xy
    np.testing.assert_allclose(points.numpy(), build_point_grid(32) * [160, 90], rtol=1e-6)


def test_grid_leaves_out_the_ignore_mask() -> None:
    ignore = torch.zeros(90, 160, dtype=torch.bool)
    ignore[:, 80:] = True
    points = POINT_PROMPTS.get("grid")(PointPromptsConfig(grid_side=8), CPU)(score_map(torch.zeros(90, 160)), ignore).points_xy
    assert len(points) == 32
    assert (points[:, 0] < 80).all()


def test_kmeans_points_are_the_candidates_nearest_to_the_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = torch.zeros((1000, 3900), dtype=torch.bool)
    # Far from the origin, where squares of coordinates leave single precision the fewest digits.
    candidates[900:990, 3700:3800] = torch.from_numpy(np.random.default_rng(0).random((90, 100)) < 0.3)
    centres = []

    def kmeans(*args: Any) -> Any:
        found = cv2_kmeans(*args)
        centres.append(found[2].astype(np.float64))
        return found

    cv2_kmeans = cv2.kmeans
    monkeypatch.setattr(cv2, "kmeans", kmeans)
    points = kmeans_points(candidates, 200, seed=0).numpy()
    yx = np.argwhere(candidates.numpy())
    least = np.array([((yx[:, ::-1] - centre) ** 2).sum(axis=1).min() for centre in centres[0]])
    taken = np.array([((points - centre) ** 2).sum(axis=1).min() for centre in centres[0]])
    np.testing.assert_allclose(taken, least, atol=1e-3)


def test_kmeans_finds_separate_clusters() -> None:
    candidates = torch.zeros(300, 400, dtype=torch.bool)
    for y, x in ((20, 30), (250, 350), (40, 300)):
        candidates[y : y + 31, x : x + 31] = True
    points = kmeans_points(candidates, 3, seed=0)
    assert sorted(map(tuple, points.tolist())) == [(45, 35), (315, 55), (365, 265)]


def test_random_points_follow_their_seed() -> None:
    candidates = torch.ones(50, 50, dtype=torch.bool)
    assert torch.equal(random_points(candidates, 9, 1), random_points(candidates, 9, 1))
    assert not torch.equal(random_points(candidates, 9, 1), random_points(candidates, 9, 2))


def test_oracle_points_lie_deep_inside_each_object() -> None:
    labels = torch.zeros(40, 60, dtype=torch.int32)
    labels[5:16, 10:21] = 7
    labels[0:3, 50:53] = 3
    labels[20:40, 30] = 9
    points = oracle_points(labels)
    assert points[0].tolist() == [51, 1]
    assert points[1].tolist() == [15, 10]
    assert labels[points[:, 1].long(), points[:, 0].long()].tolist() == [3, 7, 9]
    assert oracle_points(torch.zeros(4, 4, dtype=torch.int32)).shape == (0, 2)


def test_oracle_points_name_what_they_cannot_use() -> None:
    with pytest.raises(InputError, match=r"\(2, 3, 4\) torch\.float32"):
        oracle_points(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("count", [1, 2, 50])
def test_kmeans_of_a_single_candidate_is_that_pixel(count: int) -> None:
    candidates = torch.zeros(20, 30, dtype=torch.bool)
    candidates[7, 11] = True
    assert kmeans_points(candidates, count, 0).tolist() == [[11.0, 7.0]]


def test_maps_need_not_lie_row_by_row() -> None:
    candidates = torch.from_numpy(blobs(3, 60, 90))
    across = candidates.T.contiguous().T
    assert not across.is_contiguous()
    assert torch.equal(_farthest_points_dense(across, 20), _farthest_points_dense(candidates, 20))
