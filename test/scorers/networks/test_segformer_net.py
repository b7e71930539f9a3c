"""SegFormer against transformers', the mixture against torch's own distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ros2_ood_seg.scorers.networks.mix_transformer import MixTransformer
from ros2_ood_seg.scorers.networks.segformer import GmmSeg, SegFormer, log_likelihood

WIDTHS, DEPTHS = (8, 16, 40, 64), (1, 2, 1, 1)


def spread(network: nn.Module) -> nn.Module:
    """Weights that make every path matter: without it biases are zero and norms the identity."""
    generator = torch.Generator().manual_seed(3)
    for name, value in network.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
        elif value.ndim == 1:
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return network.eval()


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmsegmentation's names to those of transformers' published checkpoints."""
    result = {}
    for key, value in state.items():
        part = key.split(".")
        if key.startswith("decode_head."):
            name = key.replace("convs.", "linear_c.") if "convs." not in key else ""
            name = name.replace("fusion_conv.conv", "linear_fuse").replace("fusion_conv.bn", "batch_norm").replace("conv_seg", "classifier")
            if name:
                result[name] = value
            continue
        stage, kind, rest = part[2], part[3], ".".join(part[4:])
        encoder = "segformer.encoder."
        if kind == "0":
            result[f"{encoder}patch_embeddings.{stage}.{rest.replace('projection', 'proj').replace('norm', 'layer_norm')}"] = value
        elif kind == "2":
            result[f"{encoder}layer_norm.{stage}.{rest}"] = value
        else:
            block, module = f"{encoder}block.{stage}.{part[4]}.", ".".join(part[5:])
            end = part[-1].removeprefix("in_proj_")
            if "in_proj" in module:
                for projection, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    result[f"{block}attention.self.{projection}.{end}"] = third
                continue
            names = {
                "norm1": "layer_norm_1",
                "norm2": "layer_norm_2",
                "attn.attn.out_proj": "attention.output.dense",
                "attn.sr": "attention.self.sr",
                "attn.norm": "attention.self.layer_norm",
                "ffn.layers.0": "mlp.dense1",
                "ffn.layers.1": "mlp.dwconv.dwconv",
                "ffn.layers.4": "mlp.dense2",
            }
            name = names[module.rsplit(".", 1)[0]]
            result[f"{block}{name}.{end}"] = value.flatten(1) if "mlp.dense" in name and value.ndim == 4 else value
    return result


@pytest.mark.parametrize("size", [(64, 96), (75, 130)])
def test_backbone_equals_transformers(size: tuple[int, int], tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    ours = spread(SegFormer(MixTransformer(WIDTHS, DEPTHS), 5, 24))
    config = transformers.SegformerConfig(hidden_sizes=WIDTHS, depths=DEPTHS, num_attention_heads=(1, 2, 5, 8), num_labels=5)
    config.save_pretrained(tmp_path)
    state = {key: value.contiguous() for key, value in to_transformers(ours.state_dict()).items() if not key.startswith("decode_head.")}
    save_file({key.removeprefix("segformer."): value for key, value in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    theirs, report = transformers.SegformerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            # mmsegmentation's, where transformers has torch's default.
            module.eps = 1e-6
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs.eval()(pixel_values=image, output_hidden_states=True).hidden_states
        for a, b in zip(ours.backbone(image), expected, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_decoder_is_its_definition() -> None:
    network = spread(SegFormer(MixTransformer(WIDTHS, DEPTHS), 5, 24))
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(1, width, 16 >> level, 24 >> level, generator=generator) for level, width in enumerate(WIDTHS)]
    head = network.decode_head
    with torch.inference_mode():

        def layer(module: nn.Module, x: Tensor) -> Tensor:
            weight, bn = module.conv.weight.double()[:, :, 0, 0], module.bn
            x = torch.einsum("oc,bchw->bohw", weight, x.double())
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            return ((x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]).clamp(min=0)

        levels = [
            nn.functional.interpolate(layer(conv, x), size=(16, 24), mode="bilinear") for conv, x in zip(head.convs, features, strict=True)
        ]
        expected = layer(head.fusion_conv, torch.cat(levels, dim=1))
        torch.testing.assert_close(head(features).double(), expected, atol=1e-5, rtol=1e-5)


def test_log_likelihood_equals_torchs_distribution() -> None:
    generator = torch.Generator().manual_seed(4)
    x = nn.functional.normalize(torch.randn(50, 64, generator=generator), dim=1)
    mean = nn.functional.normalize(torch.randn(7, 64, generator=generator), dim=1)
    deviation = 0.1 + 0.06 * torch.rand(7, 64, generator=generator)
    expected = Independent(Normal(mean.double(), deviation.double()), 1).log_prob(x.double()[:, None])
    assert (log_likelihood(x, mean, deviation) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("embedding", [24, 16])
def test_mixture_takes_the_best_component_of_each_class(embedding: int) -> None:
    network = spread(GmmSeg(MixTransformer(WIDTHS, DEPTHS), 5, 3, 24, embedding))
    network.decode_head.diagonal.data.uniform_(0.1, 0.2)
    image = torch.randint(0, 256, (1, 3, 40, 56), generator=torch.Generator().manual_seed(5)).float()
    seen: list[Tensor] = []
    network.decode_head.feat_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        output = network(image)
    features = nn.functional.normalize(seen[0].double(), dim=-1)
    head = network.decode_head
    means = nn.functional.normalize(head.means.double(), dim=-1)
    densities = Independent(Normal(means, head.diagonal.double()), 1).log_prob(features[..., None, None, :])
    expected = densities.amax(-1).permute(0, 3, 1, 2)
    assert output.log_likelihoods.shape == (1, 5, 10, 14)
    assert (output.log_likelihoods - expected).abs().max() < 1e-4 * expected.abs().max()
    # The segmentation: likelihoods normalised over the classes, then scaled per class.
    standard = (expected - expected.mean(1, keepdim=True)) / (expected.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    scaled = standard * head.mask_norm.weight[:, None, None] + head.mask_norm.bias[:, None, None]
    torch.testing.assert_close(output.logits.double(), scaled, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cls", [SegFormer, GmmSeg])
def test_shapes_tell_the_architecture(cls: type[nn.Module]) -> None:
    sizes = (5, 3, 24, 16) if cls is GmmSeg else (5, 24)
    with torch.device("meta"):
        state = cls(MixTransformer(WIDTHS, DEPTHS), *sizes).state_dict()
    assert {key: value.shape for key, value in cls.like(state).state_dict().items()} == {key: value.shape for key, value in state.items()}


def test_published_size() -> None:
    with torch.device("meta"):
        network = SegFormer(MixTransformer((64, 128, 320, 512), (3, 6, 40, 3)), 19, 768)
    # SegFormer-B5 has 84.7 million parameters (Xie et al., 2021, Table 2).
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(84.7e6, abs=0.1e6)
