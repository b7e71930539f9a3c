"""Training of the prompt generator on synthetic score maps."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ros2_ood_seg.config import BoxPromptsConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.prompts.faster_rcnn import build_compact
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.training.prompt_generator import (
    PRESETS,
    PromptTraining,
    augmented,
    build_network,
    contact_sheet,
    found_boxes,
    learning_rate,
    train_prompt_generator,
)
from ros2_ood_seg.training.score_maps import LabelledMap, ScoreMaps
from ros2_ood_seg.types import Calibration, ScoreMap
from ros2_ood_seg.weights.store import load_weights

CALIBRATION = Calibration((-20.0, 0.0), (0.0, 1.0))
TINY = replace(
    PRESETS["compact"],
    iterations=50,
    batch_size=4,
    warmup_iterations=20,
    steps=(40,),
    shortest_px=64,
    longest_px=128,
    input_width=128,
    crop_hw=(0, 0),
    scale=(1.0, 1.0),
    fragments=0.0,
    held_out=8,
    checkpoint_every=50,
)


def synthetic_maps(count: int, seed: int = 0, height: int = 64, width: int = 128) -> ScoreMaps:
    """Noise with up to two bright rectangles, raw scores in -20..0."""
    rng = np.random.default_rng(seed)
    scores, boxes = [], []
    for _ in range(count):
        unit = rng.uniform(0.0, 0.2, (height, width))
        labels = []
        for _ in range(rng.integers(0, 3)):
            w, h = rng.integers(12, 50), rng.integers(12, 30)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            unit[y : y + h, x : x + w] = rng.uniform(0.7, 1.0)
            labels.append((x, y, x + w, y + h))
        scores.append((20.0 * unit - 20.0).astype(np.float32))
        boxes.append(np.array(labels, np.float32).reshape(-1, 4))
    return ScoreMaps(np.stack(scores), boxes, [np.ones(len(b), np.float32) for b in boxes], CALIBRATION)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_prompt_generator(synthetic_maps(48), TINY, tmp_path_factory.mktemp("run"), extra_metadata={"scorer": "synthetic"})


def test_a_minute_of_training_finds_boxes_that_fit(trained: Path) -> None:
    generate = build_compact(BoxPromptsConfig(weights=str(trained)), Runtime(torch.device("cpu")))
    maps = synthetic_maps(20, seed=9)
    hits = []
    for k in range(len(maps)):
        prompts = generate(ScoreMap(torch.from_numpy(maps[k].scores), "synthetic", CALIBRATION))
        hits += found_boxes(torch.from_numpy(maps[k].boxes_xyxy), prompts.boxes_xyxy).tolist()
    assert len(hits) > 10
    assert np.mean(hits) > 0.6


def test_run_leaves_logs_and_a_described_weights_file(trained: Path) -> None:
    with (trained.parent / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["iteration"]) for r in rows] == [20, 40, 50]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values() if value)
    metadata = load_weights(trained).metadata
    assert metadata["network"] == "compact"
    assert metadata["map_input"]["mode"] == "calibrated"
    assert metadata["input_width"] == 128
    assert metadata["recipe"]["seed"] == 0
    assert metadata["scorer"] == "synthetic"
    assert [row["recall"] != "" for row in rows] == [False, False, True]
    assert 0 <= float(rows[-1]["recall_from_16px"]) <= 1
    assert (trained.parent / "curve.png").stat().st_size > 1000


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    maps = synthetic_maps(12)
    recipe = replace(TINY, iterations=6, checkpoint_every=3, batch_size=2, held_out=0)
    whole = train_prompt_generator(maps, recipe, tmp_path / "whole")
    train_prompt_generator(maps, replace(recipe, iterations=3), tmp_path / "parts")
    resumed = train_prompt_generator(maps, recipe, tmp_path / "parts")
    first, second = load_weights(whole).state, load_weights(resumed).state
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    maps = synthetic_maps(4)
    recipe = replace(TINY, iterations=1, batch_size=1, held_out=0)
    train_prompt_generator(maps, recipe, tmp_path)
    with pytest.raises(InputError, match=r"another recipe \(noise 0.01 instead of 0.04\)"):
        train_prompt_generator(maps, replace(recipe, noise=0.04), tmp_path)


def test_published_schedule() -> None:
    recipe = PRESETS["s2m"]
    assert learning_rate(recipe, 0) == pytest.approx(2.5e-6)
    assert learning_rate(recipe, 500) == pytest.approx(2.5e-3 * 0.5005)
    assert learning_rate(recipe, 1000) == pytest.approx(2.5e-3)
    assert learning_rate(recipe, 60_000) == pytest.approx(2.5e-4)
    assert learning_rate(recipe, 80_000) == pytest.approx(2.5e-5)
    assert (recipe.iterations, recipe.batch_size, recipe.momentum, recipe.weight_decay) == (148_300, 4, 0.9, 1e-4)


def one_rectangle(x: int, y: int, w: int, h: int, peak: float = 1.0) -> LabelledMap:
    scores = np.full((60, 200), -20.0, np.float32)
    scores[y : y + h, x : x + w] = -2.0
    return LabelledMap(scores, np.array([[x, y, x + w, y + h]], np.float32), np.array([peak], np.float32))


@given(
    x=st.integers(0, 150), y=st.integers(0, 20), w=st.integers(10, 50), h=st.integers(10, 40), seed=st.integers(0, 999), crop=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_boxes_stay_on_their_objects_through_all_geometry(x: int, y: int, w: int, h: int, seed: int, crop: bool) -> None:
    recipe = replace(PRESETS["compact"], shortest_px=90, longest_px=300, contrast=(1.0, 1.0), fragments=0.0)
    recipe = replace(recipe, crop_hw=(70, 180) if crop else (0, 0))
    scores, boxes = augmented(one_rectangle(x, y, w, h), CALIBRATION, recipe, np.random.default_rng(seed))
    rows, columns = np.nonzero(scores[0].numpy() > 0.45)
    if len(boxes):
        tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        np.testing.assert_allclose(boxes[0].numpy(), tight, atol=1.5)
    else:
        assert crop
        assert len(rows) < 0.3 * w * h * (scores.shape[1] / 200 if not crop else 4.0)


def test_noise_is_multiplicative_per_pixel_and_channel_on_raw_scores() -> None:
    recipe = replace(PRESETS["s2m"], shortest_px=60, longest_px=200, flip=0.0, noise=0.04)
    entry = one_rectangle(100, 5, 40, 10)
    scores, boxes = augmented(entry, CALIBRATION, recipe, np.random.default_rng(0))
    assert scores.shape == (3, 60, 200)
    ratio = scores.numpy() / entry.scores
    assert 0.96 <= ratio.min() < 0.961
    assert 1.039 < ratio.max() <= 1.04
    assert not torch.equal(scores[0], scores[1])
    assert boxes.tolist() == [[100, 5, 140, 15]]


def test_objects_that_the_map_does_not_show_are_not_labelled() -> None:
    recipe = replace(PRESETS["compact"], min_peak=0.5, crop_hw=(0, 0))
    assert len(augmented(one_rectangle(100, 5, 40, 10, peak=0.4), CALIBRATION, recipe, np.random.default_rng(0))[1]) == 0
    assert len(augmented(one_rectangle(100, 5, 40, 10, peak=0.6), CALIBRATION, recipe, np.random.default_rng(0))[1]) == 1


def test_found_boxes_needs_half_overlap() -> None:
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 19.0], [50.0, 50.0, 60.0, 71.0]])
    assert found_boxes(truth, boxes).tolist() == [True, False]
    assert found_boxes(truth, boxes[:0]).tolist() == [False, False]


def test_preview_shows_the_first_examples() -> None:
    sheet = contact_sheet(synthetic_maps(5), TINY)
    assert sheet.shape == (2 * 225, 4 * 400, 3)
    assert (sheet == np.array([255, 200, 0], np.uint8)).all(axis=-1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "yolo"}, "network is 'yolo'"),
        ({"noise": 2.0}, "'noise' is 2.0"),
        ({"iterations": 0}, "'iterations' is 0"),
        ({"contrast": (0.5, 2.0)}, "calibrated"),
    ],
)
def test_unusable_recipes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptTraining(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("network", ["compact", "mobilenet_v3"])
def test_small_networks_take_calibrated_scores_only(network: Literal["compact", "mobilenet_v3"]) -> None:
    with pytest.raises(InputError, match=f"{network} prompt generator takes calibrated"):
        build_network(PromptTraining(network=network, input_mode="raw"))


def test_mobilenet_learns_as_the_compact_network_does() -> None:
    network, _ = build_network(PRESETS["mobilenet_v3"])
    boxes = torch.tensor([[10.0, 20.0, 60.0, 50.0]])
    losses = network.train()([torch.rand(1, 96, 128)], [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}])
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.backbone.parameters())


def test_too_few_maps_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="8 of 5"):
        train_prompt_generator(synthetic_maps(5), TINY, tmp_path)
