from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.config import SegmenterConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.segmenters import SEGMENTERS
from ros2_ood_seg.segmenters.compact import CompactSegmenter, View, _extent, from_network, network_input
from ros2_ood_seg.segmenters.networks.compact import CompactNet
from ros2_ood_seg.segmenters.windows import point_window
from ros2_ood_seg.types import Prompts, boxes_from_masks
from ros2_ood_seg.weights import save_weights

CPU = Runtime(torch.device("cpu"))
NAN = float("nan")


class PromptEcho(CompactNet):
    """Returns the prompts as masks: what goes in must come out at the same place of the image."""

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        maps = F.avg_pool2d(crops[:, 3:].amax(dim=1, keepdim=True), 2)
        return maps - 0.5, maps.mean(dim=(1, 2, 3))


class BrightNet(CompactNet):
    """Masks what is bright; the better it fills the box the surer (``sign`` 1) or the less sure it is. Keeps the crops it sees."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign
        self.seen: list[Tensor] = []

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += crops
        masks, boxes = F.avg_pool2d(crops[:, :1], 2), crops[:, 3]
        return masks, self.sign * (crops[:, 0] > 0).float().mean(dim=(1, 2)) / boxes.mean(dim=(1, 2))


class ScriptedNet(CompactNet):
    """Masks what is bright; how sure it is of the crops of each call is given beforehand, then always the same. Keeps its crops."""

    def __init__(self, *quality: list[float]) -> None:
        super().__init__()
        self.quality_of_calls = list(quality)
        self.seen: list[Tensor] = []

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(crops)
        quality = torch.tensor(self.quality_of_calls.pop(0)) if self.quality_of_calls else torch.zeros(len(crops))
        return F.avg_pool2d(crops[:, :1], 2), quality


@pytest.fixture(scope="module")
def segmenter() -> CompactSegmenter:
    torch.manual_seed(0)
    return from_network(CompactNet(), CPU, batch_size=3)


@pytest.fixture(scope="module")
def echo() -> CompactSegmenter:
    return from_network(PromptEcho(), CPU)


def some_image(height: int = 90, width: int = 120) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def some_prompts() -> Prompts:
    boxes = torch.tensor([[10.0, 10, 50, 60], [60, 5, 110, 30], [80, 50, 119, 89], [0, 0, 120, 90]])
    return Prompts(boxes, torch.ones(4), torch.tensor([[20.0, 20], [100, 80]]))


def test_one_mask_per_prompt_boxes_first(segmenter: CompactSegmenter) -> None:
    image, prompts = some_image(), some_prompts()
    result = segmenter(image, prompts)
    assert result.masks.shape == (6, 90, 120)
    assert result.masks.dtype == torch.bool
    assert result.quality.shape == (6,)
    assert ((result.quality >= 0) & (result.quality <= 1)).all()
    boxes = segmenter(image, Prompts.from_boxes(prompts.boxes_xyxy, prompts.confidence))
    points = segmenter(image, Prompts.from_points(prompts.points_xy))
    # The convolutions of another batch size round in another order.
    assert (result.masks[:4] != boxes.masks).float().mean() < 1e-3
    assert (result.masks[4:] != points.masks).float().mean() < 1e-3
    torch.testing.assert_close(result.quality, torch.cat([boxes.quality, points.quality]), atol=1e-3, rtol=0)


def test_the_order_of_prompts_is_kept(segmenter: CompactSegmenter) -> None:
    image, prompts = some_image(), some_prompts()
    forward = segmenter(image, prompts)
    turned = segmenter(image, Prompts(prompts.boxes_xyxy.flip(0), prompts.confidence, prompts.points_xy.flip(0)))
    assert (forward.masks[:4].flip(0) != turned.masks[:4]).float().mean() < 1e-3
    assert (forward.masks[4:].flip(0) != turned.masks[4:]).float().mean() < 1e-3


def test_the_same_again(segmenter: CompactSegmenter) -> None:
    first, second = (segmenter(some_image(), some_prompts()) for _ in range(2))
    assert torch.equal(first.masks, second.masks)
    assert torch.equal(first.quality, second.quality)


def test_no_prompts_no_masks(segmenter: CompactSegmenter) -> None:
    result = segmenter(some_image(), Prompts.empty())
    assert result.masks.shape == (0, 90, 120)
    assert result.quality.shape == (0,)


def test_unusable_prompts_get_empty_masks(echo: CompactSegmenter) -> None:
    boxes = torch.tensor([[NAN, 0, 9, 9], [5, 5, 5, 20], [200, 10, 300, 40], [10, 10, 40, 40], [0, 0, float("inf"), 9]])
    points = torch.tensor([[NAN, 3], [-5, 3], [120, 20], [119.5, 20], [60, 89.5], [60, 40], [-0.5, -0.5]])
    result = echo(some_image(), Prompts(boxes, torch.ones(5), points))
    assert result.masks.flatten(1).any(dim=1).tolist() == [False, False, False, True, *[False] * 6, True, True]
    assert (result.quality > 0).tolist() == result.masks.flatten(1).any(dim=1).tolist()


@pytest.mark.parametrize(
    "box", [(10, 20, 50, 60), (30, 5, 34, 85), (3, 40, 117, 47), (0, 0, 120, 90), (60, 40, 66, 44), (-20, -20, 30, 30), (100, 70, 400, 300)]
)
def test_masks_come_back_to_where_they_were_cut(echo: CompactSegmenter, box: tuple[float, float, float, float]) -> None:
    result = echo(some_image(), Prompts.from_boxes(torch.tensor([box]).float(), torch.ones(1)))
    expected = torch.tensor([max(box[0], 0), max(box[1], 0), min(box[2], 120), min(box[3], 90)]).float()
    found, area = boxes_from_masks(result.masks)
    assert (found[0] - expected).abs().max() <= 1
    inside = (expected[2] - expected[0]) * (expected[3] - expected[1])
    assert area[0] == pytest.approx(float(inside), rel=0.15)


def test_masks_of_large_windows_are_not_stretched(echo: CompactSegmenter) -> None:
    box = [200.0, 150, 600, 550]
    found, _ = boxes_from_masks(echo(some_image(800, 1000), Prompts.from_boxes(torch.tensor([box]), torch.ones(1))).masks)
    assert (found[0] - torch.tensor(box)).abs().max() <= 1


def test_points_lie_at_the_centres_of_pixels() -> None:
    at_point = network_input(some_image(), [View(point_window(10, 20, 5), point_xy=(10, 20))], 40)[0, 4]
    assert at_point.max() > 0.5
    torch.testing.assert_close(at_point, at_point.flip(0, 1))


def test_a_point_is_looked_for_in_three_windows_and_the_surest_answer_is_segmented_with_it() -> None:
    image = torch.zeros(100, 160, 3, dtype=torch.uint8)
    image[20:70, 40:100] = 255
    network = ScriptedNet([0.1, 0.9, 0.5], [0.7])
    result = from_network(network, CPU)(image, Prompts.from_points(torch.tensor([[70.0, 45]])))
    # No box was asked about, so none is tried again, though the mask is larger than that of the surest window.
    rough, fine = network.seen
    assert rough.shape == (3, 5, 128, 128)
    assert fine.shape == (1, 5, 192, 192)
    # Windows of a tenth, three and nine tenths of the height; only the largest one reaches over the object.
    assert (rough[:, 0] > 0).float().mean(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0, 50 * 60 / 90**2], abs=0.02)
    assert not rough[:, 3].any()
    assert (rough[:, 4].amax(dim=(1, 2)) > 0.9).all()
    # The box of the middle one, 30 px wide, in its window of 50 px.
    assert fine[0, 3].mean().item() == pytest.approx((30 / 50) ** 2, abs=0.02)
    assert fine[0, 4].max() > 0.9
    assert result.quality.item() == pytest.approx(torch.tensor(0.7).sigmoid().item())
    assert boxes_from_masks(result.masks)[0][0].tolist() == pytest.approx([46, 20, 96, 70], abs=1)


def test_a_point_at_nothing_gets_an_empty_mask() -> None:
    network = ScriptedNet()
    result = from_network(network, CPU)(torch.zeros(100, 160, 3, dtype=torch.uint8), Prompts.from_points(torch.tensor([[70.0, 45]])))
    assert len(network.seen) == 1
    assert not result.masks.any()
    assert result.quality.tolist() == [0.0]


def test_a_point_is_looked_for_around_itself(echo: CompactSegmenter) -> None:
    result = echo(some_image(200, 300), Prompts.from_points(torch.tensor([[40.0, 150], [299, 0]])))
    assert result.masks[0, 150, 40]
    assert result.masks[1, 0, 299]
    ys, xs = torch.nonzero(result.masks[0], as_tuple=True)
    assert abs(xs.float().mean() - 40) < 2
    assert abs(ys.float().mean() - 150) < 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_box_that_does_not_fit_its_mask_is_tried_again(sign: float) -> None:
    image = torch.zeros(90, 120, 3, dtype=torch.uint8)
    image[20:50, 30:70] = 255
    fitting, large, empty = [30.0, 20, 70, 50], [20.0, 10, 90, 70], [90.0, 60, 110, 80]

    def segment(*boxes: list[float]) -> tuple[list[float], list[Tensor], Tensor]:
        network = BrightNet(sign)
        found = from_network(network, CPU)(image, Prompts.from_boxes(torch.tensor(boxes), torch.ones(len(boxes))))
        return found.quality.tolist(), network.seen, found.masks

    (sure,), crops, masks = segment(fitting)
    assert len(crops) == 1
    (again, nothing), crops, both = segment(large, empty)
    # The first look at both, and the second at the one whose mask is smaller than its box.
    assert len(crops) == 3
    assert crops[2][3].mean().item() == pytest.approx(40 * 30 / (64 * 50), abs=0.03), "in the window of the box around the mask"
    assert torch.equal(both[0], masks[0])
    assert not both[1].any()
    assert nothing == pytest.approx(0.5)
    # The answer that the network is surer of stays.
    assert again == pytest.approx(sure, abs=0.02) if sign > 0 else again > sure + 0.1
    # IoUs of 0.86 and 0.75.
    assert [len(segment([30.0, 20, 70, bottom])[1]) for bottom in (55, 60)] == [1, 2]


def test_pixels_of_other_windows_do_not_matter(segmenter: CompactSegmenter) -> None:
    image = some_image()
    prompts = Prompts.from_boxes(torch.tensor([[10.0, 10, 30, 30]]), torch.ones(1))
    changed = image.clone()
    changed[60:, 60:] = 255
    assert torch.equal(segmenter(image, prompts).masks, segmenter(changed, prompts).masks)


def test_other_images_are_refused(segmenter: CompactSegmenter) -> None:
    with pytest.raises(InputError, match=r"\(H, W, 3\) and type uint8, got \(4, 4\)"):
        segmenter(torch.zeros(4, 4, dtype=torch.uint8), some_prompts())
    with pytest.raises(InputError, match="float32"):
        segmenter(torch.zeros(4, 4, 3), some_prompts())
    for shape in ((4, 4, 4), (0, 4, 3)):
        with pytest.raises(InputError, match=re.escape(f"got {shape}")):
            segmenter(torch.zeros(shape, dtype=torch.uint8), some_prompts())


def test_half_precision_changes_little() -> None:
    torch.manual_seed(0)
    network = CompactNet()
    exact = from_network(network, CPU)(some_image(), some_prompts())
    rounded = from_network(network, Runtime(torch.device("cpu"), torch.bfloat16))(some_image(), some_prompts())
    torch.testing.assert_close(exact.quality, rounded.quality, atol=0.05, rtol=0)


def test_extent_leaves_specks_out() -> None:
    logits = torch.full((4, 40, 60), -1.0)
    logits[0, 10:30, 20:50] = 1
    logits[1] = logits[0]
    logits[1, 0, 0] = logits[1, 39, 59] = 1
    logits[2] = 0
    # Of 100 px, the one in the corner may be left out, two in the last row and column may not.
    logits[3, 12:20, 22:30] = logits[3, 20:24, 20:28] = logits[3, 0, 0] = logits[3, 38:, 58:] = 1
    logits[3, 38, 58] = -1
    assert _extent(logits).tolist() == [[20, 10, 50, 30], [20, 10, 50, 30], [0, 0, 0, 0], [20, 12, 60, 40]]


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights 'nowhere'"):
        SEGMENTERS.get("compact")(SegmenterConfig(name="compact", weights="nowhere"), CPU)


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(path, {"conv.weight": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match="not of the family 'compact_segmenter'"):
        SEGMENTERS.get("compact")(SegmenterConfig(name="compact", weights=str(path)), CPU)


def test_saved_weights_give_the_same_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = CompactNet(width=32)
    save_weights(tmp_path / "small.safetensors", network.state_dict(), {"family": "compact_segmenter", "width": 32}, half=False)
    runtime = Runtime(torch.device("cpu"), weights_dir=tmp_path)
    built = SEGMENTERS.get("compact")(SegmenterConfig(name="compact", weights="small", batch_size=7), runtime)
    assert built._batch_size == 7
    direct = from_network(network, CPU)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()), "folded, for speed"
    assert torch.equal(built(some_image(), some_prompts()).masks, direct(some_image(), some_prompts()).masks)


def test_bundled_weights_segment_plain_objects() -> None:
    rows, columns = np.mgrid[:240, :320]
    picture = np.full((240, 320, 3), 110, np.uint8) + np.random.default_rng(0).integers(0, 20, (240, 320, 3), dtype=np.uint8)
    truth = np.stack(
        [((columns - 90) / 40) ** 2 + ((rows - 120) / 30) ** 2 < 1, (abs(columns - 230) < 20) & (abs(rows - 150) < 35)],
    )
    picture[truth[0]] = (190, 40, 30)
    picture[truth[1]] = (235, 230, 225)
    prompts = Prompts(torch.tensor([[50.0, 90, 130, 150], [205, 110, 255, 190]]), torch.ones(2), torch.tensor([[85.0, 115], [232, 160]]))
    result = SEGMENTERS.get("compact")(SegmenterConfig(name="compact"), CPU)(torch.from_numpy(picture), prompts)
    wanted = torch.from_numpy(truth).repeat(2, 1, 1)
    iou = (result.masks & wanted).sum((1, 2)) / (result.masks | wanted).sum((1, 2))
    assert iou.min() > 0.8
    assert result.quality.min() > 0.5
