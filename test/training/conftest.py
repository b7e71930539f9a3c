from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg.scorers.networks.compact import CompactNet
from ros2_ood_seg.types import Calibration
from ros2_ood_seg.weights.store import save_weights


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data sets in the layouts that the readers take."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def write(path: Path, image: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    for split, count in (("train", 4), ("val", 3)):
        for k in range(count):
            image = np.full((90, 120, 3), 90, np.uint8)
            image[:40] = (200, 160, 120)
            image += rng.integers(0, 10, image.shape, dtype=np.uint8)
            label = np.full((90, 120), 3, np.uint8)
            label[:40] = 0
            label[80:, :10] = 11
            write(root / "camvid" / split / "images" / f"{k}.png", image)
            write(root / "camvid" / split / "labels" / f"{k}.png", label)
            write(root / "cityscapes/leftImg8bit" / split / "ulm" / f"ulm_{k}_leftImg8bit.png", image)
            write(root / "cityscapes/gtFine" / split / "ulm" / f"ulm_{k}_gtFine_labelIds.png", np.where(label == 3, 7, 23).astype(np.uint8))
    for k in range(24):
        write(root / "roads" / f"frame_{k}.jpg", np.full((100, 160, 3), 80 + k, np.uint8))

    names = {1: "person", 2: "bench", 3: "zebra"}
    annotations = []
    for k in range(24):
        image = np.zeros((60, 80, 3), np.uint8)
        image[10:50, 20:60] = (0, 0, 255)
        write(root / "coco" / "images" / f"{k}.png", image)
        for category in names:
            polygon = [20, 10, 60, 10, 60, 50, 20, 50]
            item = {"image_id": k, "category_id": category, "area": 1600, "iscrowd": 0, "segmentation": [polygon]}
            annotations.append(item)
    annotations.append({"image_id": 0, "category_id": 3, "area": 1600, "iscrowd": 1, "segmentation": {"counts": [], "size": [60, 80]}})
    annotations.append({"image_id": 0, "category_id": 3, "area": 10, "iscrowd": 0, "segmentation": [[0, 0, 3, 0, 3, 3]]})
    tree = {
        "images": [{"id": k, "file_name": f"{k}.png"} for k in range(24)],
        "categories": [{"id": k, "name": name} for k, name in names.items()],
        "annotations": annotations,
    }
    (root / "coco" / "instances.json").write_text(json.dumps(tree))

    segment_id = 7 + 256 * 2 + 65536 * 1
    mask = np.zeros((60, 80, 3), np.uint8)
    mask[10:50, 20:60] = (1, 2, 7)
    write(root / "coco_panoptic" / "images" / "0.png", np.full((60, 80, 3), 128, np.uint8))
    write(root / "coco_panoptic" / "panoptic" / "0.png", mask)
    panoptic = {
        "images": [{"id": 0, "file_name": "0.png"}],
        "categories": [{"id": 3, "name": "zebra", "isthing": 1}, {"id": 9, "name": "grass", "isthing": 0}],
        "annotations": [
            {
                "image_id": 0,
                "file_name": "0.png",
                "segments_info": [{"id": segment_id, "category_id": 3, "area": 1600}, {"id": 1, "category_id": 9, "area": 3200}],
            }
        ],
    }
    (root / "coco_panoptic" / "panoptic.json").write_text(json.dumps(panoptic))

    for name in ("doll", "person3", "cat_2007_000528"):
        image = np.full((50, 50, 3), 60, np.uint8)
        object_mask = np.zeros((50, 50), np.uint8)
        object_mask[10:40, 5:45] = 255
        object_mask[0:5, 0:5] = 128
        write(root / "grabcut" / "images" / f"{name}.png", image)
        write(root / "grabcut" / "masks" / f"{name}.png", object_mask)
    return root


@pytest.fixture(scope="session")
def labelled_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled frames with one object each in the plain layout, and beside it ``scorer.safetensors``, a scorer of random weights."""
    root = tmp_path_factory.mktemp("sets") / "tiny"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(2):
        image = np.clip(rng.normal(90, 4, (96, 160, 3)), 0, 255).astype(np.uint8)
        label = np.zeros((96, 160), np.uint8)
        cv2.ellipse(image, (110, 30 + 20 * k), (24, 12), 0, 0, 360, (20, 30, 220), -1)
        cv2.ellipse(label, (110, 30 + 20 * k), (24, 12), 0, 0, 360, 1, -1)
        cv2.imwrite(str(root / "images" / f"{k}.png"), image)
        cv2.imwrite(str(root / "labels" / f"{k}.png"), label)
    torch.manual_seed(0)
    calibration = Calibration((-1.0, 1.0), (0.0, 1.0)).to_dict()
    metadata = {"default_score": "outlier", "calibrations": {"outlier": calibration}}
    save_weights(root.parent / "scorer.safetensors", CompactNet().state_dict(), metadata)
    return root
