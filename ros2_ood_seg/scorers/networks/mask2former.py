"""Mask2Former (Cheng et al., CVPR 2022) on Swin or ResNet, in plain PyTorch, with the parameter names of its release.

RbA, UGainS, EAM, UNO and Mask2Anomaly published checkpoints of this network. They differ in the backbone, in the feature levels that the
deformable encoder and the transformer decoder look at, and in the number of decoder layers, all of which the shapes in a checkpoint
tell. Of the deformable attention only the sampling needs a kernel; ``grid_sample`` is one that PyTorch brings along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.scorers.networks.resnet import ResNet
from ros2_ood_seg.scorers.networks.swin import SwinTransformer

HEADS = 8
"""Attention heads of the pixel decoder and of the transformer decoder, the same in every published configuration."""

SIZE_DIVISIBILITY = 32
"""Images are padded to a multiple of this many px, as detectron2 does."""

_POINTS = 4
_GROUPS = 32


class Mask2FormerOutput(NamedTuple):
    """What Mask2Former predicts.

    Args:
        class_logits: (B, N, K + 1) float, the last class is "no object".
        mask_logits: (B, N, h, w) float, a quarter of the padded image's size.
        auxiliary: In training mode, class and mask logits before each layer of the transformer decoder, for its deep supervision.
    """

    class_logits: Tensor
    mask_logits: Tensor
    auxiliary: tuple[tuple[Tensor, Tensor], ...] = ()


class Mask2Former(nn.Module):
    """Backbone, pixel decoder and masked-attention transformer decoder.

    Args:
        backbone: Swin Transformer or ResNet.
        classes: Outputs per query, "no object" included.
        queries: Number of queries N.
        width: Channels of both decoders.
        mask_width: Channels of the mask embedding.
        encoder_levels: Backbone levels that the deformable encoder sees, from the coarsest: 1 (RbA, UGainS) or 3.
        encoder_layers: Layers of the deformable encoder.
        encoder_hidden: Hidden channels of its feed-forward nets.
        decoder_levels: Pixel decoder levels that queries attend to in turn, from the coarsest.
        decoder_layers: Layers of the transformer decoder.
        decoder_hidden: Hidden channels of its feed-forward nets.
        global_attention: Queries also attend to the pixels outside their masks, as in Mask2Anomaly.
    """

    def __init__(
        self,
        backbone: SwinTransformer | ResNet,
        classes: int,
        queries: int,
        width: int,
        mask_width: int,
        encoder_levels: int,
        encoder_layers: int,
        encoder_hidden: int,
        decoder_levels: int,
        decoder_layers: int,
        decoder_hidden: int,
        *,
        global_attention: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        pixel_decoder = _PixelDecoder(
            backbone.widths, width, mask_width, encoder_levels, encoder_layers, encoder_hidden, output_levels=decoder_levels
        )
        attention = _GlobalAttentionLayer if global_attention else _CrossAttentionLayer
        predictor = _Predictor(classes, queries, width, mask_width, decoder_levels, decoder_layers, decoder_hidden, attention)
        self.sem_seg_head = nn.ModuleDict({"pixel_decoder": pixel_decoder, "predictor": predictor})

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> Mask2Former:
        """A network without values, on the meta device, for a checkpoint with the release's names.

        Raises:
            WeightsError: An entry whose shape is needed is missing.
        """

        def shape(name: str) -> tuple[int, ...]:
            if name not in state:
                raise WeightsError(f"weights are not of the family 'mask2former': {name} is missing")
            return tuple(state[name].shape)

        def count(pattern: str) -> int:
            number = 0
            while any(key.startswith(pattern.format(number)) for key in state):
                number += 1
            return number

        decoder, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
        mask_width, width = shape(f"{decoder}mask_features.weight")[:2]
        classes = shape(f"{predictor}class_embed.weight")[0]
        with torch.device("meta"):
            return cls(
                ResNet.like(state) if "backbone.stem.conv1.weight" in state else SwinTransformer.like(state),
                classes=classes,
                queries=shape(f"{predictor}query_feat.weight")[0],
                width=width,
                mask_width=mask_width,
                encoder_levels=shape(f"{decoder}transformer.level_embed")[0],
                encoder_layers=count(f"{decoder}transformer.encoder.layers.{{}}."),
                encoder_hidden=shape(f"{decoder}transformer.encoder.layers.0.linear1.weight")[0],
                decoder_levels=shape(f"{predictor}level_embed.weight")[0],
                decoder_layers=count(f"{predictor}transformer_ffn_layers.{{}}."),
                decoder_hidden=shape(f"{predictor}transformer_ffn_layers.0.linear1.weight")[0],
                global_attention=any(".multihead_attn_background." in key for key in state),
            )

    def forward(self, image: Tensor) -> Mask2FormerOutput:
        """Runs the network.

        Args:
            image: (B, 3, h, w) normalised float RGB, h and w multiples of 32.
        """
        features = self.backbone(image)
        # Offsets of the deformable attention and mask logits need more digits than autocast keeps.
        with torch.autocast(image.device.type, enabled=False):
            mask_features, levels = self.sem_seg_head["pixel_decoder"]([x.float() for x in features])
            output: Mask2FormerOutput = self.sem_seg_head["predictor"](levels, mask_features)
        return output


class _Layers(nn.Module):
    """Modules below the name ``layers``, where the release has them."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class _PixelDecoder(nn.Module):
    """Deformable attention over the coarse levels, then a feature pyramid down to stride 4."""

    def __init__(
        self, in_widths: Sequence[int], width: int, mask_width: int, levels: int, layers: int, hidden: int, output_levels: int
    ) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(_GROUPS, width)) for channels in reversed(in_widths[-levels:])
        )
        self.transformer = _DeformableTransformer(width, levels, layers, hidden)
        self.mask_features = nn.Conv2d(width, mask_width, 1)
        self._pyramid = len(in_widths) - levels
        for index, channels in enumerate(in_widths[: self._pyramid], start=1):
            self.add_module(f"adapter_{index}", _NormedConv2d(channels, width, 1))
            self.add_module(f"layer_{index}", _NormedConv2d(width, width, 3))
        self._output_levels = output_levels

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        coarse_first = [project(x) for project, x in zip(self.input_proj, reversed(features), strict=False)]
        outputs = self.transformer(coarse_first)
        for index in range(self._pyramid, 0, -1):
            lateral = self.get_submodule(f"adapter_{index}")(features[index - 1])
            upsampled = F.interpolate(outputs[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            outputs.append(F.relu(self.get_submodule(f"layer_{index}")(lateral + upsampled)))
        return self.mask_features(outputs[-1]), outputs[: self._output_levels]


class _NormedConv2d(nn.Conv2d):
    """Convolution without bias that keeps the size, group norm inside as detectron2 names it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(_GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(super().forward(x))
        return result


class _DeformableTransformer(nn.Module):
    def __init__(self, width: int, levels: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(levels, width))
        self.encoder = _Layers(_EncoderLayer(width, levels, hidden) for _ in range(layers))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        sizes = [(int(x.shape[2]), int(x.shape[3])) for x in features]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in features], dim=1)
        positions = [_sine_position(level) + self.level_embed[k, :, None, None] for k, level in enumerate(features)]
        position = torch.cat([level.flatten(2).transpose(1, 2) for level in positions], dim=1)
        centres = torch.cat([_pixel_centres(height, width, x.device) for height, width in sizes])
        for layer in self.encoder.layers:
            x = layer(x, position, centres, sizes)
        levels = torch.split(x, [height * width for height, width in sizes], dim=1)
        return [level.transpose(1, 2).reshape(len(x), -1, *size) for level, size in zip(levels, sizes, strict=True)]


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, levels: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = _DeformableAttention(width, levels)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        x = self.norm1(x + self.self_attn(x, position, centres, sizes))
        result: Tensor = self.norm2(x + self.linear2(F.relu(self.linear1(x))))
        return result


class _DeformableAttention(nn.Module):
    """Each token looks at a few learned offsets in every level (Zhu et al., ICLR 2021, Eq. 3)."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(width, HEADS * levels * _POINTS * 2)
        self.attention_weights = nn.Linear(width, HEADS * levels * _POINTS)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, position: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(B, S, C) tokens of all levels; ``centres`` are (S, 2) xy in [0, 1]."""
        batch, query = len(x), x + position
        offsets = self.sampling_offsets(query).unflatten(2, (HEADS, len(sizes), _POINTS, 2))
        weights = self.attention_weights(query).unflatten(2, (HEADS, len(sizes) * _POINTS)).softmax(-1)
        values = self.value_proj(x).split([height * width for height, width in sizes], dim=1)
        samples = []
        for level, (height, width) in enumerate(sizes):
            image = values[level].transpose(1, 2).reshape(batch * HEADS, -1, height, width)
            at = centres[:, None, None] + offsets[:, :, :, level] / offsets.new_tensor([width, height])
            samples.append(F.grid_sample(image, 2 * at.transpose(1, 2).flatten(0, 1) - 1, mode="bilinear", align_corners=False))
        mixed = (torch.cat(samples, dim=3) * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(3)
        result: Tensor = self.output_proj(mixed.view(batch, -1, x.shape[1]).transpose(1, 2))
        return result


class _Predictor(nn.Module):
    """Queries attend to the pixels inside their own predicted masks, to each other, and become classes and masks."""

    def __init__(
        self, classes: int, queries: int, width: int, mask_width: int, levels: int, layers: int, hidden: int, attention: type[nn.Module]
    ) -> None:
        super().__init__()
        self.transformer_self_attention_layers = nn.ModuleList(_SelfAttentionLayer(width) for _ in range(layers))
        self.transformer_cross_attention_layers = nn.ModuleList(attention(width) for _ in range(layers))
        self.transformer_ffn_layers = nn.ModuleList(_FeedForwardLayer(width, hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(levels, width)
        self.class_embed = nn.Linear(width, classes)
        widths = (width, width, width, mask_width)
        self.mask_embed = _Layers(nn.Linear(widths[k], widths[k + 1]) for k in range(3))

    def forward(self, levels: Sequence[Tensor], mask_features: Tensor) -> Mask2FormerOutput:
        batch = len(mask_features)
        memories = [(x + self.level_embed.weight[k, :, None, None]).flatten(2).permute(2, 0, 1) for k, x in enumerate(levels)]
        positions = [_sine_position(x).flatten(2).permute(2, 0, 1) for x in levels]
        query_position = self.query_embed.weight[:, None].expand(-1, batch, -1)
        x = self.query_feat.weight[:, None].expand(-1, batch, -1)
        layers = zip(
            self.transformer_cross_attention_layers, self.transformer_self_attention_layers, self.transformer_ffn_layers, strict=True
        )
        auxiliary = []
        for index, (cross_attention, self_attention, feed_forward) in enumerate(layers):
            k = index % len(levels)
            masks = self._masks(x, mask_features)
            if self.training:
                auxiliary.append((self._classes(x), masks))
            masks = F.interpolate(masks, size=levels[k].shape[-2:], mode="bilinear", align_corners=False).flatten(2)
            x = cross_attention(x, memories[k], positions[k], query_position, masks)
            x = feed_forward(self_attention(x, query_position))
        return Mask2FormerOutput(self._classes(x), self._masks(x, mask_features), tuple(auxiliary))

    def _classes(self, x: Tensor) -> Tensor:
        logits: Tensor = self.class_embed(self.decoder_norm(x).transpose(0, 1))
        return logits

    def _masks(self, x: Tensor, mask_features: Tensor) -> Tensor:
        embedding: Tensor = self.decoder_norm(x).transpose(0, 1)
        for k, layer in enumerate(self.mask_embed.layers):
            embedding = layer(F.relu(embedding) if k else embedding)
        return torch.einsum("bqc,bchw->bqhw", embedding, mask_features)


class _SelfAttentionLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, HEADS)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        query = x + position
        result: Tensor = self.norm(x + self.self_attn(query, query, x, need_weights=False)[0])
        return result


class _CrossAttentionLayer(nn.Module):
    """Queries attend to the pixels inside their masks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, HEADS)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, memory_position: Tensor, position: Tensor, masks: Tensor) -> Tensor:
        """(N, B, C) queries; ``masks`` are the (B, N, h * w) logits of their masks."""
        attended = _attend(self.multihead_attn, x + position, memory, memory_position, masks < 0)
        result: Tensor = self.norm(x + attended)
        return result


class _GlobalAttentionLayer(nn.Module):
    """Queries attend to the pixels inside their masks and, with weights of their own, to those outside (Rai et al., ICCV 2023, Eq. 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.multihead_attn_foreground = nn.MultiheadAttention(width, HEADS)
        self.multihead_attn_background = nn.MultiheadAttention(width, HEADS)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, memory_position: Tensor, position: Tensor, masks: Tensor) -> Tensor:
        """As in :class:`_CrossAttentionLayer`."""
        inside = _attend(self.multihead_attn_foreground, x + position, memory, memory_position, masks < 0)
        outside = _attend(self.multihead_attn_background, x + position, memory, memory_position, masks > 0)
        result: Tensor = self.norm(x + inside + outside)
        return result


def _attend(attention: nn.MultiheadAttention, query: Tensor, memory: Tensor, memory_position: Tensor, blocked: Tensor) -> Tensor:
    """Attention that must not look where ``blocked``, (B, N, h * w); a query that is blocked everywhere looks everywhere."""
    blocked = blocked & ~blocked.all(dim=2, keepdim=True)
    blocked = blocked.repeat_interleave(HEADS, dim=0)
    result: Tensor = attention(query, memory + memory_position, memory, attn_mask=blocked, need_weights=False)[0]
    return result


class _FeedForwardLayer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x + self.linear2(F.relu(self.linear1(x))))
        return result


def _pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(h * w, 2) xy in (0, 1)."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def _sine_position(like: Tensor) -> Tensor:
    """Sines and cosines of the pixel position, first of the row, then of the column (1, C, h, w) for ``like`` (B, C, h, w)."""
    channels, height, width = like.shape[1:]
    half = channels // 2
    frequency = 10000.0 ** (2 * (torch.arange(half, device=like.device) // 2) / half)

    def waves(size: int) -> Tensor:
        at = torch.arange(1, size + 1, device=like.device) / (size + 1e-6) * (2 * math.pi)
        phase = at[:, None] / frequency
        return torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=2).flatten(1).T

    rows = waves(height)[:, :, None].expand(-1, -1, width)
    columns = waves(width)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])[None]
