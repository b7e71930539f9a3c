from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.types import Calibration, Instances, ScoreMap
from ros2_ood_seg.visualization.overlay import draw_legend, draw_overlay, heat_map, instance_color, side_by_side


def make_instances(height: int, width: int, boxes: list[tuple[int, int, int, int]]) -> Instances:
    masks = torch.zeros((len(boxes), height, width), dtype=torch.bool)
    for mask, (x_min, y_min, x_max, y_max) in zip(masks, boxes, strict=True):
        mask[y_min:y_max, x_min:x_max] = True
    scores = torch.ones(len(boxes))
    return Instances.from_masks(masks, scores, scores, scores)


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def test_tint_is_the_stated_blend_inside_and_nothing_outside_is_touched():
    image = gray(200, 300)
    overlay = draw_overlay(image, make_instances(200, 300, [(100, 80, 180, 150)]), alpha=0.5, labels=False)
    assert np.abs(overlay[115, 140].astype(int) - (np.array([100] * 3) + np.array(instance_color(1))) / 2).max() <= 1
    outside = np.ones((200, 300), bool)
    outside[76:154, 96:184] = False
    assert (overlay[outside] == 100).all()
    assert (image == 100).all(), "the input picture must stay as it is"


def test_likely_instances_are_tinted_more():
    sure = make_instances(200, 300, [(100, 80, 180, 150)])
    unsure = Instances(**{**sure.__dict__, "scores": torch.zeros(1)})
    change = [
        int(np.abs(draw_overlay(gray(200, 300), i, faint_below=0.0, labels=False)[115, 140].astype(int) - 100).max())
        for i in (sure, unsure)
    ]
    assert change[0] == pytest.approx(4 * change[1], abs=4)


def test_unlikely_instances_are_only_outlined():
    unsure = Instances(**{**make_instances(200, 300, [(100, 80, 180, 150)]).__dict__, "scores": torch.tensor([0.2])})
    changed = (draw_overlay(gray(200, 300), unsure) != 100).any(axis=2)
    assert changed[80, 100:180].all()
    assert changed.sum() <= 2 * (80 + 70), "one pixel wide, no label"


def test_contour_and_box_have_the_instance_color():
    mask = torch.zeros((1, 400, 400), dtype=torch.bool)
    yy, xx = np.mgrid[:400, :400]
    mask[0] = torch.from_numpy((xx - 200) ** 2 + (yy - 200) ** 2 < 80**2)
    one = torch.ones(1)
    overlay = draw_overlay(gray(400, 400), Instances.from_masks(mask, one, one, one), labels=False)
    assert tuple(overlay[121, 150]) == instance_color(1), "box edge"
    row = overlay[200]
    assert any(tuple(row[x]) == instance_color(1) for x in range(119, 125)), "contour at the left edge of the disc"


@pytest.mark.parametrize("score", [1.0, 0.2])
def test_rows_and_columns_are_drawn_alike(score):
    boxes = [(10, 90, 30, 190), (120, 5, 130, 60)]
    upright, lying = (
        Instances(**{**make_instances(200, 200, rectangles).__dict__, "scores": torch.full((2,), score)})
        for rectangles in (boxes, [(y0, x0, y1, x1) for x0, y0, x1, y1 in boxes])
    )
    glow = torch.linspace(0, 1, 40_000).reshape(200, 200)
    drawn = draw_overlay(gray(200, 200), upright, glow, labels=False)
    np.testing.assert_array_equal(drawn, draw_overlay(gray(200, 200), lying, glow.T.contiguous(), labels=False).transpose(1, 0, 2))


def test_legend_shades_the_lower_left_corner():
    changed = (draw_legend(gray(200, 300), "caption") != 100).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert rows.min() > 150
    assert (columns.min(), columns.max()) < (20, 150)
    # A dark rectangle with bright text on it, all of it changed.
    assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    bar = (draw_legend(gray(200, 300), "caption", color_bar=True) != 100).any(axis=2)
    assert np.nonzero(bar & ~changed)[0].max() < rows.min()
    assert (bar & ~changed).any(axis=0).sum() == 300 // 4


def test_best_instance_stays_on_top():
    instances = make_instances(100, 100, [(20, 20, 80, 80), (30, 30, 70, 70)])
    overlay = draw_overlay(gray(100, 100), instances, alpha=1.0, labels=False)
    assert tuple(overlay[50, 50]) == instance_color(1)


def test_color_follows_the_track():
    instances = make_instances(100, 100, [(20, 20, 80, 80)])
    tracked = Instances(**{**instances.__dict__, "track_ids": torch.tensor([4])})
    overlay = draw_overlay(gray(100, 100), tracked, alpha=1.0, labels=False)
    assert tuple(overlay[50, 50]) == instance_color(4)


@pytest.mark.parametrize(("height", "width"), [(360, 480), (1080, 1920)])
def test_label_stays_inside_the_picture_at_all_borders(height, width):
    corners = [(0, 0, 30, 30), (width - 30, 0, width, 30), (0, height - 30, 30, height), (width - 30, height - 30, width, height)]
    for box in corners:
        plain = draw_overlay(gray(height, width), make_instances(height, width, [box]), labels=False)
        tagged = draw_overlay(gray(height, width), make_instances(height, width, [box]), labels=True)
        changed = np.argwhere((plain != tagged).any(axis=2))
        extent = changed.max(axis=0) - changed.min(axis=0)
        assert extent[0] >= 8, "text is at least eight pixels high"
        assert extent[1] > 2 * extent[0], "the whole label is visible"


def test_glow_uses_calibrated_scores():
    scores = torch.zeros((50, 60))
    scores[:, 30:] = 10.0
    score_map = ScoreMap(scores, "test", Calibration.linear(0.0, 10.0))
    overlay = draw_overlay(gray(50, 60), Instances.empty((50, 60)), score_map, heat_alpha=1.0)
    assert (overlay[:, :30] == 100).all()
    assert (overlay[0, 59] == heat_map(np.ones((1, 1), np.float32))[0, 0]).all()
    assert (overlay == draw_overlay(gray(50, 60), Instances.empty((50, 60)), score_map.calibrated(), heat_alpha=1.0)).all()


def test_heat_map_gets_brighter_and_saturates():
    colors = heat_map(np.linspace(-1.0, 3.0, 41, dtype=np.float64)[None], low=0.0, high=2.0)[0].astype(int)
    luminance = colors @ np.array([299, 587, 114])
    assert (np.diff(luminance) >= 0).all()
    assert (colors[0] == colors[10]).all()
    assert (colors[-1] == colors[30]).all()
    assert luminance[30] > 5 * luminance[10] + 1000


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_masks_can_be_drawn(height, width, count, seed):
    rng = np.random.default_rng(seed)
    masks = torch.from_numpy(rng.random((count, height, width)) < rng.random((count, 1, 1)))
    scores = torch.from_numpy(rng.random(count).astype(np.float32))
    instances = Instances.from_masks(masks, scores, scores, scores)
    overlay = draw_overlay(gray(height, width), instances, torch.zeros((height, width)))
    assert overlay.shape == (height, width, 3)
    assert overlay.dtype == np.uint8
    assert draw_legend(overlay, "caption", color_bar=True).shape == overlay.shape


def test_grid_holds_each_panel():
    panels = [np.full((90, 160, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = side_by_side(panels, columns=2)
    assert grid.shape == (2 * 90 + 2, 2 * 160 + 2, 3)
    assert (grid[45, 80] == 10).all()
    assert (grid[45, 250] == 20).all()
    assert (grid[140, 80] == 30).all()
    assert (grid[140, 250] == 255).all()
    assert side_by_side(panels, ["a", "b", "c"], panel_width=80).shape == (45, 3 * 80 + 2 * 2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: draw_overlay(gray(10, 12), Instances.empty((10, 11))),
        lambda: draw_overlay(gray(10, 12)[..., :1], Instances.empty((10, 12))),
        lambda: draw_overlay(gray(10, 12), Instances.empty((10, 12)), torch.zeros((9, 12))),
        lambda: heat_map(np.zeros((2, 2, 2))),
        lambda: heat_map(np.zeros((2, 2)), 1.0, 1.0),
        lambda: side_by_side([]),
        lambda: side_by_side([gray(4, 4)], ["a", "b"]),
    ],
)
def test_unusable_input_is_named(call):
    with pytest.raises(InputError):
        call()
