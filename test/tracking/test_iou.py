from __future__ import annotations

import pytest
import torch

from ros2_ood_seg.config import TrackingConfig
from ros2_ood_seg.tracking.iou import IoUTracker
from ros2_ood_seg.types import Instances


def seen(*corners_xy: tuple[int, int], side: int = 10) -> Instances:
    """Squares by descending score."""
    masks = torch.zeros((len(corners_xy), 60, 100), dtype=torch.bool)
    for mask, (x, y) in zip(masks, corners_xy, strict=True):
        mask[y : y + side, x : x + side] = True
    scores = torch.linspace(0.9, 0.5, len(corners_xy))
    return Instances.from_masks(masks, scores, scores, scores)


def tracker(iou: float = 0.2, max_age: int = 2) -> IoUTracker:
    return IoUTracker(TrackingConfig(enabled=True, iou=iou, max_age=max_age))


def test_numbers_stay_with_their_objects_when_the_ranking_changes() -> None:
    track = tracker()
    assert track.update(seen((0, 0), (50, 30))).track_ids.tolist() == [1, 2]
    assert track.update(seen((52, 31), (3, 1))).track_ids.tolist() == [2, 1]
    assert track.update(seen((80, 0), (55, 33), (5, 2))).track_ids.tolist() == [3, 2, 1]


def test_only_the_numbers_change() -> None:
    instances = seen((0, 0), (50, 30))
    found = tracker().update(instances)
    assert found.track_ids.dtype == torch.int64
    assert torch.equal(found.masks, instances.masks)
    assert torch.equal(found.scores, instances.scores)
    assert tracker().update(seen()).track_ids.dtype == torch.int64


def test_a_track_survives_max_age_frames_unseen_and_no_more() -> None:
    track = tracker(max_age=2)
    track.update(seen((20, 20)))
    for _ in range(2):
        assert track.update(seen()).track_ids.tolist() == []
    assert track.update(seen((20, 20))).track_ids.tolist() == [1]
    for _ in range(3):
        track.update(seen())
    assert track.update(seen((20, 20))).track_ids.tolist() == [2]


def test_too_little_overlap_starts_a_new_track() -> None:
    track = tracker(iou=0.5)
    track.update(seen((20, 20)))
    assert track.update(seen((24, 20))).track_ids.tolist() == [2]
    # The first track is still there and matches its old place.
    assert track.update(seen((20, 20), (24, 20))).track_ids.tolist() == [1, 2]
    # Squares of 10 px that are 6 px apart share a quarter of what they cover.
    just_enough = tracker(iou=0.25)
    just_enough.update(seen((20, 20)))
    assert just_enough.update(seen((26, 20))).track_ids.tolist() == [1]


def test_assignment_is_the_best_one_together() -> None:
    track = tracker(iou=0.1)
    track.update(seen((20, 20), (26, 20)))
    # The square at 23 overlaps both tracks alike; taking the first for it would leave the one at 20 with nothing.
    assert track.update(seen((23, 20), (20, 20))).track_ids.tolist() == [2, 1]


def test_a_track_follows_its_object_however_far_it_goes() -> None:
    track = tracker(max_age=1)
    assert [track.update(seen((4 * k, 2 * k))).track_ids.tolist() for k in range(20)] == [[1]] * 20


def test_a_track_is_not_left_behind_where_its_object_was() -> None:
    track = tracker(iou=0.2)
    track.update(seen((20, 20)))
    assert track.update(seen((26, 20))).track_ids.tolist() == [1]
    assert track.update(seen((26, 20), (18, 20))).track_ids.tolist() == [1, 2]


def test_other_settings_count_from_the_next_frame_on() -> None:
    track = tracker(iou=0.2, max_age=5)
    assert track.update(seen((20, 20))).track_ids.tolist() == [1]
    track.configure(TrackingConfig(enabled=True, iou=0.9, max_age=5))
    assert track.update(seen((22, 20))).track_ids.tolist() == [2]
    track.configure(TrackingConfig(enabled=True, iou=0.2, max_age=5))
    assert track.update(seen((23, 20))).track_ids.tolist() == [2], "switched on as before, tracks stay"
    track.configure(TrackingConfig(enabled=False))
    track.configure(TrackingConfig(enabled=True, iou=0.2))
    assert track.update(seen((22, 20))).track_ids.tolist() == [3], "switched off, all tracks end, but no number is used again"


@pytest.mark.parametrize("corner_xy", [(16, 16), (16, 0), (0, 16), (23, 23)])
def test_boxes_apart_do_not_overlap(corner_xy: tuple[int, int]) -> None:
    track = tracker(iou=0.05)
    track.update(seen((0, 0)))
    assert track.update(seen(corner_xy)).track_ids.tolist() == [2]


def test_reset_starts_from_one() -> None:
    track = tracker()
    track.update(seen((0, 0), (50, 30)))
    track.reset()
    assert track.update(seen((50, 30))).track_ids.tolist() == [1]


def test_forget_ends_tracks_and_goes_on_counting() -> None:
    track = tracker()
    track.update(seen((0, 0), (50, 30)))
    track.forget()
    assert track.update(seen((50, 30))).track_ids.tolist() == [3]
