from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.clips import crop_window
from ros2_ood_seg.evaluation.events import Event, EventRule, Track, TrackLog, merge_events
from ros2_ood_seg.types import Instances

S = 1_000_000_000


def found(*rows: tuple[int, float]) -> Instances:
    """Instances with these tracks and scores; the box of track t begins at x = t."""
    rows = tuple(sorted(rows, key=lambda row: -row[1]))
    masks = torch.zeros((len(rows), 8, 40), dtype=torch.bool)
    for mask, (track, _) in zip(masks, rows, strict=True):
        mask[2:5, track : track + 4] = True
    scores = torch.tensor([score for _, score in rows])
    instances = Instances.from_masks(masks, scores, scores, scores)
    return Instances(**{**vars(instances), "track_ids": torch.tensor([track for track, _ in rows], dtype=torch.int64)})


def track(first_s: float) -> Track:
    return Track(1, round(first_s * S), 1, 0.9, 0, (0.0, 0.0, 1.0, 1.0))


def test_a_track_is_remembered_from_its_first_frame_and_at_its_best():
    log = TrackLog()
    log.add(10 * S, found((3, 0.2)))
    log.add(11 * S, found((3, 0.8), (5, 0.4)))
    log.add(12 * S, found((3, 0.6)))
    log.add(13 * S, found())
    first = log.tracks[3]
    assert (first.first_ns, first.frames, first.best_ns) == (10 * S, 3, 11 * S)
    assert first.best_score == pytest.approx(0.8)
    assert first.best_box_xyxy == (3.0, 2.0, 7.0, 5.0)
    assert log.tracks[5].frames == 1


def test_only_tracks_that_fit_the_rule_are_events():
    log = TrackLog()
    for second in range(3):
        log.add(second * S, found((1, 0.9), (2, 0.3), *([(4, 0.9)] if second == 2 else [])))
    events = log.events(EventRule(before_s=0.5, after_s=2.0, min_score=0.5, min_frames=3))
    assert [[t.track_id for t in event.tracks] for event in events] == [[1]]
    assert (events[0].start_ns, events[0].stop_ns) == (-S // 2, 2 * S)
    assert [len(event.tracks) for event in log.events(EventRule(0.5, 2.0, 0.0, 1))] == [3]


def test_a_track_that_just_fits_the_rule_is_an_event():
    log = TrackLog()
    for second in range(3):
        log.add(second * S, found((1, 0.5), (2, 0.4999)))
    assert [[t.track_id for t in event.tracks] for event in log.events(EventRule())] == [[1]]
    assert log.events(EventRule(min_frames=4)) == []


def test_a_track_is_summed_up_in_seconds_since_the_drive_began():
    log = TrackLog()
    log.add(12 * S, found((3, 0.25)))
    log.add(15 * S + S // 2, found((3, 0.75)))
    assert log.tracks[3].summary(10 * S) == {
        "track_id": 3,
        "first_s": 2.0,
        "frames": 2,
        "best_score": 0.75,
        "best_s": 5.5,
        "best_box_xyxy": [3.0, 2.0, 7.0, 5.0],
    }


def test_instances_without_a_track_are_no_events():
    log = TrackLog()
    log.add(0, found((0, 0.9)))
    assert log.events(EventRule(min_frames=1)) == []
    log.add(S, found((0, 0.9), (7, 0.8)))
    assert list(log.tracks) == [7]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10)), max_size=12))
def test_merged_events_are_apart_and_cover_just_what_the_single_ones_cover(spans):
    events = [Event(start, start + length, (track(start),)) for start, length in spans]
    merged = merge_events(events)
    assert all(a.stop_ns < b.start_ns for a, b in pairwise(merged))
    covered = {t for e in events for t in range(e.start_ns, e.stop_ns + 1)}
    assert covered == {t for e in merged for t in range(e.start_ns, e.stop_ns + 1)}
    assert sum(len(e.tracks) for e in merged) == len(events)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"before_s": -1.0}, "--clip-before is -1, allowed: 0 to 600"),
        ({"after_s": 601.0}, "--clip-after is 601"),
        ({"min_score": 1.5}, "--clip-min-score is 1.5, allowed: 0 to 1"),
        ({"min_frames": 0}, "--clip-min-frames is 0, allowed: 1 to"),
        ({"after_s": float("nan")}, "--clip-after is nan"),
    ],
)
def test_rules_out_of_range_are_named(values, message):
    with pytest.raises(InputError, match=message):
        EventRule(**values)


@given(
    height=st.integers(16, 400),
    width=st.integers(16, 400),
    corners=st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4),
)
def test_a_crop_lies_in_the_image_holds_its_box_and_keeps_the_proportions(height, width, corners):
    x_min, x_max = sorted(corner * width for corner in corners[:2])
    y_min, y_max = sorted(corner * height for corner in corners[2:])
    top, left, rows, columns = crop_window((x_min, y_min, x_max, y_max), (height, width))
    assert 0 <= top <= top + rows <= height
    assert 0 <= left <= left + columns <= width
    assert abs(rows / height - columns / width) <= 1.0 / min(height, width)
    # Whole pixels: half of one may be cut at each side.
    assert left <= x_min + 1
    assert top <= y_min + 1
    assert x_max - 1 <= left + columns
    assert y_max - 1 <= top + rows
