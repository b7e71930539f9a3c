from __future__ import annotations

import pytest
import torch

from ros2_ood_seg.scorers.networks.deeplab_resnet101 import DeepLabResNet101
from ros2_ood_seg.scorers.networks.deeplab_wrn38 import DeepLabWideResNet38

STRUCTURE = (1, 1, 2, 1, 1, 1)


@pytest.mark.parametrize(
    ("parts", "millions"),
    [
        ({}, 137.1),
        ({"residual": True, "projection": True}, 168.0),
        ({"num_classes": 20}, 137.1),
    ],
)
def test_has_the_published_number_of_parameters(parts: dict[str, int], millions: float) -> None:
    with torch.device("meta"):
        network = DeepLabWideResNet38(**parts)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_state_dict_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = DeepLabWideResNet38(residual=True, projection=True, ood_head=True).state_dict()
    expected = {
        "mod1.conv1.weight": (64, 3, 3, 3),
        "mod2.block1.bn1.0.running_mean": (64,),
        "mod4.block1.proj_conv.weight": (512, 256, 1, 1),
        "mod6.block1.convs.conv2.weight": (1024, 512, 3, 3),
        "mod7.block1.convs.bn3.0.weight": (2048,),
        "mod7.block1.convs.conv3.weight": (4096, 2048, 1, 1),
        "aspp.features.3.0.weight": (256, 4096, 3, 3),
        "aspp.img_conv.1.running_var": (256,),
        "bot_fine.weight": (48, 128, 1, 1),
        "bot_aspp.weight": (256, 1280, 1, 1),
        "final.0.weight": (256, 304, 3, 3),
        "final.6.weight": (19, 256, 1, 1),
        "residual_block.atten_aspp.features.1.0.weight": (256, 4096, 3, 3),
        "residual_block.bot_atten_aspp.weight": (256, 1280, 1, 1),
        "residual_block.atten_aspp_final.weight": (304, 256, 1, 1),
        "residual_block.proj_head.proj.0.bias": (304,),
        "logits_ood.norm.weight": (304,),
        "logits_ood.conv.bias": (2,),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert "final.6.bias" not in state


@pytest.mark.parametrize("parts", [{}, {"residual": True}, {"residual": True, "projection": True}, {"ood_head": True}])
def test_takes_width_depth_and_parts_from_a_state_dict(parts: dict[str, bool]) -> None:
    network = DeepLabWideResNet38(7, stem=8, structure=STRUCTURE, **parts)
    found = DeepLabWideResNet38.like(network.state_dict())
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_residual_changes_only_its_own_logits(randomised) -> None:
    network = randomised(DeepLabWideResNet38(5, residual=True, projection=True, stem=8, structure=STRUCTURE))
    image = torch.rand(2, 3, 33, 49, generator=torch.Generator().manual_seed(0)) * 255
    with torch.inference_mode():
        before = network(image)
        assert before.logits.shape == (2, 5, 17, 25)
        assert before.projection is None
        assert not torch.allclose(before.logits, before.residual_logits)
        network.residual_block.atten_aspp_final.weight.zero_()
        after = network(image)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(after.logits, after.residual_logits)
    assert network.train()(image).projection.shape == (2, 38, 17, 25)


def test_classifier_is_the_last_layer_of_the_penultimate_features(randomised) -> None:
    network = randomised(DeepLabWideResNet38(5, stem=8, structure=STRUCTURE))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    with torch.inference_mode():
        torch.testing.assert_close(network.final[-1](network.penultimate(image)), network(image).logits)


def test_resnet101_has_the_published_names_shapes_and_size() -> None:
    with torch.device("meta"):
        network = DeepLabResNet101()
    state = network.state_dict()
    expected = {
        "layer0.0.weight": (64, 3, 3, 3),
        "layer0.6.weight": (128, 64, 3, 3),
        "layer1.0.downsample.0.weight": (256, 128, 1, 1),
        "layer3.22.conv2.weight": (256, 256, 3, 3),
        "layer4.2.bn3.running_var": (2048,),
        "bot_fine.1.weight": (48,),
        "bot_aspp.0.weight": (256, 1280, 1, 1),
        "final1.3.weight": (256, 256, 3, 3),
        "final2.0.bias": (19,),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected
    # The release's network (64,197,504 parameters) less its auxiliary head and its two post-processing kernels.
    auxiliary = 1024 * 512 * 9 + 512 + 2 * 512 + 512 * 19 + 19
    assert sum(p.numel() for p in network.parameters()) == 64_197_504 - auxiliary - (9 + 49)


def test_resnet_keeps_stride_eight(randomised) -> None:
    network = randomised(DeepLabResNet101(4, stem=8, structure=(1, 1, 2, 1)))
    found = DeepLabResNet101.like(network.state_dict())
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 4, 16, 24)
        low = network.layer0(torch.zeros(1, 3, 64, 96))
        for index in range(1, 5):
            low = network.get_submodule(f"layer{index}")(low)
    assert low.shape[-2:] == (8, 12)
