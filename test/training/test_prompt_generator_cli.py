"""``ood-seg train prompt-generator`` from folders of pictures to a weights file."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.scorers.networks.compact import CompactNet
from ros2_ood_seg.training.outlier_exposure import PasteSettings
from ros2_ood_seg.training.prompt_generator import PRESETS
from ros2_ood_seg.training.prompt_generator_cli import MAP_PRESETS, exposed_frames, recipes, register
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
    args = parse([*words, "--preview"])
    assert args.run(args) == 0
    assert cv2.imread(str(tmp_path / "preview.png")).shape == (3 * 225, 4 * 400, 3)
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


def test_published_defaults_and_changes(tmp_path: Path) -> None:
    recipe, map_recipe = recipes(parse(["--output", str(tmp_path), "--noise", "0.04", "--steps", "5", "9", "--scale", "0.5", "2"]))
    assert (recipe.noise, recipe.steps, recipe.scale) == (0.04, (5, 9), (0.5, 2.0))
    assert recipe.learning_rate == PRESETS["s2m"].learning_rate
    assert map_recipe == MAP_PRESETS["s2m"]
    assert map_recipe.paste == PasteSettings.published()


def test_several_processes_need_finished_maps(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = parse([*arguments, "--output", str(tmp_path), "--held-out", "4"])
    with pytest.raises(InputError, match="in one process first"):
        args.run(args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--held-out", "12"], "fewer than the 12 score maps"),
        (["--map-negatives", "2"], "'negatives' is 2.0"),
        (["--map-count", "0"], "0 score maps"),
        (["--camvid", "nowhere"], "nowhere"),
        (["--scorer-weights", "nowhere.pth"], "no weights 'nowhere.pth'"),
    ],
)
def test_unusable_arguments_are_refused_before_training(arguments: list[str], words: list[str], message: str, tmp_path: Path) -> None:
    args = parse([*arguments, "--output", str(tmp_path), "--held-out", "4", *words])
    with pytest.raises(InputError, match=message):
        args.run(args)
