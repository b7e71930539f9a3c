from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.segmenters.compact import load_network
from ros2_ood_seg.segmenters.networks.compact import INPUT_CHANNELS, CompactNet, fold_batch_norm
from ros2_ood_seg.weights import WeightFile, load_weights


def test_shapes_and_size() -> None:
    net = CompactNet()
    logits, quality = net(torch.zeros(2, INPUT_CHANNELS, 96, 64))
    assert logits.shape == (2, 1, 48, 32)
    assert quality.shape == (2,)
    assert sum(parameter.numel() for parameter in net.parameters()) < 3_000_000


def reference(net: CompactNet, crops: Tensor) -> tuple[Tensor, Tensor]:
    """The network as its description has it: a pyramid over the last layers of each size, and an IoU head on means inside the mask."""

    def up(x: Tensor) -> Tensor:
        return nn.Upsample(scale_factor=2, mode="bilinear")(x)

    x, last = crops[:, :3], {}
    for index, layer in enumerate(net.encoder):
        x = layer(x)
        if index == 3:
            x = x + net.prompt(crops[:, 3:].unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).mean(dim=(3, 5)))
        last[crops.shape[3] // x.shape[3]] = x
    coarse = net.lateral32(last[32])
    fine = coarse
    for stride in (16, 8, 4):
        fine = getattr(net, f"smooth{stride}")(getattr(net, f"lateral{stride}")(last[stride]) + up(fine))
    logits = net.mask(net.smooth2(net.lateral2(last[2]) + up(net.narrow(fine))))
    inside = logits.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5)).sigmoid()
    pixels = inside[0, 0].numel()
    total = inside.sum(dim=(1, 2, 3))[:, None] + 1e-3 * pixels
    doubt = (inside - inside**2).sum(dim=(2, 3)) / total
    features = [torch.einsum("nchw,nhw->nc", fine, inside[:, 0]) / total, *(y.flatten(2).mean(2) for y in (fine, coarse, inside)), doubt]
    return logits, net.quality(torch.cat(features, dim=1))[:, 0]


def test_the_network_is_a_pyramid_with_an_iou_head() -> None:
    torch.manual_seed(0)
    # In a network that has learnt nothing, hardly anything gets through to the deep layers.
    net = load_network().eval()
    with torch.no_grad():
        crops = torch.rand(2, INPUT_CHANNELS, 64, 96)
        for found, expected in zip(net(crops), reference(net, crops), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_image_alone_decides_before_training_and_the_first_blocks_stay_as_they_are() -> None:
    net = CompactNet()
    assert not net.prompt.weight.any()
    assert [all(parameter.requires_grad for parameter in layer.parameters()) for layer in net.encoder] == [False] * 4 + [True] * 14


def test_the_iou_head_does_not_change_the_mask() -> None:
    net = CompactNet()
    net(torch.rand(1, INPUT_CHANNELS, 64, 64))[1].sum().backward()
    assert net.mask.weight.grad is None
    assert net.quality[0].weight.grad is not None


def test_folding_leaves_the_function() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    norm = block[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    image = torch.randn(1, 3, 9, 9)
    before = block(image)
    torch.testing.assert_close(fold_batch_norm(block)(image), before)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in block)


def test_the_encoder_starts_as_the_imagenet_network() -> None:
    torch.manual_seed(0)
    features = mobilenet_v2(weights=None).features.eval()
    net = CompactNet().eval()
    net.load_imagenet(WeightFile(Path("start.safetensors"), features.state_dict(), {}))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.encoder(images), features[:18](images), rtol=1e-4, atol=1e-5)


def test_the_prompt_reaches_the_mask_once_trained() -> None:
    torch.manual_seed(0)
    net = CompactNet().eval()
    crops = torch.rand(1, INPUT_CHANNELS, 64, 64)
    other = torch.cat([crops[:, :3], 1 - crops[:, 3:]], dim=1)
    net(crops)[0].sum().backward()
    assert net.prompt.weight.grad is not None
    assert net.prompt.weight.grad.abs().max() > 0
    torch.nn.init.normal_(net.prompt.weight)
    assert not torch.equal(net(crops)[0], net(other)[0])


def test_other_start_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"'other.safetensors' must hold torchvision's mobilenet_v2"):
        CompactNet().load_imagenet(WeightFile(Path("other.safetensors"), {"a": torch.zeros(1)}, {}))


def test_real_start_weights_load(shared_dir: Path) -> None:
    net = CompactNet().eval()
    net.load_imagenet(load_weights(shared_dir / "weights/mobilenet_v2/mobilenet_v2_imagenet_features.safetensors"))
    with torch.no_grad():
        assert torch.isfinite(net(torch.rand(1, INPUT_CHANNELS, 64, 64))[0]).all()
