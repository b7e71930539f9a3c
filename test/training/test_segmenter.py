from __future__ import annotations

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import mobilenet_v2

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.segmenters.compact import load_network
from ros2_ood_seg.segmenters.networks.compact import CompactNet
from ros2_ood_seg.training.segmenter import (
    PROMPT_KINDS,
    SegmenterTraining,
    measure,
    register,
    segmenter_loss,
    train_segmenter,
)
from ros2_ood_seg.training.segmenter_data import Batch, SampleMaker, SegmentedObject, tight_object
from ros2_ood_seg.types import Masks, Prompts
from ros2_ood_seg.weights import WeightFile, load_weights, save_weights

TINY = SegmenterTraining(iterations=4, batch_size=2, crop_sizes=(32, 64), warm_up=2, ema=0.5, checkpoint_minutes=0.0)


def shape_object(seed: int) -> SegmentedObject:
    """A bright rectangle or ellipse on dark noise."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 90, (96, 128, 3)).astype(np.uint8)
    mask = np.zeros((96, 128), np.uint8)
    x, y, a, b = (int(v) for v in rng.integers((40, 35, 12, 12), (88, 60, 38, 30)))
    if seed % 2:
        cv2.ellipse(mask, (x, y), (a, b), 0.0, 0, 360, 255, -1)
    else:
        mask[y - b : y + b, x - a : x + a] = 255
    image[mask == 255] = rng.integers(150, 256, 3)
    item = tight_object(image, mask, "shapes", f"shapes/{seed}")
    assert item is not None
    return item


class Oracle:
    """Answers every prompt with the true mask."""

    name = "oracle"

    def __init__(self, objects: list[SegmentedObject]) -> None:
        self._truth = {id(item.image): torch.from_numpy(item.full_mask() == 255) for item in objects}
        self._by_bytes = {item.image.tobytes(): self._truth[id(item.image)] for item in objects}

    def __call__(self, image: Tensor, prompts: Prompts) -> Masks:
        truth = self._by_bytes[image.numpy().tobytes()]
        return Masks(truth.expand(len(prompts), -1, -1), torch.full((len(prompts),), 0.75))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    recipe = SegmenterTraining(iterations=100, warm_up=10, cool_down=0.2)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0.0


def test_loss_of_known_masks() -> None:
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, 2:6, 2:6] = 1
    logits = torch.nn.functional.avg_pool2d(target, 2) * 40 - 20
    batch = Batch(torch.zeros(2, 5, 8, 8), target, torch.tensor([0.0, 0.25]))
    perfect = segmenter_loss(logits, torch.tensor([20.0, 0.0]), batch, 1.0)
    # The second object has as many pixels outside the crop as inside, so its best IoU is one half.
    assert perfect["iou"].item() == pytest.approx(0.75)
    assert perfect["quality"].item() == pytest.approx(0.0, abs=1e-6)
    wrong = segmenter_loss(-logits, torch.zeros(2), batch, 1.0)
    assert wrong["dice"] > 0.9
    assert perfect["dice"] < 0.2
    assert wrong["bce"] > 10 * perfect["bce"]
    assert wrong["total"].item() == pytest.approx(float(wrong["bce"] + wrong["dice"] + wrong["quality"]))


def test_training_learns_simple_shapes(tmp_path: Path) -> None:
    objects, held_out = [shape_object(k) for k in range(24)], [shape_object(k) for k in range(100, 108)]
    recipe = SegmenterTraining(iterations=80, batch_size=4, crop_sizes=(64,), learning_rate=2e-3, encoder_rate=1.0, warm_up=5, ema=0.8)
    path = train_segmenter(objects, [], held_out, recipe, tmp_path)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["total"]) for row in rows if row["total"]]
    ious = [float(row["iou"]) for row in rows if row["iou"]]
    assert losses[-1] < 0.8 * losses[0]
    assert ious[-1] > ious[0] + 0.1
    assert (tmp_path / "curve.png").stat().st_size > 1000
    weights = load_weights(path)
    assert weights.metadata["done"] == 80
    assert weights.metadata["validation"]["val_box"] > 0.4


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = [shape_object(k) for k in range(4)]
    whole = load_weights(train_segmenter(objects, [], [], TINY, tmp_path / "whole"))
    make_batch = SampleMaker.batch
    made = []

    def interrupted(self: SampleMaker, count: int, size: int, rng: np.random.Generator) -> Batch:
        made.append(size)
        if len(made) == 3:
            raise KeyboardInterrupt
        return make_batch(self, count, size, rng)

    monkeypatch.setattr(SampleMaker, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(objects, [], [], TINY, tmp_path / "parts")
    resumed = load_weights(train_segmenter(objects, [], [], TINY, tmp_path / "parts"))
    assert len(made) == 3 + 2
    for name, value in whole.state.items():
        assert torch.equal(resumed.state[name], value), name
    assert (tmp_path / "parts/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()


def test_bfloat16_is_for_the_forward_pass_alone_and_may_change(tmp_path: Path) -> None:
    objects = [shape_object(k) for k in range(4)]
    precise = load_weights(train_segmenter(objects, [], [], TINY, tmp_path / "precise"))
    rounded = load_weights(train_segmenter(objects, [], [], replace(TINY, bfloat16=True), tmp_path / "rounded"))
    trained = {name: value for name, value in precise.state.items() if value.is_floating_point()}
    assert any(not torch.equal(rounded.state[name], value) for name, value in trained.items())
    assert all(rounded.state[name].dtype == value.dtype and rounded.state[name].isfinite().all() for name, value in trained.items())
    resumed = train_segmenter(objects, [], [], replace(TINY, iterations=5), tmp_path / "rounded")
    assert load_weights(resumed).metadata["done"] == 5


def test_starting_from_features_or_from_a_segmenter(tmp_path: Path) -> None:
    torch.manual_seed(1)
    none = SegmenterTraining(iterations=1, batch_size=1, crop_sizes=(32,), learning_rate=1e-12)
    features = WeightFile(Path("start.safetensors"), mobilenet_v2(weights=None).features.state_dict(), {})
    started = load_weights(train_segmenter([shape_object(0)], [], [], none, tmp_path / "a", features, provenance={"start": "x"}))
    assert started.metadata["start"] == "x"
    expected = CompactNet()
    expected.load_imagenet(features)
    key = "encoder.5.conv.1.0.weight"
    torch.testing.assert_close(started.state[key], expected.state_dict()[key], atol=2e-3, rtol=2e-3)
    again = load_weights(train_segmenter([shape_object(0)], [], [], none, tmp_path / "b", started))
    torch.testing.assert_close(again.state["mask.weight"], started.state["mask.weight"], atol=1e-3, rtol=1e-3)


def test_a_loss_that_explodes_is_reported(tmp_path: Path) -> None:
    recipe = SegmenterTraining(iterations=3, batch_size=1, crop_sizes=(32,), learning_rate=float("inf"), warm_up=1)
    with pytest.raises(InputError, match=r"the loss is nan at iteration 1: lower the learning rate \(inf\)"):
        train_segmenter([shape_object(0)], [], [], recipe, tmp_path)


def test_measuring_by_kind_size_and_source() -> None:
    objects = [shape_object(k) for k in range(6)]
    report = measure(Oracle(objects), objects)
    assert tuple(report) == PROMPT_KINDS
    for values in report.values():
        assert values["iou"] == 1.0
        assert values["objects"] == 6
        assert values["quality_error"] == pytest.approx(0.25)
        assert values["iou_by_source"] == {"shapes": 1.0}
        assert set(values["iou_by_longest_side_px"].values()) == {1.0}
    with pytest.raises(InputError, match="at least one object"):
        measure(Oracle(objects), [])


def test_undecided_pixels_do_not_count() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 255
    truth = tight_object(image, mask, "a", "b")
    mask[5:15, 10] = 128
    partly = tight_object(image, mask, "a", "b")
    assert truth is not None
    assert partly is not None
    assert measure(Oracle([truth]), [partly])["box"]["iou"] == 1.0


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    return parser.parse_args(["segmenter", *arguments])


def write_set(root: Path, count: int) -> None:
    for folder in ("images", "labels", "masks"):
        (root / folder).mkdir(parents=True)
    for index in range(count):
        item = shape_object(index)
        cv2.imwrite(str(root / f"images/{index}.png"), item.image)
        cv2.imwrite(str(root / f"labels/{index}.png"), (item.full_mask() == 255).astype(np.uint8))
        cv2.imwrite(str(root / f"masks/{index}.png"), item.full_mask())


def test_the_command_trains_and_measures(tmp_path: Path) -> None:
    write_set(tmp_path / "grabcut", 30)
    for path in (tmp_path / "grabcut/images").glob("*.png"):
        cv2.imwrite(str(path.with_suffix(".jpg")), cv2.imread(str(path)))
        path.unlink()
    write_set(tmp_path / "road", 2)
    start = tmp_path / "start.safetensors"
    save_weights(start, mobilenet_v2(weights=None).features.state_dict(), {"licence": "Apache-2.0"})
    recipe = ("--iterations", "2", "--batch-size", "2", "--crop-sizes", "32", "--validate-on", "2", "--init", str(start), "--device", "cpu")
    args = parse("--objects", str(tmp_path), "--roads", str(tmp_path / "road/images"), "--output", str(tmp_path / "run"), *recipe)
    assert args.run(args) == 0
    weights = tmp_path / "run/segmenter.safetensors"
    assert load_weights(weights).metadata["recipe"]["iterations"] == 2
    assert load_weights(weights).metadata["start"]["licence"] == "Apache-2.0"
    report = tmp_path / "report.json"
    args = parse("--evaluate", "compact", "--weights", str(weights), "--output", str(report), "--labelled", str(tmp_path / "road"))
    assert args.run(args) == 0
    measured = json.loads(report.read_text())
    assert measured["road"]["box"]["objects"] == 2
    assert 0 <= measured["road"]["point"]["iou"] <= 1


def test_the_command_needs_objects(tmp_path: Path) -> None:
    args = parse("--output", str(tmp_path), "--device", "cpu")
    with pytest.raises(InputError, match="training needs --objects"):
        args.run(args)
    args = parse("--evaluate", "grabcut", "--output", str(tmp_path / "r.json"), "--device", "cpu")
    with pytest.raises(InputError, match="--evaluate needs --objects or --labelled"):
        args.run(args)


@pytest.mark.parametrize("flag", ["--seed", "--validate-on", "--frames-per-folder"])
def test_negative_numbers_are_refused_before_anything_is_read(flag: str, tmp_path: Path) -> None:
    args = parse("--objects", "nowhere", "--output", str(tmp_path / "run"), "--device", "cpu", flag, "-1")
    with pytest.raises(InputError, match=f"{flag} is -1, allowed: 0 or more"):
        args.run(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations is 0, allowed: a number above 0"),
        ({"width": -8}, "width is -8"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, allowed: a number above 0"),
        ({"crop_sizes": (96, 100)}, r"crop_sizes is \(96, 100\), allowed: one or more positive multiples of 32"),
        ({"crop_sizes": ()}, "crop_sizes is"),
        ({"warped": 1.5}, "warped is 1.5, allowed: a number from 0 to 1"),
        ({"crowded": -0.1}, "crowded is -0.1, allowed: a number from 0 to 1"),
    ],
)
def test_recipes_that_cannot_be_trained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **changes)


def test_width_is_found_again(tmp_path: Path) -> None:
    path = train_segmenter([shape_object(0)], [], [], replace(TINY, width=16), tmp_path)
    assert load_network(str(path)).width == 16
