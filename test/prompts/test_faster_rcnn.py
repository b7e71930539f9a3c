"""The prompt generator around the detector: input modes, scales, tiles and the ignore mask, with a detector of known answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ros2_ood_seg.config import BoxPromptsConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.prompts import BOX_PROMPTS
from ros2_ood_seg.prompts.faster_rcnn import Detector, RcnnBoxes, _ignored_fraction, build, build_compact
from ros2_ood_seg.prompts.networks.rcnn import MapInput, compact_rcnn, mobilenet_rcnn
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.types import Calibration, ScoreMap
from ros2_ood_seg.weights.store import save_weights

CPU = Runtime(torch.device("cpu"))
CALIBRATION = Calibration((-10.0, 0.0), (0.0, 1.0))


class HotBox(nn.Module):
    """Answers with the tight box around what exceeds a level, and remembers its input."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level
        self.seen: list[Tensor] = []
        self.roi_heads = nn.Module()
        self.roi_heads.nms_thresh = 0.5  # type: ignore[assignment]

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (image,) = images
        self.seen.append(image)
        rows, columns = torch.nonzero(image[0] > self.level, as_tuple=True)
        if not len(rows):
            return [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}]
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        return [{"boxes": box[None], "scores": torch.tensor([0.9])}]


def score_map(boxes: list[tuple[int, int, int, int]], height: int = 120, width: int = 240, hot: float = -1.0) -> ScoreMap:
    scores = torch.full((height, width), -9.0)
    for x0, y0, x1, y1 in boxes:
        scores[y0:y1, x0:x1] = hot
    return ScoreMap(scores, "test", CALIBRATION)


def generator(mode: str = "calibrated", input_width: int = 0, **settings: object) -> tuple[RcnnBoxes, HotBox]:
    detector = HotBox(0.5 if mode == "calibrated" else -5.0)
    map_input = MapInput.calibrated() if mode == "calibrated" else MapInput.published()
    return RcnnBoxes(Detector(detector, map_input, input_width), BoxPromptsConfig(**settings), CPU), detector


@pytest.mark.parametrize(("mode", "cold", "hot"), [("raw", -9.0, -1.0), ("calibrated", 0.1, 0.9)])
def test_detector_sees_the_scores_its_weights_were_trained_on(mode: str, cold: float, hot: float) -> None:
    generate, detector = generator(mode)
    prompts = generate(score_map([(30, 10, 90, 50)]))
    assert prompts.boxes_xyxy.tolist() == [[30, 10, 90, 50]]
    assert prompts.confidence.tolist() == pytest.approx([0.9])
    assert prompts.num_points == 0
    assert detector.seen[0].shape == (1, 120, 240)
    assert detector.seen[0].unique().tolist() == pytest.approx([cold, hot])


@pytest.mark.parametrize("input_width", [120, 480])
def test_boxes_come_back_in_the_maps_pixels(input_width: int) -> None:
    generate, detector = generator(input_width=input_width)
    boxes = generate(score_map([(30, 10, 90, 50)])).boxes_xyxy
    assert detector.seen[0].shape == (1, input_width // 2, input_width)
    torch.testing.assert_close(boxes, torch.tensor([[30.0, 10.0, 90.0, 50.0]]), atol=2.0, rtol=0)


def test_setting_overrides_the_width_of_the_weights() -> None:
    detector = HotBox(0.5)
    RcnnBoxes(Detector(detector, MapInput.calibrated(), 480), BoxPromptsConfig(input_width=60), CPU)(score_map([]))
    assert detector.seen[0].shape == (1, 30, 60)


def test_empty_map_gives_no_boxes() -> None:
    prompts = generator()[0](score_map([]))
    assert len(prompts) == 0
    assert prompts.boxes_xyxy.shape == (0, 4)
    ignore = torch.ones(120, 240, dtype=torch.bool)
    assert len(generator(tiles=2)[0](score_map([]), ignore)) == 0


@pytest.mark.parametrize("mode", ["raw", "calibrated"])
def test_ignored_pixels_score_zero_and_boxes_mostly_inside_are_dropped(mode: str) -> None:
    generate, detector = generator(mode)
    ignore = torch.zeros(120, 240, dtype=torch.bool)
    ignore[:, 100:] = True
    prompts = generate(score_map([(30, 10, 90, 50), (150, 60, 200, 100)]), ignore)
    assert prompts.boxes_xyxy.tolist() == [[30, 10, 90, 50]]
    assert detector.seen[0][0, 80, 170].item() == pytest.approx(0.0 if mode == "calibrated" else -10.0)

    class Fixed(HotBox):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": torch.tensor([[80.0, 0.0, 110.0, 20.0], [95.0, 0.0, 120.0, 20.0]]), "scores": torch.tensor([0.9, 0.8])}]

    fixed = RcnnBoxes(Detector(Fixed(0.5), MapInput.calibrated(), 0), BoxPromptsConfig(), CPU)
    assert fixed(score_map([]), ignore).boxes_xyxy.tolist() == [[80, 0, 110, 20]]


def test_tiles_enlarge_and_drop_what_their_borders_cut() -> None:
    generate, detector = generator(input_width=240, tiles=2)
    # One small object in the upper right tile alone, the other across all of them.
    boxes = generate(score_map([(200, 10, 210, 16)])).boxes_xyxy
    # A tile covers 4/7 of each side.
    assert [tuple(x.shape[1:]) for x in detector.seen] == [(120, 240)] + [(121, 240)] * 4
    torch.testing.assert_close(boxes, torch.tensor([[200.0, 10.0, 210.0, 16.0]]), atol=1.0, rtol=0)
    across = generate(score_map([(20, 10, 220, 110)])).boxes_xyxy
    assert across.tolist() == [[20, 10, 220, 110]]


@pytest.mark.parametrize("place", [(0, 51, 1, 53), (239, 51, 240, 53), (101, 0, 103, 1), (101, 119, 103, 120)])
def test_tiles_keep_what_lies_at_the_maps_own_border(place: tuple[int, int, int, int]) -> None:
    generate, _ = generator(input_width=120, tiles=3)
    assert len(generator(input_width=120)[0](score_map([place]))) == 0, "too small in the shrunk map"
    boxes = generate(score_map([place])).boxes_xyxy
    torch.testing.assert_close(boxes, torch.tensor([place]).float(), atol=1.5, rtol=0)


@given(seed=st.integers(0, 2**16), count=st.integers(0, 5))
def test_ignored_fraction_is_that_of_the_boxes_pixels(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(1, 30)), int(rng.integers(1, 30))
    ignore = rng.random((height, width)) < 0.5
    # Boxes of at least half a pixel inside the map.
    low, high = np.sort(rng.random((2, count, 2)) * [width, height], axis=0)
    low, high = np.minimum(low, [width - 0.5, height - 0.5]), np.maximum(high, low + 0.5).clip(max=[width, height])
    found = _ignored_fraction(torch.from_numpy(np.hstack([low, high])), torch.from_numpy(ignore))
    expected = [
        ignore[int(np.floor(y0)) : int(np.ceil(y1)), int(np.floor(x0)) : int(np.ceil(x1))].mean()
        for (x0, y0), (x1, y1) in zip(low, high, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_tiles_of_a_detector_without_a_width_are_as_wide_as_the_map() -> None:
    generate, detector = generator("raw", tiles=2)
    generate(score_map([(200, 10, 210, 16)]))
    assert [tuple(x.shape[1:]) for x in detector.seen] == [(120, 240)] + [(121, 240)] * 4


def at_road_end(boxes: list[tuple[int, int, int, int]]) -> ScoreMap:
    return dataclasses.replace(score_map(boxes), road_end=(0.5, 0.5))


def test_the_end_of_the_road_is_looked_at_in_the_maps_own_pixels() -> None:
    tiny = (119, 58, 121, 60)
    generate, detector = generator(input_width=120)
    assert len(generate(score_map([tiny]))) == 0, "too small in the shrunk map"
    assert generate(at_road_end([tiny])).boxes_xyxy.tolist() == [[*tiny]]
    assert [tuple(x.shape[1:]) for x in detector.seen] == [(60, 120), (60, 120), (36, 120)]


def test_large_objects_are_found_in_the_whole_map_alone() -> None:
    generate, detector = generator(input_width=120)
    boxes = generate(at_road_end([(100, 50, 140, 65)])).boxes_xyxy
    assert len(detector.seen) == 2
    torch.testing.assert_close(boxes, generate(score_map([(100, 50, 140, 65)])).boxes_xyxy)


@pytest.mark.parametrize("settings", [{"zoom": 0.0}, {"input_width": 200}, {"input_width": 0}])
def test_no_closer_look_where_it_shows_nothing_more(settings: dict[str, float]) -> None:
    generate, detector = generator(**{"input_width": 120, **settings})
    generate(at_road_end([(100, 50, 140, 65)]))
    assert len(detector.seen) == 1


def test_margin_widens_within_the_image() -> None:
    generate, _ = generator(margin=0.5)
    assert generate(score_map([(10, 20, 50, 40)])).boxes_xyxy.tolist() == [[0, 10, 70, 50]]


def test_weights_of_another_mode_are_refused() -> None:
    with pytest.raises(InputError, match="input_mode is 'raw' but the weights were trained on 'calibrated'"):
        generator(input_mode="raw")


@pytest.fixture(params=[("compact", compact_rcnn), ("mobilenet_v3", mobilenet_rcnn)], ids=lambda network: network[0])
def small_weights(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    name, make = request.param
    path = tmp_path / "generator.safetensors"
    save_weights(path, make().state_dict(), {"network": name, "map_input": MapInput.calibrated().to_dict(), "input_width": 96})
    return path


@pytest.mark.parametrize("factory", [build, build_compact])
def test_weights_file_says_which_network_it_is(factory: Callable[..., RcnnBoxes], small_weights: Path) -> None:
    generate = factory(BoxPromptsConfig(weights=str(small_weights), min_confidence=0.0, max_boxes=5), CPU)
    prompts = generate(score_map([(30, 10, 90, 50)]))
    assert 1 <= prompts.num_boxes <= 5
    assert (prompts.confidence.diff() <= 0).all()
    assert (prompts.boxes_xyxy >= 0).all()
    assert (prompts.boxes_xyxy[:, 2] <= 240).all()
    assert (prompts.boxes_xyxy[:, 3] <= 120).all()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no prompt generator"),
        ({"network": "other", "map_input": MapInput.calibrated().to_dict(), "input_width": 96}, "prompt generator 'other'"),
        ({"network": "s2m", "map_input": MapInput.published().to_dict(), "input_width": 0}, "not of the family"),
    ],
)
def test_other_weights_are_refused(metadata: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(path, compact_rcnn().state_dict(), metadata)
    with pytest.raises(WeightsError, match=message):
        build_compact(BoxPromptsConfig(weights=str(path)), CPU)


def test_both_names_are_registered() -> None:
    assert BOX_PROMPTS.get("faster_rcnn") is build
    assert BOX_PROMPTS.get("compact_rcnn") is build_compact


def test_boxes_keep_their_digits_in_bfloat16() -> None:
    found = score_map([(1000, 500, 1100, 580), (300, 400, 340, 430)], 720, 1280, hot=6.0)
    exact, half = (
        BOX_PROMPTS.get("compact_rcnn")(BoxPromptsConfig(method="compact_rcnn"), Runtime(torch.device("cpu"), dtype))(found, None)
        for dtype in (None, torch.bfloat16)
    )
    assert len(exact) > 0
    torch.testing.assert_close(half.boxes_xyxy, exact.boxes_xyxy, rtol=0, atol=1e-3)
