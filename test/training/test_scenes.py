from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.training.outlier_exposure import IGNORE, OutlierExposure, PasteSettings
from ros2_ood_seg.training.scenes import UNCOUNTED, read_scenes
from ros2_ood_seg.training.scorer import ScorerData, collate

CATEGORIES = {1: "person", 2: "bench", 3: "zebra", 4: "car", 5: "bed"}


def rectangle(picture: int, category: int, x0: int, y0: int, x1: int, y1: int) -> dict[str, Any]:
    polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
    return {"image_id": picture, "category_id": category, "area": (x1 - x0) * (y1 - y0), "iscrowd": 0, "segmentation": [polygon]}


def crowd(picture: int, category: int, rows: int) -> dict[str, Any]:
    """The upper rows of a 60x80 picture; COCO's run lengths go down the columns, background first."""
    counts = [0, *([rows, 60 - rows] * 80)]
    return {
        "image_id": picture,
        "category_id": category,
        "area": rows * 80,
        "iscrowd": 1,
        "segmentation": {"counts": counts, "size": [60, 80]},
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    (root / "images").mkdir(parents=True)
    for k in range(4):
        cv2.imwrite(str(root / "images" / f"{k}.png"), np.full((60, 80, 3), 40 * k, np.uint8))
    annotations = [
        # The small person stands before the large zebra, though it comes first.
        *(rectangle(0, 1, 30, 20, 40, 40), rectangle(0, 3, 20, 10, 60, 50), rectangle(0, 2, 0, 50, 10, 60), crowd(0, 1, 5)),
        rectangle(1, 4, 10, 10, 50, 40),
        *(rectangle(2, 3, 10, 10, 50, 40), rectangle(2, 5, 0, 40, 80, 60)),
        rectangle(3, 1, 10, 10, 50, 40),
    ]
    write_tree(root / "instances.json", annotations)
    return root


def write_tree(path: Path, annotations: list[dict[str, Any]]) -> None:
    tree = {
        "images": [{"id": k, "file_name": f"{k}.png"} for k in range(4)],
        "categories": [{"id": k, "name": name} for k, name in CATEGORIES.items()],
        "annotations": annotations,
    }
    path.write_text(json.dumps(tree))


@pytest.fixture
def panoptic(tmp_path: Path) -> Path:
    root = tmp_path / "coco_panoptic"
    for folder in ("images", "panoptic"):
        (root / folder).mkdir(parents=True)
    cv2.imwrite(str(root / "images" / "0.png"), np.full((60, 80, 3), 128, np.uint8))
    ids = np.zeros((60, 80, 3), np.uint8)
    ids[:20, :, 2], ids[20:, :, 2], ids[30:50, 30:50, 2] = 1, 2, 3
    cv2.imwrite(str(root / "panoptic" / "0.png"), ids)
    names = {1: ("sky-other-merged", 0), 2: ("sea", 0), 3: ("bird", 1)}
    segments = [{"id": k, "category_id": k, "area": int((ids[..., 2] == k).sum())} for k in names]
    tree = {
        "images": [{"id": 0, "file_name": "0.png"}],
        "categories": [{"id": k, "name": name, "isthing": thing} for k, (name, thing) in names.items()],
        "annotations": [{"image_id": 0, "file_name": "0.png", "segments_info": segments}],
    }
    (root / "panoptic.json").write_text(json.dumps(tree))
    return root


def test_pictures_taken_outside_are_used(coco: Path) -> None:
    # The third shows a bed, the fourth nothing that says where it was taken.
    assert [scene.image.stem for scene in read_scenes(coco, None)] == ["0", "1"]


def test_labels_of_instances(coco: Path) -> None:
    image, semantic, instances = read_scenes(coco, None)[0].read()
    assert image.shape == (60, 80, 3)
    assert semantic[15, 25] == IGNORE
    assert instances[15, 25] > 0
    # A person is known, wherever it stands.
    assert semantic[30, 35] == 2
    assert instances[30, 35] == 0
    # A bench may be either, a crowd is not cut out exactly, and what is not annotated is normal.
    assert instances[55, 5] == instances[2, 70] == UNCOUNTED
    assert instances[55, 70] == 0
    assert semantic[55, 70] == IGNORE


def test_vehicles_have_a_class_but_are_neither_normal_nor_anomalous(coco: Path) -> None:
    _, semantic, instances = read_scenes(coco, None)[1].read()
    assert semantic[20, 20] == 3
    assert instances[20, 20] == UNCOUNTED
    assert instances[5, 5] == 0


def test_labels_of_panoptic_masks(panoptic: Path) -> None:
    _, semantic, instances = read_scenes(None, panoptic)[0].read()
    assert semantic[5, 5] == 6
    # The sea is background, though of no class.
    assert semantic[55, 5] == IGNORE
    assert instances[5, 5] == instances[55, 5] == 0
    assert (instances > 0).sum() == 400
    assert instances[40, 40] > 0


def test_samples_hold_what_the_picture_holds(coco: Path, panoptic: Path) -> None:
    plain = PasteSettings(crop_hw=(64, 96), scene_width_px=(90, 200), objects_per_image=(0, 0), known_per_image=(0, 0), illumination=0)
    for settings in (plain, replace(plain, native=1.0), replace(plain, native=0.0)):
        dataset = OutlierExposure([read_scenes(coco, panoptic)], [], settings, seed=0, length=30)
        samples = [dataset[k] for k in range(30)]
        for sample in samples:
            assert sample.image.shape == (64, 96, 3)
            assert np.array_equal(sample.anomaly == 1, sample.instances > 0)
            assert len(sample.boxes_xyxy) == sample.instances.max()
            assert sample.instances.min() == 0
        values = np.unique(np.stack([sample.anomaly for sample in samples]))
        assert values.tolist() == [0, 1, IGNORE]


def test_pasted_objects_count_where_the_picture_says_nothing(coco: Path) -> None:
    settings = PasteSettings(crop_hw=(64, 96), objects_per_image=(3, 3), known_per_image=(0, 0), object_px=(60, 90), procedural=1.0)
    sample = OutlierExposure([read_scenes(coco, None)[:1]], [], settings, seed=1, length=1)[0]
    assert (sample.anomaly == 1).any()
    assert np.array_equal(sample.anomaly == 1, sample.instances > 0)


def test_uncounted_pixels_are_not_learnt(coco: Path) -> None:
    settings = PasteSettings(crop_hw=(64, 96), scene_width_px=(96, 96), objects_per_image=(0, 0), known_per_image=(0, 0), augment=False)
    sample = OutlierExposure([read_scenes(coco, None)[:1]], [], settings, seed=0, length=1)[0]
    batch = collate([sample])
    uncounted = sample.anomaly.reshape(16, 4, 24, 4) == IGNORE
    assert np.array_equal(~batch.counted[0].numpy(), uncounted.any(axis=(1, 3)))
    assert 0 < (~batch.counted).sum() < batch.counted.numel()


def test_training_takes_its_side_of_the_split(coco: Path, data_dir: Path) -> None:
    data = ScorerData(camvid=data_dir / "camvid", coco=coco, scenes=True, held_out=0.0)
    sources, cutouts = data.read_training()
    assert [len(source) for source in sources] == [4, 2]
    assert len(replace(data, scenes=False).read_training()[0]) == 1
    part, kept = replace(data, held_out=0.8).read_training()
    assert {scene.image for scene in part[-1]} < {scene.image for scene in sources[-1]}
    # A scene and the objects cut out of it are on the same side.
    assert {scene.image for scene in part[-1]} <= {cutout.image for cutout in kept}
    assert len(kept) < len(cutouts)


def test_no_such_picture_is_refused(coco: Path) -> None:
    write_tree(coco / "instances.json", [rectangle(3, 1, 10, 10, 50, 40)])
    with pytest.raises(InputError, match="no pictures taken outside"):
        read_scenes(coco, None)
    (coco / "instances.json").write_text("[]")
    with pytest.raises(InputError, match="COCO instances layout"):
        read_scenes(coco, None)


def test_regions_without_outline_are_left_out_and_every_picture_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for k in range(4):
        cv2.imwrite(str(tmp_path / "images" / f"{k}.png"), np.full((60, 80, 3), 40 * k, np.uint8))
    outlined = rectangle(0, 3, 20, 10, 60, 50)
    write_tree(tmp_path / "instances.json", [outlined, {**outlined, "segmentation": []}])
    (scene,) = read_scenes(tmp_path, None)
    assert len(scene.regions) == 1
    scene.read()
    # Crowds name their pictures, too.
    write_tree(tmp_path / "instances.json", [crowd(k, 3, 5) for k in range(4)])
    content = (tmp_path / "images" / "2.png").read_bytes()
    (tmp_path / "images" / "2.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"2\.png"):
        read_scenes(tmp_path, None)
