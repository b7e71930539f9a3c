"""The end of the road is found, the window lies in the picture, and a closer look can only add."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ros2_ood_seg.zoom import WINDOW_HEIGHT, raise_to, road_end, window_at


def road(height: int = 80, width: int = 120) -> np.ndarray:
    """A road that runs from the whole lower edge to a point at 60 % of the width and 40 % of the height."""
    y, x = np.mgrid[:height, :width]
    near = (y / height - 0.4) / 0.6
    return (near > 0) & (np.abs(x / width - 0.6) < 0.5 * near)


def test_the_end_of_a_road() -> None:
    x, y = road_end(road())
    assert x == pytest.approx(0.6, abs=0.02)
    assert y == pytest.approx(0.42, abs=0.03)


def test_smaller_pieces_do_not_count() -> None:
    with_roof = road()
    with_roof[2:10, 5:40] = True
    assert road_end(with_roof) == road_end(road())


@pytest.mark.parametrize("row", [0, 40, 79])
def test_no_road_has_no_end(row: int) -> None:
    nothing = np.zeros((80, 120), bool)
    assert road_end(nothing) is None
    nothing[row, 7:10] = True
    assert road_end(nothing) is None, "a line of 3 pixels is no road"


@given(x=st.floats(0, 1), y=st.floats(0, 1), share=st.floats(0.01, 1.0), height=st.integers(1, 300), width=st.integers(1, 300))
def test_the_window_lies_in_the_picture(x: float, y: float, share: float, height: int, width: int) -> None:
    left, top, right, bottom = window_at((x, y), share, (height, width))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left == max(1, round(share * width))
    assert bottom - top == max(1, round(WINDOW_HEIGHT * share * height))


def test_the_window_holds_the_end() -> None:
    left, top, right, bottom = window_at((0.5, 0.4), 0.5, (1080, 1920))
    assert (left + right) / 2 == pytest.approx(960)
    assert top < 0.4 * 1080 < (top + bottom) / 2


@given(seed=st.integers(0, 2**16), left=st.integers(0, 20), top=st.integers(0, 15), width=st.integers(1, 20), height=st.integers(1, 15))
def test_a_closer_look_only_adds_and_only_inside(seed: int, left: int, top: int, width: int, height: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, closer = torch.randn(30, 40, generator=generator), torch.randn(height, width, generator=generator)
    raised = raise_to(scores, closer, (left, top, left + width, top + height))
    assert bool((raised >= scores).all())
    inside = torch.zeros_like(scores, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(raised[~inside], scores[~inside])
    assert bool((raised[inside] <= torch.maximum(scores[inside], closer.flatten()) + 1e-6).all())


def test_the_closer_look_counts_in_the_middle_and_fades_to_the_border() -> None:
    raised = raise_to(torch.zeros(60, 100), torch.ones(40, 80), (10, 10, 90, 50))
    assert float(raised[30, 50]) == 1.0
    assert 0.0 < float(raised[10, 10]) < 0.01
    assert bool((raised[30, 10:50].diff() >= 0).all())
