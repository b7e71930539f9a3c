from __future__ import annotations

import hashlib
import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.synthetic import CLASS_NAMES, DriveFrame, SyntheticDrive
from ros2_ood_seg.synthetic.drive import MIN_VISIBLE_FRACTION

DRIVABLE, VEHICLE, FAR, SKY, IGNORE = 0, 3, 5, 6, 255


def digest(frame: DriveFrame) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in (frame.image, frame.semantic, frame.anomaly, frame.instances))).hexdigest()


def assert_labels_agree(frame: DriveFrame) -> None:
    assert set(np.unique(frame.semantic)) <= {*range(len(CLASS_NAMES)), IGNORE}
    assert set(np.unique(frame.anomaly)) <= {0, 1, IGNORE}
    np.testing.assert_array_equal(frame.instances > 0, frame.anomaly == 1)
    np.testing.assert_array_equal(frame.semantic == IGNORE, frame.anomaly != 0)
    sizes = np.bincount(frame.instances.ravel())[1:]
    assert ((sizes == 0) | (sizes >= MIN_VISIBLE_FRACTION * frame.instances.size)).all()


@pytest.fixture(scope="module")
def drive() -> list[DriveFrame]:
    return list(SyntheticDrive(3, 180, 320, frames=6, fps=5.0))


def test_frames_have_the_stated_kinds_and_stamps(drive):
    assert len(drive) == 6
    for frame in drive:
        assert (frame.image.shape, frame.image.dtype) == ((180, 320, 3), np.uint8)
        assert (frame.semantic.dtype, frame.anomaly.dtype, frame.instances.dtype) == (np.uint8, np.uint8, np.uint16)
        assert frame.image.flags.c_contiguous
        assert_labels_agree(frame)
    assert np.diff([frame.stamp_ns for frame in drive]).tolist() == [200_000_000] * 5


def test_same_seed_same_bytes_other_seed_other_bytes():
    first = SyntheticDrive(11, 64, 96, frames=3)
    ahead = [digest(first.frame(k)) for k in (0, 1, 2)]
    again = SyntheticDrive(11, 64, 96, frames=3)
    assert [digest(again.frame(k)) for k in (2, 1, 0)] == ahead[::-1], "nor does the order matter they are drawn in"
    assert digest(SyntheticDrive(12, 64, 96, frames=3).frame(2)) != ahead[2]


@given(st.integers(0, 10_000), st.sampled_from([(64, 96), (97, 131), (120, 120), (90, 300)]))
@settings(max_examples=4, deadline=None)
def test_labels_agree_for_any_seed_and_size(seed, size):
    frame = SyntheticDrive(seed, *size, frames=4, fps=2.0).frame(3)
    assert frame.image.shape == (*size, 3)
    assert_labels_agree(frame)
    present = set(np.unique(frame.semantic))
    assert {DRIVABLE, FAR, SKY} <= present
    rows = np.arange(size[0])[:, None] * np.ones((1, size[1]))
    assert rows[frame.semantic == SKY].mean() < rows[frame.semantic == DRIVABLE].mean()


def test_objects_grow_as_they_come_closer(drive):
    """Similar triangles: seen whole in two frames, an object's height is inverse to its distance."""
    grown = 0
    for number in np.unique(np.concatenate([np.unique(frame.instances) for frame in drive]))[1:]:
        heights = []
        for frame in drive:
            rows = np.flatnonzero((frame.instances == number).any(axis=1))
            whole = rows.size and rows[0] > 0 and rows[-1] < frame.instances.shape[0] - 1
            heights.append(rows.size if whole else 0)
        seen = [h for h in heights if h > 12]
        assert all(later >= earlier - 2 for earlier, later in itertools.pairwise(seen)), (number, heights)
        grown += len(seen) > 1 and seen[-1] > 1.2 * seen[0]
    assert grown >= 1


def test_unknown_objects_look_different_from_the_road_around_them(drive):
    contrast = []
    for frame in drive:
        for number in np.unique(frame.instances)[1:]:
            mask = frame.instances == number
            if mask.sum() < 60:
                continue
            ring = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool) & (frame.semantic == DRIVABLE)
            if ring.sum() > 20:
                contrast.append(np.abs(frame.image[mask].mean(axis=0) - frame.image[ring].mean(axis=0)).max())
    assert len(contrast) >= 4
    assert np.median(contrast) > 10


def test_every_frame_shows_an_unknown_object_on_the_road(drive):
    for frame in drive:
        assert (frame.anomaly == 1).sum() > 50
        assert (frame.semantic == DRIVABLE).mean() > 0.15


def test_light_and_surroundings_can_be_chosen():
    day, dusk = (SyntheticDrive(5, 64, 96, 1, lighting=light, surroundings="rural").frame(0) for light in ("day", "dusk"))
    assert dusk.image.mean() < 0.9 * day.image.mean()
    np.testing.assert_array_equal(day.semantic, dusk.semantic)
    town = SyntheticDrive(5, 64, 96, 1, lighting="overcast", surroundings="urban")
    assert (town.lighting, town.surroundings) == ("overcast", "urban")
    assert (town.frame(0).semantic == VEHICLE).sum() > (day.semantic == VEHICLE).sum(), "cars are parked in town"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"height": 8}, "32 to 4096 px wide and high, got 960x8"),
        ({"height": 64, "width": 4000}, "at most 4 times as wide"),
        ({"frames": 0}, "1 or more frames"),
        ({"fps": 0.0}, "got 40 at 0"),
        ({"lighting": "night"}, "lighting 'night' is not known: use auto, day, overcast, dusk"),
        ({"surroundings": "sea"}, "surroundings 'sea' are not known: use auto, urban, rural"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        SyntheticDrive(**{"seed": 0, **arguments})


@pytest.mark.parametrize("index", [-1, 40])
def test_frames_outside_the_drive_are_refused(index):
    with pytest.raises(InputError, match=f"frame must be 0 to 39, got {index}"):
        SyntheticDrive(0).frame(index)
