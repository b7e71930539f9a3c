"""What ``ood-seg train scorer`` refuses, before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg.cli import main
from ros2_ood_seg.scorers.networks.deeplab_mobilenet_v2 import DeepLabMobileNetV2
from ros2_ood_seg.weights.store import save_weights

SOURCES = {
    "--camvid": "camvid",
    "--idd-lite": "idd_lite",
    "--cityscapes": "cityscapes",
    "--roads": "roads",
    "--coco": "coco",
    "--coco-panoptic": "coco_panoptic",
    "--objects": "grabcut",
}


@pytest.fixture
def copies(data_dir: Path, tmp_path: Path) -> Path:
    """Every layout, free to be damaged."""
    root = tmp_path / "data"
    for name in set(SOURCES.values()) - {"idd_lite"}:
        shutil.copytree(data_dir / name, root / name)
    shutil.copytree(data_dir / "camvid", root / "idd_lite")
    for label in (root / "idd_lite").glob("*/labels/*.png"):
        cv2.imwrite(str(label), np.zeros((90, 120), np.uint8))
    return root


def label_with(value: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        label[50, 50] = value
        cv2.imwrite(str(path), label)

    return damage


def without_images(path: Path) -> None:
    tree = json.loads(path.read_text())
    del tree["images"]
    path.write_text(json.dumps(tree))


REFUSED: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("--camvid", "train", shutil.rmtree, "does not exist"),
    ("--camvid", "train/images/0.png", Path.unlink, "label without image"),
    ("--camvid", "train/labels/1.png", Path.unlink, "image without label"),
    ("--camvid", "train/labels/1.png", label_with(77), r"holds values [77] outside its layout"),
    ("--idd-lite", "val/labels", shutil.rmtree, "does not exist"),
    ("--idd-lite", "val/labels/2.png", label_with(9), r"holds values [9] outside its layout"),
    ("--cityscapes", "leftImg8bit", shutil.rmtree, "no Cityscapes images under"),
    ("--cityscapes", "gtFine/train/ulm/ulm_0_gtFine_labelIds.png", Path.unlink, "has no label"),
    ("--cityscapes", "gtFine/train/ulm/ulm_0_gtFine_labelIds.png", label_with(60), r"holds values [60] outside its layout"),
    ("--roads", ".", lambda path: [file.unlink() for file in path.iterdir()], "holds no pictures"),
    ("--coco", "instances.json", Path.unlink, "is not in the COCO layout: expected instances.json"),
    ("--coco", "instances.json", without_images, "not in the COCO instances layout"),
    ("--coco", "images/3.png", Path.unlink, "3.png', which does not exist"),
    ("--coco-panoptic", "panoptic.json", without_images, "not in the COCO panoptic layout"),
    ("--coco-panoptic", "panoptic/0.png", Path.unlink, "0.png', which does not exist"),
    ("--objects", "images/doll.png", Path.unlink, "doll.png' matches no image"),
    ("--objects", "masks/doll.png", Path.unlink, "has no mask"),
    ("--objects", "images", shutil.rmtree, "does not exist"),
]


@pytest.mark.parametrize(("option", "path", "damage", "message"), REFUSED)
def test_damaged_data(
    option: str, path: str, damage: Callable[[Path], object], message: str, copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copies / SOURCES[option] / path)
    output = copies.parent / "out"
    used = dict.fromkeys(["--camvid", "--coco", option])
    arguments = [text for name in used for text in (name, str(copies / SOURCES[name]))]
    assert main(["train", "scorer", "--output", str(output), "--workers", "0", "--iterations", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (output / "checkpoint.pt").exists()
    assert not (output / "log.csv").exists()


def test_checkpoint_of_another_network_or_method(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = copies.parent / "out"
    output.mkdir()
    start = copies.parent / "start.safetensors"
    network = DeepLabMobileNetV2(7)
    save_weights(start, {key: torch.zeros_like(value) for key, value in network.state_dict().items()}, {}, half=False)
    data = [
        "--camvid",
        str(copies / "camvid"),
        "--coco",
        str(copies / "coco"),
        "--output",
        str(output),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    torch.save({"net": {"conv.weight": torch.zeros(1)}, "done": 1}, output / "checkpoint.pt")
    assert main(["train", "scorer", "--method", "max_entropy", "--init", str(start), "--crop", "48", "64", *data]) == 2
    assert "of another network" in capsys.readouterr().err
    torch.save({"recipe": {"method": "pebal"}, "done": 1}, output / "checkpoint.pt")
    assert main(["train", "scorer", "--method", "max_entropy", "--init", str(start), "--crop", "48", "64", *data]) == 2
    assert "method pebal instead of max_entropy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-start", "1.0"], "--keep-start is 1.0, allowed: 0 to below 1"),
        (["--keep-start", "-0.1"], "--keep-start is -0.1, allowed: 0 to below 1"),
        (["--keep-start", "0.5"], "--keep-start needs an earlier scorer as --init"),
        (["--keep-start", "0.5", "--init", "{base}"], "--keep-start needs an earlier scorer as --init"),
        (["--keep-start", "0.5", "--method", "pebal"], "--keep-start is no setting of method 'pebal'"),
        (["--average-with", "{base}"], "--average-with needs an earlier scorer as --init"),
        (["--average-with", "{base}", "--method", "pebal"], "--average-with is no setting of method 'pebal'"),
    ],
)
def test_refused_averages(arguments: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.safetensors"
    save_weights(base, DeepLabMobileNetV2(7).state_dict(), {}, half=False)
    data = ["--camvid", str(data_dir / "camvid"), "--coco", str(data_dir / "coco"), "--output", str(tmp_path / "out")]
    assert main(["train", "scorer", *data, *(text.format(base=base) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenes"], "--scenes needs --coco or --coco-panoptic"),
        (["--scenes", "--coco", "{data}/coco", "--method", "pebal"], "--scenes is no setting of method 'pebal'"),
        (["--coco", "{data}/coco", "--paste-scene-width-px", "0", "100"], "'scene_width_px' (0.0, 100.0)"),
    ],
)
def test_refused_scenes(arguments: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [
        "--camvid",
        str(data_dir / "camvid"),
        "--objects",
        str(data_dir / "grabcut"),
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "0",
    ]
    assert main(["train", "scorer", *data, *(text.format(data=data_dir) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed is -1, allowed: 0 or more"),
        (["--workers", "-1"], "workers is -1, allowed: 0 or more"),
        (["--method", "pebal", "--seed", "-1"], "seed is -1, allowed: 0 or more"),
        (["--method", "pebal", "--input-width", "32"], "--input-width: 'scorer.input_width' is 32, allowed: 0, or a whole number from 64"),
        (["--device", "gpu"], "'runtime.device' is 'gpu', allowed: text (auto, cpu, cuda, cuda:N)"),
        (["--threads", "-1"], "'runtime.threads' is -1, allowed: a whole number, at least 0"),
    ],
)
def test_refused_numbers_and_devices(
    arguments: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--camvid", str(data_dir / "camvid"), "--coco", str(data_dir / "coco"), "--output", str(tmp_path / "out")]
    assert main(["train", "scorer", *data, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
