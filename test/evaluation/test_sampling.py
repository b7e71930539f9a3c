from __future__ import annotations

import numpy as np

from ros2_ood_seg.evaluation.sampling import PointMatch, match_points, summarise


def test_points_and_objects_are_counted_once() -> None:
    truth = np.zeros((20, 40), np.int32)
    truth[2:8, 3:9] = 1
    truth[10:16, 20:26] = 2
    truth[0, 39] = 3
    truth[18:] = -1
    points = np.array([[3, 2], [8.9, 7.9], [30, 5], [39, 0], [5, 19]], np.float32)
    # Two on the first object, one beside, one on an object too small to be looked for, one on ignored area.
    assert match_points(points, truth) == PointMatch(right=3, wrong=1, found=1, missed=1)
    assert match_points(points, truth, min_region_px=1) == PointMatch(right=3, wrong=1, found=2, missed=1)


def test_no_points_miss_everything() -> None:
    truth = np.zeros((9, 9), np.int32)
    truth[:4] = 1
    assert match_points(np.zeros((0, 2), np.float32), truth) == PointMatch(0, 0, 0, 1)


def test_images_are_pooled() -> None:
    scores = summarise([PointMatch(3, 1, 2, 0), PointMatch(0, 4, 0, 1)])
    assert scores.precision == 3 / 8
    assert scores.recall == 2 / 3
    nothing = summarise([PointMatch(0, 0, 0, 0)])
    assert nothing.precision is None
    assert nothing.recall is None
