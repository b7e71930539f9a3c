from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ros2_ood_seg.segmenters.windows import MAX_ASPECT, Window, box_window, clip_box, cut_window, point_window, prompt_maps

any_float = st.floats(allow_nan=True, allow_infinity=True, width=32)
some_float = st.floats(-300, 300, width=32)


@given(st.tuples(any_float, any_float, any_float, any_float), st.integers(1, 90), st.integers(1, 90))
def test_clipped_boxes_lie_inside_and_have_area(box: tuple[float, float, float, float], height: int, width: int) -> None:
    clipped = clip_box(box, (height, width))
    if clipped is not None:
        x0, y0, x1, y1 = clipped
        assert 0 <= x0 <= x1 - 1 + 1e-6
        assert 0 <= y0 <= y1 - 1 + 1e-6
        assert x1 <= width
        assert y1 <= height


def test_slivers_get_one_pixel_inside_the_image() -> None:
    assert clip_box((39.5, 29.5, 45.0, 35.0), (30, 40)) == (39.0, 29.0, 40.0, 30.0)
    assert clip_box((2.0, 3.0, 2.5, 3.25), (30, 40)) == (2.0, 3.0, 3.0, 4.0)


@given(st.tuples(some_float, some_float, some_float, some_float), st.integers(1, 90), st.integers(1, 90))
def test_a_clipped_box_is_the_part_in_the_image_and_no_larger_than_it_must_be(
    box: tuple[float, float, float, float], height: int, width: int
) -> None:
    part = max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height)
    clipped = clip_box(box, (height, width))
    assert (clipped is None) == (part[0] >= part[2] or part[1] >= part[3])
    if clipped is not None:
        for k in (0, 1):
            assert clipped[k] <= part[k]
            assert clipped[k + 2] >= part[k + 2]
            assert clipped[k + 2] - clipped[k] == pytest.approx(max(1.0, part[k + 2] - part[k]))


@pytest.mark.parametrize(
    "box", [(float("nan"), 0, 9, 9), (0, 0, float("inf"), 9), (5, 5, 5, 9), (9, 5, 3, 9), (40, 0, 50, 9), (-9, -9, 0, 0)]
)
def test_boxes_without_area_in_the_image_are_refused(box: tuple[float, float, float, float]) -> None:
    assert clip_box(box, (30, 40)) is None


@given(some_float, some_float, st.floats(1, 200), st.floats(1, 200))
def test_a_window_holds_its_box_with_context_and_is_not_too_long(x: float, y: float, width: float, height: float) -> None:
    window = box_window((x, y, x + width, y + height))
    assert window.x <= x - 0.2 * width
    assert window.x + window.width >= x + 1.2 * width
    assert window.y <= y - 0.2 * height
    assert window.y + window.height >= y + 1.2 * height
    assert max(window.width, window.height) <= MAX_ASPECT * min(window.width, window.height) + 2


def test_windows_of_long_boxes_are_half_as_wide_as_long() -> None:
    assert box_window((10.0, 20.0, 110.0, 30.0)) == Window(-14, -14, 148, 78)
    assert box_window((20.0, 10.0, 30.0, 110.0)) == Window(-14, -14, 78, 148)
    assert box_window((10.0, 20.0, 70.0, 60.0)) == Window(-6, 8, 92, 64)


def test_windows_end_at_the_next_whole_pixels() -> None:
    # 91.72 px by 63.44 px around (40.2, 40.4).
    assert box_window((10.3, 20.6, 70.1, 60.2)) == Window(-6, 8, 93, 65)


def test_a_window_outside_the_image_holds_nothing_of_it() -> None:
    assert Window(50, 3, 4, 5).clipped((20, 30)) == (slice(3, 8), slice(30, 30))
    assert Window(-9, 3, 4, 5).clipped((20, 30)) == (slice(3, 8), slice(0, 0))
    assert Window(3, 40, 4, 5).clipped((20, 30)) == (slice(20, 20), slice(3, 7))
    assert Window(3, -9, 4, 5).clipped((20, 30)) == (slice(0, 0), slice(3, 7))


def test_box_to_crop_and_back() -> None:
    window = Window(-10, 20, 40, 80)
    assert window.box_to_crop((-10, 20, 30, 100), 160) == (0, 0, 160, 160)
    assert window.box_from_crop(window.box_to_crop((3, 25, 17, 60), 160), 160) == pytest.approx((3, 25, 17, 60))


def test_a_point_window_is_centred_on_the_pixel() -> None:
    assert point_window(10, 20, 5) == Window(8, 18, 5, 5)
    assert point_window(10, 20, 0.3) == Window(10, 20, 1, 1)
    assert point_window(10.2, 20.3, 5.6) == Window(8, 18, 6, 6)


def test_cutting_at_the_same_size_copies_and_pads_with_grey() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    crop = cut_window(image, Window(-4, 6, 16, 16), 16)
    assert crop.shape == (3, 16, 16)
    expected = (image[6:20, 0:12].permute(2, 0, 1).float() - 127.5) / 127.5
    torch.testing.assert_close(crop[:, :14, 4:], expected)
    assert crop[:, :, :4].abs().max() < 0.005
    assert crop[:, 14:].abs().max() < 0.005


def test_windows_over_the_upper_right_corner_are_padded_there() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (20, 30, 3), dtype=np.uint8))
    crop = cut_window(image, Window(21, -5, 16, 16), 16)
    expected = (image[:11, 21:].permute(2, 0, 1).float() - 127.5) / 127.5
    torch.testing.assert_close(crop[:, 5:, :9], expected)
    assert crop[:, :5].abs().max() < 0.005
    assert crop[:, :, 9:].abs().max() < 0.005


def test_shrinking_averages() -> None:
    # One bright column and row in four: between the pixels next to the middle there would be none.
    grid = (((torch.arange(64)[:, None] % 4 == 0) ^ (torch.arange(64) % 4 == 0)) * 255).to(torch.uint8)
    crop = cut_window(grid[..., None].expand(-1, -1, 3), Window(0, 0, 64, 64), 16)
    assert crop.mean().item() == pytest.approx(2 * 6 / 16 - 1, abs=0.02)


def test_prompt_maps_cover_the_box_and_peak_at_the_point() -> None:
    nan = float("nan")
    boxes = torch.tensor([[2.25, 4.0, 10.5, 9.5], [nan] * 4])
    points = torch.tensor([[nan, nan], [12.5, 3.5]])
    maps = prompt_maps(boxes, points, 16)
    assert maps.shape == (2, 2, 16, 16)
    assert maps[0, 0].sum().item() == pytest.approx(8.25 * 5.5, rel=1e-5)
    assert maps[0, 0, 5, 2].item() == pytest.approx(0.75)
    assert maps[0, 1].abs().sum() == 0
    assert maps[1, 0].abs().sum() == 0
    assert maps[1, 1].argmax().item() == 3 * 16 + 12
    assert maps[1, 1, 3, 12].item() == pytest.approx(1.0)


def test_the_point_map_falls_with_its_sigma_in_both_directions() -> None:
    # 3 % of the crop, with which the bundled weights were trained.
    at_point = prompt_maps(torch.full((1, 4), float("nan")), torch.tensor([[20.5, 40.5]]), 100)[0, 1]
    for y, x, deviations in ((40, 23, 1.0), (40, 17, 1.0), (43, 20, 1.0), (37, 20, 1.0), (40, 26, 2.0), (46, 20, 2.0)):
        assert at_point[y, x].item() == pytest.approx(np.exp(-(deviations**2) / 2), rel=1e-4)
