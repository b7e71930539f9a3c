from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ros2_ood_seg.config import SegmenterConfig
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.segmenters import SEGMENTERS
from ros2_ood_seg.segmenters.grabcut import GrabCutSegmenter
from ros2_ood_seg.types import Masks, Prompts


def segment(image: torch.Tensor, boxes: list[tuple[float, float, float, float]], points: list[tuple[float, float]]) -> Masks:
    prompts = Prompts(torch.tensor(boxes).reshape(-1, 4), torch.ones(len(boxes)), torch.tensor(points).reshape(-1, 2))
    segmenter = SEGMENTERS.get("grabcut")(SegmenterConfig(), Runtime(torch.device("cpu")))
    found = segmenter(image, prompts)
    assert isinstance(segmenter, GrabCutSegmenter)
    assert found.masks.shape == (len(prompts), *image.shape[:2])
    assert found.quality.isnan().all()
    return found


def scene(height: int = 180, width: int = 320) -> tuple[torch.Tensor, torch.Tensor]:
    """A textured red disc on a grey road, and its mask."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    inside = (x - 160) ** 2 + (y - 90) ** 2 < 25**2
    image = np.where(inside[..., None], [180, 60, 50], [100, 100, 105]) + rng.normal(0, 8, (height, width, 3))
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)), torch.from_numpy(inside)


def iou(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first & second).sum() / (first | second).sum())


def test_box_and_point_find_a_clear_object() -> None:
    image, truth = scene()
    found = segment(image, [(130.0, 60.0, 190.0, 120.0)], [(160.0, 90.0)])
    assert iou(found.masks[0], truth) > 0.9
    assert iou(found.masks[1], truth) > 0.9


def test_the_same_frame_gives_the_same_masks_whatever_came_before() -> None:
    image, _ = scene()
    first = segment(image, [(130.0, 60.0, 190.0, 120.0)], [(160.0, 90.0)]).masks
    cv2.setRNGSeed(99)
    swapped = segment(image, [(10.0, 10.0, 90.0, 70.0), (130.0, 60.0, 190.0, 120.0)], [(20.0, 20.0), (160.0, 90.0)]).masks
    assert torch.equal(first, swapped[[1, 3]])


@pytest.mark.parametrize("box", [(0, 60, 1920, 63), (0, 200, 1920, 212), (0, 0, 1920, 30), (700, 0, 708, 1080), (0, 0, 1920, 1080)])
def test_a_strip_of_the_whole_picture_is_no_error(box: tuple[float, float, float, float]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (1080, 1920, 3), dtype=np.uint8))
    assert segment(image, [box], []).masks[0].any()


def test_a_mask_stays_in_its_box() -> None:
    image, _ = scene()
    mask = segment(image, [(140.0, 60.0, 170.0, 100.0)], []).masks[0]
    assert mask[60:100, 140:170].sum() == mask.sum()
    assert mask.any()


def test_a_box_without_contrast_is_an_ellipse_and_not_nothing() -> None:
    flat = torch.full((100, 160, 3), 90, dtype=torch.uint8)
    mask = segment(flat, [(40.0, 30.0, 100.0, 70.0)], []).masks[0]
    assert 0.35 * 2400 < mask.sum() <= 2400
    y, x = np.mgrid[:100, :160] + 0.5
    ellipse = ((x - 70) / 30) ** 2 + ((y - 50) / 20) ** 2 <= 1
    assert iou(mask, torch.from_numpy(ellipse)) > 0.97


@pytest.mark.parametrize("box", [(20, 30, 22, 90), (200, 100, 290, 102), (318, 178, 320, 180)])
def test_a_box_of_two_pixels_is_taken_whole(box: tuple[int, int, int, int]) -> None:
    x_min, y_min, x_max, y_max = box
    mask = segment(scene()[0], [box], []).masks[0]
    assert mask.sum() == (x_max - x_min) * (y_max - y_min) == mask[y_min:y_max, x_min:x_max].sum()


def test_an_object_far_from_the_corner_is_cut_where_it_is() -> None:
    # High and low, near and far from the upper left corner, in a window that is shrunk in between.
    picture = np.full((900, 1400, 3), 100, np.uint8)
    picture += np.random.default_rng(0).integers(0, 12, picture.shape, dtype=np.uint8)
    truth = np.zeros((900, 1400), bool)
    truth[150:800, 1020:1180] = True
    picture[truth] = (190, 60, 40)
    mask = segment(torch.from_numpy(picture), [(960.0, 100.0, 1240.0, 850.0)], []).masks[0]
    assert iou(mask, torch.from_numpy(truth)) > 0.85


def quarters(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(4 * low, 4 * high).map(lambda value: value / 4)


@settings(deadline=None, max_examples=25)
@given(
    box=st.tuples(quarters(-50, 150), quarters(-50, 110), quarters(-50, 150), quarters(-50, 110)),
    point=st.tuples(quarters(-20, 140), quarters(-20, 100)),
)
def test_any_box_and_point_are_survived(box: tuple[float, float, float, float], point: tuple[float, float]) -> None:
    image = scene()[0][50:130, 100:220].contiguous()
    found = segment(image, [box], [point]).masks
    x_min, y_min, x_max, y_max = box
    if x_max <= 0 or y_max <= 0 or x_min >= 120 or y_min >= 80:
        assert not found[0].any()
    elif x_max - x_min > 1 and y_max - y_min > 1:
        assert found[0].any()
    if 0 <= point[0] <= 119 and 0 <= point[1] <= 79:
        assert found[1, round(point[1]), round(point[0])]


def test_a_box_around_the_whole_image() -> None:
    image, _ = scene()
    assert segment(image, [(0.0, 0.0, 320.0, 180.0)], []).masks.any()


def test_without_prompts_there_are_no_masks() -> None:
    assert len(segment(scene()[0], [], [])) == 0


@pytest.mark.parametrize("stem", ["21077", "86016", "189080"])
def test_real_objects_given_their_box(shared_dir: Path, stem: str) -> None:
    folder = shared_dir / "data" / "objects" / "grabcut"
    picture = cv2.imread(str(next((folder / "images").glob(f"{stem}.*"))))
    label = cv2.imread(str(next((folder / "masks").glob(f"{stem}.*"))), cv2.IMREAD_GRAYSCALE)
    assert picture is not None
    assert label is not None
    y, x = np.nonzero(label == 255)
    box = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
    found = segment(torch.from_numpy(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)), [box], []).masks[0]
    valid = torch.from_numpy(label != 128)
    assert iou(found & valid, torch.from_numpy(label == 255)) > 0.6
