from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.training.outlier_exposure import (
    IGNORE,
    Cutout,
    OutlierExposure,
    PasteSettings,
    RoadImage,
    RoadSample,
    contact_sheet,
    is_held_out,
    procedural_cutout,
    read_camvid,
    read_cityscapes,
    read_coco,
    read_coco_panoptic,
    read_idd_lite,
    read_mask_folder,
    read_road_folder,
    tight_boxes_xyxy,
)
from ros2_ood_seg.training.scorer import ScorerData

SMALL = PasteSettings(crop_hw=(64, 96), frame_width_px=(100, 300), object_px=(6, 60))


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def dataset(data_dir: Path) -> OutlierExposure:
    roads = [read_camvid(data_dir / "camvid", "train"), read_road_folder(data_dir / "roads")]
    return OutlierExposure(roads, read_coco(data_dir / "coco"), SMALL, seed=3, length=40)


def test_tight_boxes_are_xyxy_with_exclusive_maximum() -> None:
    # Wide image, object off the diagonal: swapped axes or an inclusive maximum give other numbers.
    instances = np.zeros((30, 100), np.int32)
    instances[4:9, 70:93] = 1
    instances[20:22, 3:5] = 2
    assert tight_boxes_xyxy(instances).tolist() == [[70, 4, 93, 9], [3, 20, 5, 22]]
    assert tight_boxes_xyxy(np.zeros((3, 3), np.int32)).shape == (0, 4)


def test_pasted_box_is_where_the_object_is(data_dir: Path) -> None:
    flat = replace(SMALL, augment=False, feather=0, harmonise=0, shadow=0, procedural=0, known_per_image=(0, 0), objects_per_image=(1, 1))
    cutouts = [c for c in read_coco(data_dir / "coco") if c.is_anomaly]
    dataset = OutlierExposure([read_road_folder(data_dir / "roads")], cutouts, flat, seed=0, length=30)
    seen = 0
    for k in range(30):
        sample = dataset[k]
        for x0, y0, x1, y1 in sample.boxes_xyxy.astype(int):
            # The cut-out is the only red thing on a grey road.
            red = (sample.image[..., 0] > 180) & (sample.image[..., 2] < 60)
            ys, xs = np.nonzero(red)
            assert abs(xs.min() - x0) <= 2
            assert abs(ys.min() - y0) <= 2
            assert abs(xs.max() + 1 - x1) <= 2
            assert abs(ys.max() + 1 - y1) <= 2
            seen += 1
    assert seen > 20


def test_labels_agree_with_each_other(dataset: OutlierExposure) -> None:
    for k in range(len(dataset)):
        sample = dataset[k]
        assert sample.image.shape == (64, 96, 3)
        assert sample.image.dtype == np.uint8
        assert np.array_equal(sample.anomaly == 1, sample.instances > 0)
        assert np.all(sample.semantic[sample.anomaly == 1] == IGNORE)
        assert set(np.unique(sample.semantic)) <= {*range(7), IGNORE}
        assert np.array_equal(np.unique(sample.instances[sample.instances > 0]), np.arange(1, len(sample.boxes_xyxy) + 1))
        assert np.array_equal(sample.boxes_xyxy, tight_boxes_xyxy(sample.instances))
        assert np.all(sample.boxes_xyxy[:, 2:] > sample.boxes_xyxy[:, :2])


def same(a: RoadSample, b: RoadSample) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in RoadSample.__dataclass_fields__)


def test_samples_depend_on_seed_and_index_only(dataset: OutlierExposure, data_dir: Path) -> None:
    direct = [dataset[k] for k in (5, 3, 5)]
    assert same(direct[0], direct[2])
    assert not same(direct[0], direct[1])
    loaded = list(DataLoader(dataset, batch_size=None, sampler=[3, 5], num_workers=2, collate_fn=lambda sample: sample))
    assert same(loaded[0], direct[1])
    assert same(loaded[1], direct[0])
    other = OutlierExposure(dataset.roads, [*dataset.anomalies, *dataset.known], SMALL, seed=4, length=40)
    assert not same(other[5], direct[0])


def test_known_objects_are_normal_and_keep_their_class(data_dir: Path) -> None:
    people = [c for c in read_coco(data_dir / "coco") if not c.is_anomaly]
    only_known = replace(SMALL, objects_per_image=(0, 0), known_per_image=(2, 2), on_road=1.0)
    dataset = OutlierExposure([read_camvid(data_dir / "camvid", "train")], people, only_known, seed=0, length=10)
    samples = [dataset[k] for k in range(10)]
    assert not any(s.anomaly.any() for s in samples)
    assert sum(np.count_nonzero(s.semantic == 2) for s in samples) > 100


def test_published_recipe_pastes_one_whole_object(tmp_path: Path) -> None:
    write(tmp_path / "roads/grey.png", np.full((720, 1000, 3), 90, np.uint8))
    for name in ("images", "masks"):
        write(tmp_path / f"things/{name}/red.png", np.full((600, 500, 3 if name == "images" else 1), 255, np.uint8))
    published = replace(PasteSettings.published(), crop_hw=(160, 240), frame_width_px=(1000.0, 1000.0))
    roads, cutouts = [read_road_folder(tmp_path / "roads")], read_mask_folder(tmp_path / "things")
    samples = [OutlierExposure(roads, cutouts, published, 0, 60)[k] for k in range(60)]
    boxes = np.concatenate([sample.boxes_xyxy for sample in samples])
    # Every sample holds the whole object, at one of the published scales, or as much of it as the sample can hold.
    assert len(boxes) == 60
    sizes = {(int(x1 - x0), int(y1 - y0)) for x0, y0, x1, y1 in boxes}
    assert sizes == {(125, 150), (240, 160), (50, 60), (62, 75)}
    assert (boxes[:, 0].min(), boxes[:, 2].max()) == (0, 240)
    assert all(np.array_equal(sample.anomaly == 1, (sample.image == 255).all(axis=2)) for sample in samples)


def test_published_frames_are_mirrored_in_half_of_the_samples(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 250, dtype=np.uint8)[None, :, None], (180, 1, 3))
    write(tmp_path / "roads/ramp.png", ramp)
    bare = replace(PasteSettings.published(), crop_hw=(180, 250), frame_width_px=(250.0, 250.0), objects_per_image=(0, 0))
    samples = [OutlierExposure([read_road_folder(tmp_path / "roads")], [], bare, 0, 40)[k].image for k in range(40)]
    mirrored = [np.array_equal(sample, ramp[:, ::-1]) for sample in samples]
    assert 10 <= sum(mirrored) <= 30
    assert all(is_mirrored or np.array_equal(sample, ramp) for is_mirrored, sample in zip(mirrored, samples, strict=True))


def test_objects_take_over_the_blur_of_the_frame(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    checks = (np.indices((80, 80)).sum(axis=0) // 4 % 2 * 200 + 20).astype(np.uint8)
    scene = cv2.GaussianBlur(rng.integers(0, 255, (100, 160, 3), np.uint8), (0, 0), 3.0)
    write(tmp_path / "roads/soft.png", scene)
    write(tmp_path / "things/images/checks.png", np.dstack([checks] * 3))
    write(tmp_path / "things/masks/checks.png", np.full((80, 80), 255, np.uint8))
    roads, cutouts = [read_road_folder(tmp_path / "roads")], read_mask_folder(tmp_path / "things")
    base = replace(PasteSettings.published(), crop_hw=(100, 160), frame_width_px=(160.0, 160.0), object_scales=(1.0,), mirror=0.0)
    (sharp,), (soft,) = ([OutlierExposure(roads, cutouts, replace(base, blur=blur), 1, 1)[0]] for blur in (0.0, 1.0))
    assert np.array_equal(sharp.boxes_xyxy, soft.boxes_xyxy)
    x0, y0, x1, y1 = sharp.boxes_xyxy[0].astype(int)
    steps = [np.abs(np.diff(s.image[y0:y1, x0:x1, 0].astype(int), axis=1)).max() for s in (sharp, soft)]
    assert steps[0] == 200
    assert steps[1] < 120


def test_soft_frames_get_detail_before_anything_is_pasted(tmp_path: Path) -> None:
    step = np.full((60, 80, 3), 60, np.uint8)
    step[:, 40:] = 180
    write(tmp_path / "roads/step.png", step)
    plain = PasteSettings(
        crop_hw=(64, 96), frame_width_px=(320, 320), objects_per_image=(0, 0), known_per_image=(0, 0), procedural=1.0,
        native=0.0, illumination=0.0, mirror=0.0, augment=False,
    )  # fmt: skip
    roads = [read_road_folder(tmp_path / "roads")]
    soft, sharp = (OutlierExposure(roads, [], replace(plain, detail=chance), 0, 12) for chance in (0.0, 1.0))
    energy = [
        sum(float(cv2.Laplacian(sample.image, cv2.CV_32F).std()) for sample in map(data.__getitem__, range(12))) for data in (soft, sharp)
    ]
    assert energy[1] > 3 * energy[0]
    assert not any(sharp[k].anomaly.any() for k in range(12))
    again = OutlierExposure(roads, [], replace(plain, detail=1.0), 0, 12)
    assert all(np.array_equal(sharp[k].image, again[k].image) for k in range(12))
    # Nothing to add where no pixels are missing.
    own = replace(plain, frame_width_px=(80, 80), crop_hw=(32, 48), detail=1.0)
    assert set(np.unique(OutlierExposure(roads, [], own, 0, 4)[0].image)) <= {60, 180}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
def test_whole_pictures_leave_out_known_classes_and_small_ones(tmp_path: Path) -> None:
    square = [[10, 10, 60, 10, 60, 60, 10, 60]]
    shifted = [[40, 40, 90, 40, 90, 90, 40, 90]]
    crowd = {"size": [500, 640], "counts": [0, 500 * 5, 500 * 635]}
    item = {"area": 2500, "iscrowd": 0}
    tree = {
        "images": [{"id": k, "file_name": f"{k}.png", "height": 500 if k != 2 else 400, "width": 640} for k in range(3)],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bench"}, {"id": 3, "name": "zebra"}, {"id": 4, "name": "train"}],
        "annotations": [
            {**item, "image_id": 0, "category_id": 2, "segmentation": square},
            {**item, "image_id": 0, "category_id": 3, "segmentation": shifted},
            {**item, "image_id": 0, "category_id": 4, "iscrowd": 1, "segmentation": crowd},
            {**item, "image_id": 1, "category_id": 3, "segmentation": square},
            {**item, "image_id": 1, "category_id": 1, "segmentation": shifted},
            {**item, "image_id": 2, "category_id": 3, "segmentation": square},
        ],
    }
    for entry in tree["images"]:
        write(tmp_path / "train2017" / entry["file_name"], np.zeros((entry["height"], 640, 3), np.uint8))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(tree))
    (cutout,) = read_coco(tmp_path, whole_pictures=True)
    assert cutout.group == "coco/0"
    mask = cutout.mask_in((500, 640))
    # Overlapping objects unite, and the crowd's columns 0 to 4 belong to them.
    assert [mask[r, c] for r, c in ((50, 50), (20, 20), (80, 80), (20, 80), (499, 4), (499, 5))] == [255, 255, 255, 0, 255, 0]
    with pytest.raises(InputError, match="is for 640x500 px, it has 100x100"):
        cutout.mask_in((100, 100))


def test_published_layouts_of_camvid_and_idd(data_dir: Path, tmp_path: Path) -> None:
    for kind, folder in (("images", "train"), ("labels", "trainannot")):
        shutil.copytree(data_dir / "camvid/train" / kind, tmp_path / "camvid" / folder)
    assert [r.image.name for r in read_camvid(tmp_path / "camvid", "train")] == [f"{k}.png" for k in range(4)]
    image = np.zeros((2, 6, 3), np.uint8)
    labels = {
        "lite": ("_image.jpg", "_label.png", (0, 1, 2, 3, 6, 255)),
        "level3": ("_leftImg8bit.png", "_gtFine_labellevel3Ids.png", (1, 3, 5, 12, 25, 255)),
        "ids": ("_leftImg8bit.jpg", "_gtFine_labelids.png", (2, 5, 7, 18, 34, 39)),
    }
    for name, (picture_end, label_end, values) in labels.items():
        root = tmp_path / name
        write(root / f"leftImg8bit/train/7/frame{picture_end}", image)
        write(root / f"gtFine/train/7/frame{label_end}", np.array([values] * 2, np.uint8))
        (road,) = read_idd_lite(root, "train")
        assert road.read()[1][0].tolist() == [0, 1, 2, 3, 6, IGNORE]
    (tmp_path / "ids/gtFine/train/7/frame_gtFine_labelids.png").unlink()
    with pytest.raises(InputError, match="has no label"):
        read_idd_lite(tmp_path / "ids", "train")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(16, 200))
def test_procedural_cutouts_fill_their_size(seed: int, size: int) -> None:
    rgba = procedural_cutout(np.random.default_rng(seed), size)
    assert rgba.shape == (size, size, 4)
    assert 0.05 < np.mean(rgba[..., 3] > 0) <= 1
    assert np.ptp(np.nonzero(rgba[..., 3])[0]) >= 0.9 * size


def test_camvid_and_cityscapes_map_to_the_common_classes(data_dir: Path) -> None:
    _, semantic = read_camvid(data_dir / "camvid", "train")[0].read()
    assert semantic[0, 0] == 6
    assert semantic[60, 60] == 0
    assert semantic[85, 5] == IGNORE
    _, semantic = read_cityscapes(data_dir / "cityscapes", "val")[0].read()
    assert semantic[0, 0] == 6
    assert semantic[60, 60] == 0


def test_coco_roles(data_dir: Path) -> None:
    cutouts = read_coco(data_dir / "coco")
    # Crowds, tiny objects and benches (ambiguous) are left out; people are known, zebras are anomalies.
    assert len(cutouts) == 48
    assert sorted({c.semantic for c in cutouts}) == [2, IGNORE]
    rgba = cutouts[0].read()
    assert abs(rgba.shape[0] - 40) <= 1
    assert abs(rgba.shape[1] - 40) <= 1
    assert rgba[20, 20].tolist() == [255, 0, 0, 255]


def test_panoptic_masks_are_exact(data_dir: Path) -> None:
    (cutout,) = read_coco_panoptic(data_dir / "coco_panoptic")
    assert cutout.is_anomaly
    assert cutout.read().shape == (40, 40, 4)


def test_mask_folder_keeps_what_it_is_told(data_dir: Path) -> None:
    cutouts = read_mask_folder(data_dir / "grabcut", keep=lambda name: name == "doll")
    assert [c.group for c in cutouts] == ["grabcut/doll"]
    # The ignore value 128 is not part of the object.
    assert cutouts[0].read().shape == (30, 40, 4)


def test_contact_sheet_has_all_samples(dataset: OutlierExposure) -> None:
    assert contact_sheet([dataset[k] for k in range(5)], columns=4).shape == (128, 384, 3)
    with pytest.raises(InputError, match="at least one sample"):
        contact_sheet([])


def test_split_is_stable_and_near_its_share() -> None:
    held = [is_held_out(f"coco/{k:06d}", 0.25) for k in range(2000)]
    assert 0.2 < np.mean(held) < 0.3
    assert is_held_out("coco/000001", 0.25) == held[1]


def spoil(path: Path, value: int) -> None:
    """Gives one pixel of a label or mask another value."""
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    label[30, 30] = value
    write(path, label)


@pytest.mark.parametrize(
    ("damage", "read", "message"),
    [
        (lambda d: (d / "camvid/train/labels/1.png").unlink(), lambda d: read_camvid(d / "camvid", "train"), "image without label"),
        (lambda d: (d / "camvid/train/images/1.png").unlink(), lambda d: read_camvid(d / "camvid", "train"), "label without image"),
        (lambda d: None, lambda d: read_idd_lite(d / "camvid", "train"), r"values \[11\] outside its layout"),
        (lambda d: None, lambda d: read_camvid(d / "camvid", "test"), "does not exist"),
        (lambda d: None, lambda d: read_road_folder(d / "coco"), "holds no pictures"),
        (lambda d: None, lambda d: read_cityscapes(d / "camvid", "train"), "no Cityscapes images"),
        (lambda d: (d / "grabcut/masks/doll.png").unlink(), lambda d: read_mask_folder(d / "grabcut"), "has no mask"),
        (lambda d: (d / "grabcut/images/doll.png").unlink(), lambda d: read_mask_folder(d / "grabcut"), "matches no image"),
        (lambda d: spoil(d / "camvid/train/labels/2.png", 77), lambda d: read_camvid(d / "camvid", "train"), r"2.png' holds values \[77\]"),
        (
            lambda d: spoil(d / "cityscapes/gtFine/train/ulm/ulm_1_gtFine_labelIds.png", 60),
            lambda d: read_cityscapes(d / "cityscapes", "train"),
            r"holds values \[60\]",
        ),
        (
            lambda d: (d / "cityscapes/gtFine/train/ulm/ulm_1_gtFine_labelIds.png").unlink(),
            lambda d: read_cityscapes(d / "cityscapes", "train"),
            "has no label",
        ),
        (lambda d: spoil(d / "grabcut/masks/doll.png", 1), lambda d: read_mask_folder(d / "grabcut"), r"doll.png' holds values \[1\]"),
        (lambda d: None, lambda d: read_coco(d / "camvid"), "not in the COCO layout"),
        (lambda d: None, lambda d: read_mask_folder(d / "camvid"), "images' does not exist"),
        (lambda d: (d / "coco_panoptic/panoptic/0.png").unlink(), lambda d: read_coco_panoptic(d / "coco_panoptic"), "does not exist"),
        (lambda d: (d / "coco/images/3.png").unlink(), lambda d: read_coco(d / "coco"), "does not exist"),
        (lambda d: (d / "coco/instances.json").write_text("{"), lambda d: read_coco(d / "coco"), "cannot be read"),
        (lambda d: (d / "coco/instances.json").write_text("[]"), lambda d: read_coco(d / "coco"), "COCO instances layout"),
        (
            lambda d: (d / "coco_panoptic/panoptic.json").write_text("{}"),
            lambda d: read_coco_panoptic(d / "coco_panoptic"),
            "panoptic layout",
        ),
    ],
)
def test_wrong_data_is_refused_before_training(data_dir: Path, tmp_path: Path, damage, read, message: str) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data_dir, copy)
    damage(copy)
    with pytest.raises(InputError, match=message):
        read(copy)


def test_label_of_another_size_or_unreadable_picture_is_refused(data_dir: Path, tmp_path: Path) -> None:
    road = read_camvid(data_dir / "camvid", "train")[0]
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((9, 12), np.uint8))
    with pytest.raises(InputError, match="12x9, its image is 120x90"):
        RoadImage(road.image, tmp_path / "small.png", road.classes).read()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        RoadImage(tmp_path / "broken.png", None, {}).read()
    with pytest.raises(InputError, match="is empty"):
        Cutout(road.image, "x", polygons=(np.zeros((3, 2), np.float32) - 50,)).read()


def test_settings_and_missing_data_are_refused(data_dir: Path) -> None:
    with pytest.raises(InputError, match=r"'shadow' is 1\.5"):
        PasteSettings(shadow=1.5)
    with pytest.raises(InputError, match="'object_px' is"):
        PasteSettings(object_px=(9.0, 3.0))
    roads = [read_road_folder(data_dir / "roads")]
    with pytest.raises(InputError, match="at least one road image"):
        OutlierExposure([[]], [], SMALL, 0, 1)
    with pytest.raises(InputError, match=r"does not know, got none.*--coco, --coco-panoptic or --objects"):
        OutlierExposure(roads, [], SMALL, 0, 1)
    with pytest.raises(InputError, match="one weight per source"):
        OutlierExposure(roads, [], replace(SMALL, procedural=1.0), 0, 1, weights=[1, 2])


def test_real_data_sets_are_read(shared_dir: Path) -> None:
    data = shared_dir / "data"
    assert len(read_camvid(data / "camvid", "train")) == 367
    assert len(read_idd_lite(data / "idd_lite", "val")) == 204
    objects = read_coco(data / "objects" / "coco")
    names = {c["id"]: c["name"] for c in json.loads((data / "objects/coco/instances.json").read_text())["categories"]}
    assert {"person", "zebra"} <= set(names.values())
    assert {c.semantic for c in objects} == {2, 3, 4, IGNORE}


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"\xff\xd8 half of it", "is cut short")])
def test_one_broken_picture_among_many_is_found_before_training(tmp_path: Path, content: bytes, words: str) -> None:
    for k in range(40):
        write(tmp_path / f"{k:02d}.jpg", np.zeros((40, 60, 3), np.uint8))
    assert len(read_road_folder(tmp_path)) == 40
    (tmp_path / "06.jpg").write_bytes(content)
    with pytest.raises(InputError, match=rf"06\.jpg' {words}"):
        read_road_folder(tmp_path)


def test_too_few_pictures_to_hold_some_out_are_named(tmp_path: Path) -> None:
    name = next(f"{k}.jpg" for k in range(100) if not is_held_out(str(k), 0.25))
    write(tmp_path / "roads" / name, np.zeros((40, 60, 3), np.uint8))
    with pytest.raises(InputError, match="has no pictures to hold out, 25% are held out by name: give it more"):
        ScorerData(roads=(tmp_path / "roads",)).read(held_out=True)
