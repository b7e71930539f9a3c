"""Swin against torchvision's, both decoders against transformers' (which knows three encoder levels only)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.scorers.networks.mask2former import Mask2Former, _GlobalAttentionLayer
from ros2_ood_seg.scorers.networks.resnet import ResNet
from ros2_ood_seg.scorers.networks.swin import SwinTransformer

WIDTH = 32
RELATIVE_ERROR = 1e-4


def tiny(encoder_levels: int = 1, decoder_levels: int = 1, decoder_layers: int = 1) -> Mask2Former:
    torch.manual_seed(0)
    backbone = SwinTransformer(width=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 2), window=4)
    return Mask2Former(
        backbone,
        classes=20,
        queries=7,
        width=WIDTH,
        mask_width=WIDTH,
        encoder_levels=encoder_levels,
        encoder_layers=2,
        encoder_hidden=48,
        decoder_levels=decoder_levels,
        decoder_layers=decoder_layers,
        decoder_hidden=64,
    )


def spread(network: nn.Module) -> None:
    """Weights that make every path matter: without it biases are zero and norms the identity."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        else:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < RELATIVE_ERROR * expected.abs().max()


@pytest.mark.parametrize("size", [(160, 288), (148, 260)])
def test_swin_equals_torchvision(size: tuple[int, int]) -> None:
    depths, heads, window = [2, 1, 2, 2], [1, 2, 4, 8], 4
    theirs = TorchvisionSwin([4, 4], 16, depths, heads, [window, window], stochastic_depth_prob=0.0).eval()
    spread(theirs)
    stages = {1: 0, 3: 1, 5: 2, 7: 3}
    state = {}
    for key, value in theirs.state_dict().items():
        if not key.startswith("features."):
            continue
        index, rest = int(key.split(".")[1]), key.split(".", 2)[2]
        if index == 0:
            name = f"patch_embed.{'proj' if rest.startswith('0.') else 'norm'}.{rest.split('.')[1]}"
        elif index in stages:
            name = f"layers.{stages[index]}.blocks.{rest}".replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        else:
            name = f"layers.{stages[index - 1]}.downsample.{rest}"
        state[name] = value.view(window**2, window**2) if name.endswith("relative_position_index") else value
    ours = SwinTransformer(width=16, depths=depths, heads=heads, window=window).eval()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in state.items() if name.endswith("relative_position_index"))
    _, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    image = torch.randn(1, 3, *size)
    expected, x = [], image
    with torch.inference_mode():
        for index, module in enumerate(theirs.features):
            x = module(x)
            if index in stages:
                expected.append(torch.nn.functional.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2))
        for a, b in zip(ours(image), expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_decoders_equal_transformers(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2], window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]
        ),
        feature_size=WIDTH, mask_feature_size=WIDTH, hidden_dim=WIDTH, encoder_feedforward_dim=48, dim_feedforward=64, encoder_layers=2,
        decoder_layers=5, num_queries=7, num_labels=19,
    )  # fmt: skip
    theirs = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    spread(theirs)
    ours = tiny(encoder_levels=3, decoder_levels=3, decoder_layers=4).eval()
    missing, unexpected = ours.load_state_dict(decoders_from_transformers(theirs.state_dict()), strict=False)
    assert not unexpected
    assert all(key.startswith("backbone.") for key in missing)
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        features = theirs.model.pixel_level_module.encoder(image).feature_maps
        # The same backbone features to both, so that only the decoders are compared.
        ours.backbone.forward = lambda _: list(features)  # type: ignore[method-assign]
        actual, expected = ours(image), theirs(pixel_values=image)
    assert_close(actual.class_logits, expected.class_queries_logits)
    assert_close(actual.mask_logits, expected.masks_queries_logits)


def decoders_from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    pixel, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    names = {
        "model.pixel_level_module.decoder.input_projections.": f"{pixel}input_proj.",
        "model.pixel_level_module.decoder.level_embed": f"{pixel}transformer.level_embed",
        "model.pixel_level_module.decoder.encoder.": f"{pixel}transformer.encoder.",
        "model.pixel_level_module.decoder.mask_projection.": f"{pixel}mask_features.",
        "model.pixel_level_module.decoder.adapter_1.0.": f"{pixel}adapter_1.",
        "model.pixel_level_module.decoder.adapter_1.1.": f"{pixel}adapter_1.norm.",
        "model.pixel_level_module.decoder.layer_1.0.": f"{pixel}layer_1.",
        "model.pixel_level_module.decoder.layer_1.1.": f"{pixel}layer_1.norm.",
        "model.transformer_module.queries_embedder.": f"{predictor}query_embed.",
        "model.transformer_module.queries_features.": f"{predictor}query_feat.",
        "model.transformer_module.level_embed.": f"{predictor}level_embed.",
        "model.transformer_module.decoder.layernorm.": f"{predictor}decoder_norm.",
        "class_predictor.": f"{predictor}class_embed.",
    }
    encoder = {"self_attn_layer_norm": "norm1", "fc1": "linear1", "fc2": "linear2", "final_layer_norm": "norm2"}
    result = {}
    for key, value in state.items():
        for old, new in names.items():
            if key.startswith(old):
                name = new + key.removeprefix(old)
                for part, ours in encoder.items():
                    name = name.replace(f".{part}.", f".{ours}.")
                result[name] = value
    for k in range(4):
        old = f"model.transformer_module.decoder.layers.{k}."
        at = {kind: f"{predictor}transformer_{kind}_layers.{k}." for kind in ("self_attention", "cross_attention", "ffn")}
        for end in ("weight", "bias"):
            projections = [state[f"{old}self_attn.{name}_proj.{end}"] for name in "qkv"]
            result[f"{at['self_attention']}self_attn.in_proj_{end}"] = torch.cat(projections)
            result[f"{at['self_attention']}self_attn.out_proj.{end}"] = state[f"{old}self_attn.out_proj.{end}"]
            result[f"{at['self_attention']}norm.{end}"] = state[f"{old}self_attn_layer_norm.{end}"]
            result[f"{at['cross_attention']}multihead_attn.in_proj_{end}"] = state[f"{old}cross_attn.in_proj_{end}"]
            result[f"{at['cross_attention']}multihead_attn.out_proj.{end}"] = state[f"{old}cross_attn.out_proj.{end}"]
            result[f"{at['cross_attention']}norm.{end}"] = state[f"{old}cross_attn_layer_norm.{end}"]
            result[f"{at['ffn']}linear1.{end}"] = state[f"{old}fc1.{end}"]
            result[f"{at['ffn']}linear2.{end}"] = state[f"{old}fc2.{end}"]
            result[f"{at['ffn']}norm.{end}"] = state[f"{old}final_layer_norm.{end}"]
    for k in range(3):
        for end in ("weight", "bias"):
            result[f"{predictor}mask_embed.layers.{k}.{end}"] = state[
                f"model.transformer_module.decoder.mask_predictor.mask_embedder.{k}.0.{end}"
            ]
    return result


@pytest.mark.parametrize(("encoder_levels", "decoder_levels", "decoder_layers"), [(1, 1, 1), (1, 3, 1), (3, 3, 9)])
def test_shapes_tell_the_architecture(encoder_levels: int, decoder_levels: int, decoder_layers: int) -> None:
    state = tiny(encoder_levels, decoder_levels, decoder_layers).state_dict()
    like = Mask2Former.like(state)
    assert {key: value.shape for key, value in like.state_dict().items()} == {key: value.shape for key, value in state.items()}
    assert all(value.is_meta for value in like.state_dict().values())


def test_resnet_equals_torchvision() -> None:
    torch.manual_seed(0)
    theirs = TorchvisionResNet(Bottleneck, [2, 1, 2, 1]).eval()
    spread(theirs)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    state = {}
    for key, value in theirs.state_dict().items():
        if key.startswith("fc."):
            continue
        name = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for k in range(1, 5):
            name = name.replace(f"bn{k}", f"conv{k}.norm").replace(f"layer{k}", f"res{k + 1}")
        state[name if name.startswith("res") else f"stem.{name}"] = value
    ours = ResNet.like({f"backbone.{name}": value for name, value in state.items()}).eval()
    ours.load_state_dict(state)
    image = torch.randn(1, 3, 75, 130)
    with torch.inference_mode():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for level, stage in zip(ours(image), (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
            x = stage(x)
            assert_close(level, x)


def test_global_attention_looks_inside_and_outside_the_mask() -> None:
    torch.manual_seed(0)
    layer = _GlobalAttentionLayer(WIDTH)
    spread(layer)
    x, position = torch.randn(2, 3, 1, WIDTH)
    memory, memory_position = torch.randn(2, 10, 1, WIDTH)
    # The first mask covers four pixels, the second none, the third all.
    masks = torch.full((1, 3, 10), -1.0)
    masks[0, 0, :4] = masks[0, 2] = 1.0
    attended = []
    for attention, seen in (
        (layer.multihead_attn_foreground, (range(4), range(10), range(10))),
        (layer.multihead_attn_background, (range(4, 10), range(10), range(10))),
    ):
        rows = []
        for query, pixels in enumerate(seen):
            keys = memory[list(pixels)]
            rows.append(attention((x + position)[[query]], keys + memory_position[list(pixels)], keys)[0])
        attended.append(torch.cat(rows))
    expected = nn.functional.layer_norm(x + attended[0] + attended[1], (WIDTH,), layer.norm.weight, layer.norm.bias)
    torch.testing.assert_close(layer(x, memory, memory_position, position, masks), expected)


def test_published_size() -> None:
    with torch.device("meta"):
        backbone = SwinTransformer(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12)
        network = Mask2Former(backbone, 20, 100, 256, 256, 1, 6, 1024, 1, 1, 2048)
    assert sum(p.numel() for p in network.sem_seg_head.parameters()) < sum(p.numel() for p in backbone.parameters()) / 5
    # Swin-B without its classifier has 86.7 million parameters (Liu et al., 2021, Table 1: 88 with it).
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(86.7e6, rel=0.005)


def test_a_missing_entry_is_named() -> None:
    state = tiny().state_dict()
    del state["sem_seg_head.pixel_decoder.mask_features.weight"]
    with pytest.raises(WeightsError, match=r"family 'mask2former'.*pixel_decoder\.mask_features\.weight is missing"):
        Mask2Former.like(state)
