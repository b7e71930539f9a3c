from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.segmenters.compact import View
from ros2_ood_seg.segmenters.windows import Window
from ros2_ood_seg.training import segmenter_data
from ros2_ood_seg.training.cutouts import read_coco
from ros2_ood_seg.training.road_images import is_held_out
from ros2_ood_seg.training.segmenter_data import (
    SampleMaker,
    SegmentedObject,
    cover,
    jitter_box,
    load_backgrounds,
    load_labelled,
    load_objects,
    paste,
    random_point,
    rescale,
    tight_object,
    warp,
)


def shape_object(seed: int, height: int = 120, width: int = 160, source: str = "shapes") -> SegmentedObject:
    """A coloured ellipse on noise."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 90, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    centre = (int(rng.integers(50, width - 50)), int(rng.integers(40, height - 40)))
    cv2.ellipse(mask, centre, (int(rng.integers(12, 40)), int(rng.integers(12, 30))), float(rng.uniform(0, 180)), 0, 360, 255, -1)
    image[mask == 255] = rng.integers(150, 256, 3)
    item = tight_object(image, mask, source, f"{source}/{seed}")
    assert item is not None
    return item


def write_mask_folder(root: Path, names: list[str]) -> None:
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for index, name in enumerate(names):
        item = shape_object(index)
        cv2.imwrite(str(root / "images" / f"{name}.jpg"), item.image)
        cv2.imwrite(str(root / "masks" / f"{name}.png"), item.full_mask())


def test_tight_objects_give_their_mask_back() -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[5:9, 7:20] = 255
    mask[6, 10] = 128
    item = tight_object(np.zeros((30, 40, 3), np.uint8), mask, "a", "b")
    assert item is not None
    assert item.box_xyxy == (7, 5, 20, 9)
    np.testing.assert_array_equal(item.full_mask(), mask)
    assert tight_object(item.image, np.zeros_like(mask), "a", "b") is None


def test_pictures_of_pascal_voc_are_left_out_and_groups_never_mix(tmp_path: Path) -> None:
    voc = ["person_2007_000170", "bike_2008_000782"]
    write_mask_folder(tmp_path / "grabcut", [f"thing{k}" for k in range(40)] + voc)
    trained, held_out = (load_objects(tmp_path, held_out=flag) for flag in (False, True))
    groups = [{item.group for item in part} for part in (trained, held_out)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {f"thing{k}" for k in range(40)}
    assert len(groups[0]) > len(groups[1]) > 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
def test_coco_polygons_and_panoptic_segments(tmp_path: Path) -> None:
    square = [10, 10, 50, 10, 50, 40, 10, 40]
    pictures = [{"id": k, "file_name": f"{k}.jpg"} for k in range(30)]
    for name in ("coco", "coco_panoptic"):
        (tmp_path / name / "images").mkdir(parents=True)
        for picture in pictures:
            cv2.imwrite(str(tmp_path / name / "images" / str(picture["file_name"])), np.full((60, 80, 3), 99, np.uint8))
    shapes = [{"image_id": k, "iscrowd": 0, "segmentation": [square]} for k in range(30)]
    crowd = {"image_id": 0, "iscrowd": 1, "segmentation": {"counts": [], "size": [60, 80]}}
    (tmp_path / "coco/instances.json").write_text(json.dumps({"images": pictures, "annotations": [*shapes, crowd]}))
    (tmp_path / "coco_panoptic/panoptic").mkdir()
    ids = np.zeros((60, 80, 3), np.uint8)
    ids[10:40, 10:50] = (0, 1, 2)  # BGR: id = 2 + 256
    ids[40:] = (0, 0, 7)
    # Not every tool says what is no crowd.
    segments = [{"id": 258, "category_id": 1}, {"id": 7, "category_id": 2, "iscrowd": 0}]
    for picture in pictures:
        cv2.imwrite(str(tmp_path / f"coco_panoptic/panoptic/{picture['id']}.png"), ids)
    entries = [{"image_id": k, "file_name": f"{k}.png", "segments_info": segments} for k in range(30)]
    categories = [{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}]
    (tmp_path / "coco_panoptic/panoptic.json").write_text(
        json.dumps({"images": pictures, "annotations": entries, "categories": categories})
    )
    items = load_objects(tmp_path, held_out=False) + load_objects(tmp_path, held_out=True)
    assert sorted(item.source for item in items) == ["coco"] * 30 + ["coco_panoptic"] * 30
    for item in items:
        assert np.abs(np.array(item.box_xyxy) - (10, 10, 50, 40)).max() <= 1
    cv2.imwrite(str(tmp_path / "coco_panoptic/panoptic/4.png"), ids[:50])
    with pytest.raises(InputError, match=r"4.png' is 80x50, its image is 80x60"):
        load_objects(tmp_path, held_out=is_held_out("coco_panoptic/4.png", 0.125))


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no objects to learn from"):
        load_objects(tmp_path, held_out=False)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/instances.json").write_text("{")
    with pytest.raises(InputError, match=r"instances.json' cannot be read"):
        load_objects(tmp_path, held_out=False)
    (tmp_path / "coco/instances.json").write_text('{"annotations": []}')
    with pytest.raises(InputError, match=r"instances.json' is not in the COCO instances layout: KeyError"):
        load_objects(tmp_path, held_out=False)
    write_mask_folder(tmp_path / "mine", ["only"])
    with pytest.raises(InputError, match=r"300 px or more in '.*mine' are (held out|left to learn from)"):
        load_objects(tmp_path / "mine", held_out=not is_held_out("mine/only", 0.125))
    cv2.imwrite(str(tmp_path / "mine/masks/only.png"), np.full((7, 9), 255, np.uint8))
    with pytest.raises(InputError, match="differs in size"):
        load_objects(tmp_path / "mine", held_out=False)
    (tmp_path / "mine/images/only.jpg").unlink()
    write_mask_folder(tmp_path / "more", ["other"])
    (tmp_path / "more/images/other.jpg").rename(tmp_path / "mine/images/other.jpg")
    with pytest.raises(InputError, match=r"other.jpg' has no mask"):
        load_objects(tmp_path / "mine", held_out=False)
    with pytest.raises(InputError, match="does not exist"):
        load_backgrounds([tmp_path / "roads"], 3, 0)
    with pytest.raises(InputError, match="must hold folders images and labels"):
        load_labelled(tmp_path)


def test_a_folder_of_pictures_and_masks_is_enough(tmp_path: Path) -> None:
    write_mask_folder(tmp_path / "mine", [f"thing{k}" for k in range(20)])
    (tmp_path / "mine/images/thing0.jpg").rename(tmp_path / "mine/images/thing0.JPG")
    items = [item for held_out in (False, True) for item in load_objects(tmp_path / "mine", held_out=held_out)]
    assert {(item.source, item.group) for item in items} == {("mine", f"thing{k}") for k in range(20)}


def test_labelled_anomalies_become_one_object_each(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    label = np.zeros((60, 80), np.uint8)
    label[5:20, 5:20] = 1
    label[30:50, 40:70] = 1
    label[30:32, 40:70] = 255
    label[55, 1] = 1
    cv2.imwrite(str(tmp_path / "images/a.png"), np.zeros((60, 80, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "labels/a.png"), label)
    items = sorted(load_labelled(tmp_path), key=lambda item: item.x)
    assert [item.box_xyxy for item in items] == [(5, 5, 20, 20), (40, 32, 70, 50)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([32, 64]))
def test_samples_show_the_object_at_the_prompt(seed: int, size: int) -> None:
    roads = [np.full((100, 140, 3), 120, np.uint8)]
    batch = SampleMaker([shape_object(k) for k in range(4)], roads).batch(2, size, np.random.default_rng(seed))
    assert batch.crops.shape == (2, 5, size, size)
    assert batch.targets.shape == (2, 1, size, size)
    assert (batch.hidden >= 0).all()
    assert batch.crops[:, :3].abs().max() <= 1
    for crop, target in zip(batch.crops, batch.targets[:, 0], strict=True):
        assert target.max() > 0.5
        if crop[4].max() > 0.3:
            row, column = divmod(int(crop[4].argmax()), size)
            assert target[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].max() > 0.2
        if crop[3].max() > 0.5:
            covered = (crop[3] * target).sum() / target.sum()
            assert covered > 0.5


def test_windows_of_points_hold_from_a_part_of_the_object_to_a_speck() -> None:
    batch = SampleMaker([shape_object(k, 480, 640) for k in range(4)]).batch(200, 64, np.random.default_rng(0))
    points = [k for k, crop in enumerate(batch.crops) if crop[3].max() <= 0 < crop[4].max()]
    assert 50 <= len(points) <= 110
    shown = batch.targets[points].mean(dim=(1, 2, 3))
    assert (batch.hidden[points] > 2 * shown).sum() >= 5
    assert (shown < 0.01).sum() >= 5
    boxes = [k for k in range(200) if k not in points]
    assert (batch.hidden[boxes] < 0.2).all()


def test_samples_are_a_function_of_the_generator() -> None:
    maker = SampleMaker([shape_object(k) for k in range(4)], [np.full((100, 140, 3), 120, np.uint8)])
    first, second, other = (maker.batch(4, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.crops, second.crops)
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.crops, other.crops)


def test_jittered_boxes_move_outwards() -> None:
    outwards: NDArray[np.float64] = np.array([0.1, 0.2, -0.1, 0.0])
    assert jitter_box((10, 20, 30, 60), outwards) == pytest.approx((8, 12, 28, 60))


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_points_lie_on_the_object(seed: int, interior: float) -> None:
    item = shape_object(seed % 5)
    x, y = random_point(item, np.random.default_rng(seed), interior)
    assert item.full_mask()[int(y), int(x)] == 255


def test_rescaling_keeps_image_and_mask_together() -> None:
    item = shape_object(3)
    small = rescale(item, 0.5)
    assert small.image.shape == (60, 80, 3)
    assert np.array(small.box_xyxy) == pytest.approx(np.array(item.box_xyxy) / 2, abs=1.5)
    assert np.count_nonzero(small.mask == 255) == pytest.approx(np.count_nonzero(item.mask) / 4, rel=0.15)
    assert small.image[small.full_mask() == 255].mean() > 140


def test_pasting_covers_the_background_only_where_the_mask_says() -> None:
    road = np.full((100, 140, 3), 10, np.uint8)
    for seed in range(20):
        pasted = paste(shape_object(seed), road, np.random.default_rng(seed))
        far = cv2.dilate(pasted.full_mask(), np.ones((9, 9), np.uint8)) == 0
        assert (pasted.image[far] == 10).all()
        assert (road == 10).all()


def test_coco_run_lengths_and_objects_without_outline(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    mask = np.zeros((60, 80), np.uint8)
    mask[10:40, 20:50] = 1
    coded = coco_mask.encode(np.asfortranarray(mask))
    counts = [20 * 60 + 10, *([30, 30] * 29), 30, 60 * 80 - (20 * 60 + 10) - 29 * 60 - 30]
    shapes = [{"size": [60, 80], "counts": coded["counts"].decode()}, {"size": [60, 80], "counts": counts}, []]
    annotations = [{"image_id": k, "category_id": 1, "area": 900, "iscrowd": 0, "segmentation": shapes[k % 3]} for k in range(24)]
    for k in range(24):
        cv2.imwrite(str(tmp_path / "images" / f"{k}.png"), np.full((60, 80, 3), 90, np.uint8))
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(24)]
    tree = {"images": images, "categories": [{"id": 1, "name": "zebra"}], "annotations": annotations}
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    objects = [*load_objects(tmp_path, held_out=False), *load_objects(tmp_path, held_out=True)]
    assert len(objects) == 16
    assert {item.box_xyxy for item in objects} == {(20, 10, 50, 40)}
    cutouts = read_coco(tmp_path)
    assert len(cutouts) == 16
    assert all(cutout.read().shape == (30, 30, 4) for cutout in cutouts)


def test_labels_of_another_size_or_meaning_are_refused(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((60, 80, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), np.ones((30, 40), np.uint8))
    with pytest.raises(InputError, match="are 40x30 px, it is 80x60"):
        load_labelled(tmp_path)
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), np.full((60, 80), 7, np.uint8))
    with pytest.raises(InputError, match="label value 7"):
        load_labelled(tmp_path)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_warping_keeps_image_and_mask_together(seed: int) -> None:
    item = shape_object(seed)
    warped = warp(item, np.random.default_rng(seed))
    mask, inside = warped.full_mask(), warped.image.max(axis=2) > 140
    assert mask.shape == warped.image.shape[:2]
    # Away from the rim, where both are interpolated, the object and nothing else is that bright.
    core = cv2.erode((mask == 255).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert core.any()
    assert inside[core].all()
    around = cv2.dilate((mask >= 128).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert not inside[~around].any()
    # Turning and shearing keep the area, stretching by a natural logarithm of at most 0.25 a side changes it by at most 0.5.
    change = np.log(np.count_nonzero(mask == 255) / np.count_nonzero(item.mask == 255))
    assert abs(change) < 0.6


def axis_of(item: SegmentedObject) -> tuple[float, float]:
    """Direction of a bar in degrees from -90 to 90, and its length along it, px."""
    y, x = np.nonzero(item.full_mask() == 255)
    values, vectors = np.linalg.eigh(np.cov(x, y))
    angle = np.rad2deg(np.arctan2(vectors[1, 1], vectors[0, 1]))
    return (angle + 90) % 180 - 90, float(np.sqrt(12 * values[1]))


def test_warping_turns_shears_and_stretches_within_bounds() -> None:
    mask = np.zeros((200, 240), np.uint8)
    mask[90:98, 60:180] = 255
    lying = tight_object(np.zeros((200, 240, 3), np.uint8), mask, "a", "b")
    standing = tight_object(np.zeros((240, 200, 3), np.uint8), np.ascontiguousarray(mask.T), "a", "b")
    assert lying is not None
    assert standing is not None
    turns, shears, lengths = [], [], []
    for seed in range(24):
        # Shearing moves columns by rows, so that what lies is only turned.
        (turn, width), (other, _) = (axis_of(warp(item, np.random.default_rng(seed))) for item in (lying, standing))
        turns.append(turn)
        shears.append((other - turn) % 180 - 90)
        lengths.append(np.log(width / 120))
    for found, most in ((turns, 30.0), (shears, np.rad2deg(np.arctan(0.15))), (lengths, 0.25)):
        assert -1.03 * most < min(found) < -0.6 * most
        assert 0.6 * most < max(found) < 1.03 * most


def test_what_a_warped_image_cannot_show_is_the_grey_beyond_the_border() -> None:
    white = np.full((60, 90, 3), 255, np.uint8)
    mask = np.zeros((60, 90), np.uint8)
    mask[20:40, 30:60] = 255
    item = tight_object(white, mask, "a", "b")
    assert item is not None
    warped = warp(item, np.random.default_rng(3)).image
    assert {tuple(warped[0, 0]), tuple(warped[-1, -1])} == {(127, 127, 127)}
    # Nothing of the picture is cut off, and no more is added than turning takes: it touches all four borders.
    shown = cv2.boundingRect((warped[..., 0] > 190).astype(np.uint8))
    assert np.abs(np.array(shown) - (0, 0, warped.shape[1], warped.shape[0])).max() <= 2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_covering_hides_at_most_half_of_the_object(seed: int) -> None:
    item, other = shape_object(seed), shape_object(seed + 1)
    before = item.image.copy()
    covered = cover(item, other, np.random.default_rng(seed))
    assert np.array_equal(item.image, before)
    mask, whole = covered.full_mask() == 255, item.full_mask() == 255
    assert not (mask & ~whole).any()
    assert np.count_nonzero(mask) >= 0.5 * np.count_nonzero(whole)
    # Whatever is no longer object shows the other one, and what is object shows itself.
    changed = (covered.image != item.image).any(axis=2)
    assert changed[whole & ~mask].mean() > 0.9 if (whole & ~mask).any() else True
    core = cv2.erode(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    assert not changed[core].any()


def test_covering_changes_something_most_of_the_time() -> None:
    item, other = shape_object(1), shape_object(2)
    covered = [cover(item, other, np.random.default_rng(seed)) for seed in range(40)]
    assert sum(not np.array_equal(one.image, item.image) for one in covered) > 25
    assert sum(np.count_nonzero(one.mask == 255) < np.count_nonzero(item.mask == 255) for one in covered) > 8


def test_what_covers_is_as_large_as_it_should_be_and_stands_at_the_object() -> None:
    mask = np.zeros((300, 300), np.uint8)
    mask[130:160, 120:180] = 255
    item = tight_object(np.zeros((300, 300, 3), np.uint8), mask, "a", "b")
    other = tight_object(np.full((50, 50, 3), 250, np.uint8), np.pad(np.full((16, 32), 255, np.uint8), 9), "a", "c")
    assert item is not None
    assert other is not None
    sizes, centres = [], []
    for seed in range(80):
        covered = cover(item, other, np.random.default_rng(seed))
        x, y, width, height = cv2.boundingRect((covered.image[..., 0] > 125).astype(np.uint8))
        if width:
            assert height == pytest.approx(width / 2, abs=1.5)
            sizes.append(width / 60)
            centres.append(((x + width / 2 - 120) / 60, (y + height / 2 - 130) / 30))
            # Just what shows the other one is no longer the object.
            hidden = (item.full_mask() == 255) & (covered.full_mask() != 255)
            assert np.array_equal(hidden, (item.full_mask() == 255) & (covered.image[..., 0] > 125))
    assert 0.28 < min(sizes) < 0.4
    assert 1.2 < max(sizes) < 1.52
    assert np.abs(np.min(centres, axis=0) + 0.5).max() < 0.1
    assert np.abs(np.max(centres, axis=0) - 1.5).max() < 0.1


def test_at_the_border_there_is_the_part_of_what_covers_that_the_picture_holds() -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[:12, :14] = mask[-12:, -14:] = 255
    item = tight_object(np.zeros((40, 50, 3), np.uint8), mask, "a", "b")
    other = tight_object(np.full((20, 20, 3), 250, np.uint8), np.full((20, 20), 255, np.uint8), "a", "c")
    assert item is not None
    assert other is not None
    shown = [cover(item, other, np.random.default_rng(seed)).image[..., 0] > 125 for seed in range(60)]
    for side in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        assert sum(one[side].any() for one in shown) > 3


def test_shares_say_how_many_samples_are_warped_and_crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = [shape_object(seed) for seed in range(4)]
    calls: list[str] = []
    monkeypatch.setattr(segmenter_data, "warp", lambda item, rng: calls.append("warp") or item)
    monkeypatch.setattr(segmenter_data, "cover", lambda item, other, rng: calls.append("cover") or item)
    for warped, crowded in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.2, 0.7)):
        calls.clear()
        SampleMaker(objects, (), warped, crowded).batch(60, 32, np.random.default_rng(1))
        assert calls.count("warp") == pytest.approx(60 * warped, abs=9 * (0 < warped < 1))
        assert calls.count("cover") == pytest.approx(60 * crowded, abs=9 * (0 < crowded < 1))


def test_targets_and_hidden_areas_are_those_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[:20, :20] = 255
    item = tight_object(np.zeros((60, 80, 3), np.uint8), mask, "a", "b")
    assert item is not None
    monkeypatch.setattr(segmenter_data, "_shrink", lambda item, rng: item)
    # Half of it beyond the upper border and, of mirrored samples, half beyond the right one.
    monkeypatch.setattr(segmenter_data, "_view", lambda item, kind, rng: View(Window(item.x + 10, item.y - 10, 20, 20), item.box_xyxy))
    batch = SampleMaker([item]).batch(6, 20, np.random.default_rng(0))
    quarter = torch.zeros(20, 20)
    quarter[10:, :10] = 1
    assert torch.equal(batch.targets, quarter.expand(6, 1, 20, 20))
    assert batch.hidden.tolist() == [300 / 400] * 6


def test_shares_of_zero_keep_the_samples_and_shares_of_one_change_them() -> None:
    objects = [shape_object(seed) for seed in range(4)]
    plain, zero = (SampleMaker(objects, (), *shares).batch(6, 64, np.random.default_rng(1)) for shares in ((), (0.0, 0.0)))
    assert torch.equal(plain.crops, zero.crops)
    for shares in ((1.0, 0.0), (0.0, 1.0)):
        changed = SampleMaker(objects, (), *shares).batch(6, 64, np.random.default_rng(1))
        assert not torch.equal(plain.crops, changed.crops)
