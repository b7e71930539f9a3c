"""``ood-seg train prompt-generator`` from folders of pictures to a weights file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.scorers.networks.compact import CompactNet
from ros2_ood_seg.training.outlier_exposure import PasteSettings
from ros2_ood_seg.training.prompt_generator import PRESETS
from ros2_ood_seg.training.prompt_generator_cli import MAP_PRESETS, exposed_frames, recipes, register
from ros2_ood_seg.training.score_maps import ScoreMaps
from ros2_ood_seg.types import Calibration
from ros2_ood_seg.weights.store import load_weights, save_weights


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name tiny data sets and a scorer with random weights."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / "camvid" / split / kind).mkdir(parents=True)
        for k in range(3):
            cv2.imwrite(str(root / "camvid" / split / "images" / f"{k}.png"), rng.integers(0, 255, (60, 80, 3), np.uint8))
            cv2.imwrite(str(root / "camvid" / split / "labels" / f"{k}.png"), np.full((60, 80), 3, np.uint8))
    for kind in ("images", "masks"):
        (root / "objects" / kind).mkdir(parents=True)
    for k in range(40):
        mask = np.zeros((40, 50), np.uint8)
        cv2.circle(mask, (25, 20), 15, 255, -1)
        cv2.imwrite(str(root / "objects" / "images" / f"thing{k}.png"), rng.integers(0, 255, (40, 50, 3), np.uint8))
        cv2.imwrite(str(root / "objects" / "masks" / f"thing{k}.png"), mask)
    torch.manual_seed(0)
    calibration = Calibration((-1.0, 1.0), (0.0, 1.0)).to_dict()
    save_weights(
        root / "scorer.safetensors", CompactNet().state_dict(), {"default_score": "outlier", "calibrations": {"outlier": calibration}}
    )
    scorer = ["--scorer-weights", str(root / "scorer.safetensors")]
    return ["--preset", "compact", "--camvid", str(root / "camvid"), "--objects", str(root / "objects"), *scorer, "--device", "cpu"]


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    return parser.parse_args(["prompt-generator", *words])


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    paste = PasteSettings(crop_hw=(64, 96), frame_width_px=(96.0, 128.0), object_px=(10.0, 40.0))
    recipe = MAP_PRESETS["compact"]
    monkeypatch.setitem(MAP_PRESETS, "compact", type(recipe)(12, 96, 0.25, 0.5, paste))


def test_pictures_become_a_prompt_generator(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*arguments, "--output", str(tmp_path), "--held-out", "4", "--batch-size", "2"]
    args = parse([*words, "--iterations", "2"])
    assert args.run(args) == 0
    assert capsys.readouterr().out.strip().endswith("prompt_generator.safetensors")
    metadata = load_weights(tmp_path / "prompt_generator.safetensors").metadata
    assert metadata["recipe"]["iterations"] == 2
    assert metadata["maps"]["count"] == 12
    assert len(metadata["maps"]["scorer_sha256"]) == 64


def test_last_samples_hold_out_and_some_have_no_anomaly(arguments: list[str], tmp_path: Path) -> None:
    args = parse([*arguments, "--output", str(tmp_path), "--held-out", "4", "--map-count", "60", "--map-negatives", "0.5"])
    recipe, map_recipe = recipes(args)
    frames = exposed_frames(args, map_recipe, recipe)
    assert len(frames) == 60
    counts = [len(frames[k].boxes_xyxy) for k in range(60)]
    assert 15 <= sum(count == 0 for count in counts) <= 45
    np.testing.assert_array_equal(frames[59].image, frames[59].image)


def test_scenes_show_objects_of_their_own(arguments: list[str], tmp_path: Path) -> None:
    coco = write_scenes(tmp_path / "coco", 12)
    words = [*arguments, "--coco", str(coco), "--output", str(tmp_path), "--held-out", "4", "--map-count", "30", "--map-negatives", "1"]
    plain = ["--paste-illumination", "0", "--no-paste-augment", "--paste-scene-width-px", "90", "96"]
    for share in ("0", "1"):
        args = parse([*words, *plain, "--map-scenes", share])
        recipe, map_recipe = recipes(args)
        frames = exposed_frames(args, map_recipe, recipe)
        assert all(len(frames[k].boxes_xyxy) == int(share) for k in range(26))
        # Recall is measured on what the scorer never saw, without scenes.
        assert all(len(frames[k].boxes_xyxy) == 0 for k in range(26, 30))
        green = [(frames[k].image[..., 1] == 200).mean() for k in range(26)]
        assert all((part > 0.1) == (share == "1") for part in green)


def write_scenes(root: Path, count: int) -> Path:
    """COCO pictures of a zebra on a green field."""
    (root / "images").mkdir(parents=True)
    box = [30, 20, 30, 50, 60, 50, 60, 20]
    for k in range(count):
        picture = np.full((60, 90, 3), (50, 200, 50), np.uint8)
        picture[20:50, 30:60] = 255
        cv2.imwrite(str(root / "images" / f"{k}.png"), picture)
    zebra = {"category_id": 1, "area": 900, "iscrowd": 0, "segmentation": [box]}
    tree = {
        "images": [{"id": k, "file_name": f"{k}.png"} for k in range(count)],
        "categories": [{"id": 1, "name": "zebra"}],
        "annotations": [{**zebra, "image_id": k} for k in range(count)],
    }
    (root / "instances.json").write_text(json.dumps(tree))
    return root


def test_published_defaults_and_changes(tmp_path: Path) -> None:
    recipe, map_recipe = recipes(parse(["--output", str(tmp_path), "--noise", "0.04", "--steps", "5", "9", "--scale", "0.5", "2"]))
    assert (recipe.noise, recipe.steps, recipe.scale) == (0.04, (5, 9), (0.5, 2.0))
    assert recipe.learning_rate == PRESETS["s2m"].learning_rate
    assert map_recipe == MAP_PRESETS["s2m"]
    assert map_recipe.paste == PasteSettings.published()


def test_two_processes_train_one_prompt_generator(arguments: list[str], tmp_path: Path) -> None:
    words = [*arguments, "--output", str(tmp_path), "--held-out", "2", "--batch-size", "1", "--iterations", "2", "--map-count", "4"]
    small = ["--paste-crop-hw", "64", "96", "--map-width", "96", "--shortest-px", "64", "--crop-hw", "0", "0", "--threads", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ros2_ood_seg.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command += ["train", "prompt-generator", *words, *small]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "prompt_generator.safetensors")]
    metadata = load_weights(tmp_path / "prompt_generator.safetensors").metadata
    assert metadata["processes"] == 2
    assert len(ScoreMaps.read(tmp_path / "maps")) == 4


def test_another_scorer_gives_the_maps(arguments: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_weights(tmp_path / "lraspp.safetensors", lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict(), {})
    words = [*arguments, "--scorer", "torchvision_segmentation", "--scorer-weights", str(tmp_path / "lraspp.safetensors")]
    args = parse([*words, "--output", str(tmp_path / "run"), "--held-out", "4", "--preview"])
    assert args.run(args) == 0
    for name, height in (("preview.png", 3 * 225), ("preview_frames.png", 3 * 64)):
        assert cv2.imread(str(tmp_path / "run" / name)).shape[0] == height


def test_pasting_is_set_by_flags(tmp_path: Path) -> None:
    flags = ["--paste-objects-per-image", "2", "3", "--paste-harmonise", "0.5", "--paste-blur", "1", "--paste-perspective", "0.25"]
    _, map_recipe = recipes(parse(["--output", str(tmp_path), *flags, "--paste-shadow", "0.1", "--paste-object-scales"]))
    expected = {"objects_per_image": (2, 3), "harmonise": 0.5, "blur": 1.0, "perspective": 0.25, "shadow": 0.1, "object_scales": ()}
    assert map_recipe.paste == replace(PasteSettings.published(), **expected)


def test_textures_alone_are_enough(arguments: list[str], tmp_path: Path) -> None:
    args = parse([*arguments, "--output", str(tmp_path), "--held-out", "4", "--paste-procedural", "1", "--paste-known-per-image", "0", "0"])
    args.objects = []
    recipe, map_recipe = recipes(args)
    frames = exposed_frames(args, map_recipe, recipe)
    assert sum(len(frames[k].boxes_xyxy) for k in range(6)) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--held-out", "12"], "fewer than the 12 score maps"),
        (["--map-negatives", "2"], "'negatives' is 2.0"),
        (["--map-scenes", "-1"], "'scenes' is -1.0"),
        (["--map-scenes", "0.5"], "--map-scenes needs --coco"),
        (["--map-count", "0"], "0 score maps"),
        (["--camvid", "nowhere"], "nowhere"),
        (["--scorer-weights", "nowhere.pth"], "no weights 'nowhere.pth'"),
        (["--scorer", "external"], "'external' has no network"),
        (["--scorer", "nothing"], "unknown scorer 'nothing'"),
        (["--init", "SCORER"], "not of the family 'prompt generator'"),
        (["--objects"], "there are no objects to paste"),
        (["--roads", "ONE"], "ONE' has no pictures to (learn from|hold out)"),
        (["--paste-object-px", "9", "3"], "'object_px' is"),
        (["--scale", "2", "1"], "'scale' is 2.0 1.0"),
        (["--seed", "-1"], "'seed' is -1, allowed: 0 or more"),
        (["--workers", "-1"], "'workers' is -1, allowed: 0 or more"),
        (["--device", "gpu"], "'runtime.device' is 'gpu'"),
        (["--paste-crop-hw", "48", "48"], "--paste-crop-hw: 'scorer.input_width' is 48, allowed: 0, or a whole number from 64"),
    ],
)
def test_unusable_arguments_are_refused_before_training(arguments: list[str], words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "ONE").mkdir()
    cv2.imwrite(str(tmp_path / "ONE" / "frame.png"), np.zeros((60, 80, 3), np.uint8))
    stand_ins = {"SCORER": arguments[arguments.index("--scorer-weights") + 1], "ONE": str(tmp_path / "ONE")}
    output = tmp_path / "run"
    args = parse([*arguments, "--output", str(output), "--held-out", "4", *(stand_ins.get(word, word) for word in words)])
    with pytest.raises(InputError, match=message):
        args.run(args)
    assert not (output / "maps").exists()


def test_maps_and_checkpoints_of_another_recipe_are_refused_by_name(arguments: list[str], tmp_path: Path) -> None:
    words = [*arguments, "--output", str(tmp_path), "--held-out", "4", "--batch-size", "1", "--iterations", "1"]
    args = parse(words)
    assert args.run(args) == 0
    args = parse([*words, "--paste-shadow", "0.9"])
    with pytest.raises(InputError, match=r"made by another recipe \(paste.shadow 0.3 instead of 0.9\)"):
        args.run(args)
    args = parse([*words, "--noise", "0.04"])
    with pytest.raises(InputError, match=r"of another recipe \(noise 0.01 instead of 0.04\)"):
        args.run(args)
    index = json.loads((tmp_path / "maps/index.json").read_text())
    del index["recipe"]["paste"]["blur"]
    (tmp_path / "maps/index.json").write_text(json.dumps(index))
    args = parse(words)
    assert args.run(args) == 0


def test_choices_do_not_follow_the_samples_own_stream(arguments: list[str], tmp_path: Path) -> None:
    args = parse([*arguments, "--output", str(tmp_path), "--held-out", "1", "--map-count", "400", "--map-unseen", "0.5"])
    recipe, map_recipe = recipes(args)
    frames = exposed_frames(args, map_recipe, recipe)

    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, index: int) -> tuple[str, float]:
            # As samples do: the first number of their stream chooses the source of the frame.
            return self.name, np.random.default_rng([recipe.seed, index]).random()

    frames._sides = [(Side("seen"), Side("seen")), (Side("unseen"), Side("unseen"))]  # type: ignore[list-item]
    drawn = [frames[k] for k in range(399)]
    for side in ("seen", "unseen"):
        first = [number for name, number in drawn if name == side]
        assert 0.4 < np.mean([number < 0.5 for number in first]) < 0.6, side


def test_a_run_goes_on_with_the_same_maps_only(arguments: list[str], tmp_path: Path) -> None:
    words = [*arguments, "--output", str(tmp_path / "run"), "--held-out", "2", "--batch-size", "1", "--iterations", "2"]
    args = parse([*words, "--maps", str(tmp_path / "first")])
    assert args.run(args) == 0
    other = parse([*words, "--maps", str(tmp_path / "second"), "--map-count", "10"])
    with pytest.raises(InputError, match="began from something else"):
        other.run(other)
