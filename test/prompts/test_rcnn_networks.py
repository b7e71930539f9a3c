"""The parts of Faster R-CNN that torchvision and detectron2 compute differently, each against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.prompts.faster_rcnn import load_detector
from ros2_ood_seg.prompts.networks.detectron2 import convert_detectron2_state, is_detectron2_state
from ros2_ood_seg.prompts.networks.rcnn import (
    BGR_MEAN,
    Anchors,
    MapInput,
    MapTransform,
    RoiPooler,
    compact_rcnn,
    fuse_norms,
    mobilenet_rcnn,
    s2m_rcnn,
)
from ros2_ood_seg.training.prompt_generator import PRESETS, build_network, start_from
from ros2_ood_seg.weights.store import WeightFile, load_weights


def detectron2_state(num_classes: int = 2) -> dict[str, Tensor]:
    """Random parameters under the names and in the shapes of detectron2's Faster R-CNN R50-FPN."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, outputs: int, inputs: int, side: int, *, bias: bool = False, norm: bool = True) -> None:
        spread = math.sqrt(2.0 / (inputs * side * side))
        state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side, generator=generator) * spread
        if bias:
            state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1
        if norm:
            for key, low, high in (("weight", 0.4, 0.8), ("bias", -0.1, 0.1), ("running_mean", -0.1, 0.1), ("running_var", 0.8, 1.2)):
                state[f"{name}.norm.{key}"] = torch.rand(outputs, generator=generator) * (high - low) + low

    bottom = "backbone.bottom_up"
    conv(f"{bottom}.stem.conv1", 64, 3, 7)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=2):
        for block in range(blocks):
            name = f"{bottom}.res{stage}.{block}"
            if block == 0:
                conv(f"{name}.shortcut", 4 * width, inputs, 1)
            conv(f"{name}.conv1", width, inputs, 1)
            conv(f"{name}.conv2", width, width, 3)
            conv(f"{name}.conv3", 4 * width, width, 1)
            inputs = 4 * width
        conv(f"backbone.fpn_lateral{stage}", 256, inputs, 1, bias=True, norm=False)
        conv(f"backbone.fpn_output{stage}", 256, 256, 3, bias=True, norm=False)
    head = "proposal_generator.rpn_head"
    conv(f"{head}.conv", 256, 256, 3, bias=True, norm=False)
    conv(f"{head}.objectness_logits", 3, 256, 1, bias=True, norm=False)
    conv(f"{head}.anchor_deltas", 12, 256, 1, bias=True, norm=False)
    for name, outputs, features in (("box_head.fc1", 1024, 256 * 49), ("box_head.fc2", 1024, 1024)):
        state[f"roi_heads.{name}.weight"] = torch.randn(outputs, features, generator=generator) * math.sqrt(2 / features)
        state[f"roi_heads.{name}.bias"] = torch.zeros(outputs)
    for name, outputs in (("cls_score", num_classes + 1), ("bbox_pred", 4 * num_classes)):
        state[f"roi_heads.box_predictor.{name}.weight"] = torch.randn(outputs, 1024, generator=generator) * 0.03
        state[f"roi_heads.box_predictor.{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return detectron2_state()


def test_training_goes_on_from_the_released_checkpoint_without_its_unused_class(state: dict[str, Tensor]) -> None:
    network, _ = build_network(PRESETS["s2m"], pretrained=True)
    start_from(network, WeightFile(Path("model_final.pth"), state, {}))
    own, released = network.state_dict(), convert_detectron2_state(state)
    torch.testing.assert_close(own["backbone.body.layer3.1.conv2.weight"], released["backbone.body.layer3.1.conv2.weight"])
    torch.testing.assert_close(own["roi_heads.box_predictor.cls_score.bias"], released["roi_heads.box_predictor.cls_score.bias"][:2])
    torch.testing.assert_close(own["roi_heads.box_predictor.bbox_pred.weight"], released["roi_heads.box_predictor.bbox_pred.weight"][:8])
    trained = {name.split(".")[2] for name, p in network.named_parameters() if p.requires_grad and name.startswith("backbone.body")}
    assert trained == {"layer2", "layer3", "layer4"}


def test_checkpoint_as_detectron2_writes_it_is_read_whole(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model_final.pth"
    extra = {"pixel_mean": torch.tensor(BGR_MEAN).view(3, 1, 1), "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}
    torch.save({"model": {**state, **extra}, "iteration": 148299}, path)
    weights = load_weights(path)
    assert is_detectron2_state(weights.state)
    detector = load_detector(weights)
    assert detector.map_input == MapInput.published()
    assert detector.input_width == 0
    own = detector.network.state_dict()
    assert torch.equal(own["backbone.body.layer3.5.bn2.running_var"], state["backbone.bottom_up.res4.5.conv2.norm.running_var"])
    assert torch.equal(own["backbone.body.layer1.0.downsample.0.weight"], state["backbone.bottom_up.res2.0.shortcut.weight"])
    assert torch.equal(own["backbone.fpn.layer_blocks.3.0.bias"], state["backbone.fpn_output5.bias"])
    with torch.no_grad():
        found = detector.network.eval()([torch.linspace(-30, 0, 64 * 96).view(1, 64, 96)])[0]
    assert found["boxes"].shape == (len(found["scores"]), 4)


def test_background_is_last_there_and_first_here(state: dict[str, Tensor]) -> None:
    converted = convert_detectron2_state(state)
    feature = torch.randn(5, 1024)
    there = nn.functional.linear(
        feature, state["roi_heads.box_predictor.cls_score.weight"], state["roi_heads.box_predictor.cls_score.bias"]
    )
    here = nn.functional.linear(
        feature, converted["roi_heads.box_predictor.cls_score.weight"], converted["roi_heads.box_predictor.cls_score.bias"]
    )
    torch.testing.assert_close(here, there[:, [2, 0, 1]])
    assert torch.equal(converted["roi_heads.box_predictor.bbox_pred.bias"][4:], state["roi_heads.box_predictor.bbox_pred.bias"])
    assert converted["roi_heads.box_predictor.bbox_pred.weight"].shape == (12, 1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.bottom_up.res4.6.conv1.weight": torch.zeros(256, 1024, 1, 1)}, "unexpected"),
        ({"roi_heads.mask_head.deconv.weight": torch.zeros(1)}, "roi_heads.mask_head.deconv.weight"),
        ({"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(4, 1024)}, "another shape"),
        ({"roi_heads.box_predictor.cls_score.bias": None}, "cls_score.bias"),
    ],
)
def test_other_architectures_are_refused(state: dict[str, Tensor], change: dict[str, Tensor | None], message: str) -> None:
    changed = {key: value for key, value in {**state, **change}.items() if value is not None}
    with pytest.raises(WeightsError, match=message):
        load_detector(WeightFile(Path("other.pth"), changed, {}))


def test_stride_sits_in_the_first_1x1_of_each_later_stage() -> None:
    body = s2m_rcnn().backbone.body
    for name in ("layer2", "layer3", "layer4"):
        block = body[name][0]
        assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((2, 2), (1, 1), (2, 2))
    other = s2m_rcnn(stride_in_1x1=False).backbone.body["layer2"][0]
    assert (other.conv1.stride, other.conv2.stride) == ((1, 1), (2, 2))


def test_frozen_norm_is_the_affine_map_of_its_statistics() -> None:
    norm = s2m_rcnn().backbone.body.bn1
    for name, value in (("weight", 2.0), ("bias", 0.5), ("running_mean", 1.0), ("running_var", 4.0)):
        getattr(norm, name).fill_(value)
    x = torch.randn(1, 64, 2, 2)
    torch.testing.assert_close(norm.train()(x), 2.0 * (x - 1.0) / math.sqrt(4.0 + 1e-5) + 0.5)


def test_anchors_are_not_rounded_and_strides_are_fixed() -> None:
    anchors = Anchors([(32,), (64,), (128,), (256,), (512,)])
    # 736 px high: the last map has 12 rows, from which torchvision would infer a stride of 61.
    features = [torch.zeros(1, 1, 736 // s + (736 % s > 0), 3) for s in (4, 8, 16, 32, 64)]
    (boxes,) = anchors(SimpleNamespace(image_sizes=[(736, 190)]), features)
    counts = [3 * f.shape[-2] * 3 for f in features]
    first = boxes[0]
    w, h = 32 / math.sqrt(0.5), 32 * math.sqrt(0.5)
    torch.testing.assert_close(first, torch.tensor([-w / 2, -h / 2, w / 2, h / 2]))
    last = boxes[-1]
    w, h = 512 / math.sqrt(2.0), 512 * math.sqrt(2.0)
    centre_x, centre_y = 2 * 64.0, 11 * 64.0
    torch.testing.assert_close(last, torch.tensor([centre_x - w / 2, centre_y - h / 2, centre_x + w / 2, centre_y + h / 2]))
    # Rows outermost, then columns, then ratios.
    torch.testing.assert_close(boxes[4][:2] - boxes[1][:2], torch.tensor([4.0, 0.0]))
    assert len(boxes) == sum(counts)


def test_pooling_samples_at_half_pixel_centres_and_chooses_levels_by_area() -> None:
    pooler = RoiPooler()
    ramp = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 64, 64)
    features = {name: ramp[..., :: 2**k, :: 2**k] for k, name in enumerate(("0", "1", "2", "3"))}
    box = torch.tensor([[40.0, 40.0, 96.0, 96.0]])
    pooled = pooler(features, [box], [(256, 256)])
    # A bin of 8 px covers columns 2k .. 2k + 1 of stride 4; aligned, pixel i covers [i, i + 1) and its value i stands at i + 0.5.
    expected = torch.tensor([(40 + 8 * (k + 0.5)) / 4 - 0.5 for k in range(7)])
    torch.testing.assert_close(pooled[0, 0, 3], expected)
    unaligned = roi_align(features["0"], torch.cat([torch.zeros(1, 1), box], 1), 7, 0.25, 0, aligned=False)
    torch.testing.assert_close(unaligned[0, 0, 3], expected + 0.5)
    sides = torch.tensor([10.0, 111.9, 112.0, 224.0, 447.0, 448.0, 2000.0])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], dim=1)
    assert pooler.levels(boxes).tolist() == [0, 0, 1, 2, 2, 3, 3]


def test_box_deltas_are_weighted_and_clipped() -> None:
    coder = s2m_rcnn().roi_heads.box_coder
    boxes = coder.decode(torch.tensor([[1.0, -2.0, 5.0, 100.0]]), [torch.tensor([[10.0, 20.0, 50.0, 100.0]])])[0, 0]
    width, height = 40 * math.exp(5.0 / 5.0), 80 * 1000.0 / 16.0
    centre_x, centre_y = 30 + 40 * 0.1, 60 - 80 * 0.2
    expected = torch.tensor([centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2])
    torch.testing.assert_close(boxes, expected)


def test_published_input_subtracts_the_bgr_mean_and_pads_afterwards() -> None:
    images, _ = MapTransform(MapInput.published())([torch.full((1, 33, 40), -10.0)])
    assert images.tensors.shape == (1, 3, 64, 64)
    assert images.image_sizes == [(33, 40)]
    torch.testing.assert_close(images.tensors[0, :, 32, 39], torch.tensor([-113.53, -126.28, -133.675]))
    assert images.tensors[0, :, 33:].abs().max() == 0
    assert images.tensors[0, :, :, 40:].abs().max() == 0


def test_published_constants() -> None:
    network = s2m_rcnn()
    assert (network.roi_heads.score_thresh, network.roi_heads.nms_thresh, network.roi_heads.detections_per_img) == (0.05, 0.5, 100)
    assert network.rpn.nms_thresh == 0.7
    network.eval()
    assert (network.rpn.pre_nms_top_n(), network.rpn.post_nms_top_n()) == (1000, 1000)


@pytest.mark.parametrize(("make", "most_parameters"), [(compact_rcnn, 1_200_000), (mobilenet_rcnn, 6_000_000)])
def test_small_networks_take_any_size(make: Callable[[], nn.Module], most_parameters: int) -> None:
    network = make().eval()
    assert sum(p.numel() for p in network.parameters()) < most_parameters
    with torch.no_grad():
        for height, width in ((16, 16), (33, 129), (360, 640)):
            found = network([torch.rand(1, height, width)])[0]
            assert torch.isfinite(found["boxes"]).all()


@pytest.mark.parametrize("values", [("other", (0.0,), (1.0,)), ("raw", (0.0, 1.0), (1.0,)), ("raw", (0.0,), (0.0,)), ("raw", (), ())])
def test_unusable_input_descriptions_are_refused(values: tuple[str, tuple[float, ...], tuple[float, ...]]) -> None:
    with pytest.raises(InputError, match="detector input"):
        MapInput(*values)


def test_mobilenet_pyramid_has_the_strides_of_the_anchors() -> None:
    backbone = mobilenet_rcnn().backbone.eval()
    with torch.no_grad():
        shapes = [tuple(level.shape[1:]) for level in backbone(torch.rand(1, 1, 128, 192)).values()]
    assert shapes == [(64, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32, 64)]


@pytest.mark.parametrize("make", [compact_rcnn, mobilenet_rcnn])
def test_fused_norms_compute_the_same_features(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    backbone = make().backbone
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 2.0)
            module.bias.data.normal_(0.0, 0.5)
    x = torch.randn(1, 1, 64, 96)
    with torch.no_grad():
        before = backbone.eval()(x)
        fuse_norms(backbone)
        after = backbone(x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-4, rtol=1e-4)
