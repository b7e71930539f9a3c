"""Swin Transformer backbone (Liu et al., ICCV 2021) with the parameter names of Mask2Former's release, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ros2_ood_seg.errors import WeightsError


class SwinTransformer(nn.Module):
    """Four stages of windowed attention, each output normalised.

    Args:
        width: Channels of the first stage; each further stage doubles them.
        depths: Blocks per stage, every second one with shifted windows.
        heads: Attention heads per stage.
        window: Side of the attention windows in tokens.
    """

    def __init__(self, width: int, depths: Sequence[int], heads: Sequence[int], window: int) -> None:
        super().__init__()
        self.widths = tuple(width * 2**stage for stage in range(len(depths)))
        self.patch_embed = _PatchEmbed(width)
        self.layers = nn.ModuleList(
            _Stage(channels, depth, count, window, last=channels == self.widths[-1])
            for channels, depth, count in zip(self.widths, depths, heads, strict=True)
        )
        for stage, channels in enumerate(self.widths):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels))

    @classmethod
    def like(cls, state: Mapping[str, Tensor], prefix: str = "backbone.") -> SwinTransformer:
        """An untrained backbone of the same widths, depths, heads and window as a state dict.

        Raises:
            WeightsError: An entry whose shape is needed is missing.
        """

        def children(start: str) -> int:
            return len({key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)})

        stages = range(children(f"{prefix}layers."))
        names = [f"{prefix}layers.{stage}.blocks.0.attn.relative_position_bias_table" for stage in stages]
        for name in (f"{prefix}patch_embed.proj.weight", *names):
            if name not in state:
                raise WeightsError(f"weights are not of a Swin Transformer: {name} is missing")
        return cls(
            width=int(state[f"{prefix}patch_embed.proj.weight"].shape[0]),
            depths=[children(f"{prefix}layers.{stage}.blocks.") for stage in stages],
            heads=[int(state[name].shape[1]) for name in names],
            window=(math.isqrt(int(state[names[0]].shape[0])) + 1) // 2,
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features at strides 4, 8, 16 and 32.

        Args:
            image: (B, 3, h, w) normalised float RGB.

        Returns:
            Per stage (B, width, h / stride, w / stride), rounded up.
        """
        x = self.patch_embed(image)
        outputs = []
        for stage, layer in enumerate(self.layers):
            x, following = layer(x)
            outputs.append(self.get_submodule(f"norm{stage}")(x).permute(0, 3, 1, 2))
            x = following
        return outputs


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int = 4) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width)
        self._patch = patch

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self._patch, 0, -height % self._patch))
        result: Tensor = self.norm(self.proj(image).permute(0, 2, 3, 1))
        return result


class _Stage(nn.Module):
    def __init__(self, channels: int, depth: int, heads: int, window: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(channels, heads, window, shift=0 if k % 2 == 0 else window // 2) for k in range(depth))
        self.downsample = None if last else _PatchMerging(channels)
        self._window = window

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) to the stage's output of the same shape, and to the next stage's input."""
        mask = _shift_mask(x.shape[1], x.shape[2], self._window, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x, x if self.downsample is None else self.downsample(x)


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = _WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = _Mlp(channels)
        self._window = window
        self._shift = shift

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        side = self._window
        padded = F.pad(self.norm1(x), (0, 0, 0, -width % side, 0, -height % side))
        if self._shift:
            padded = padded.roll((-self._shift, -self._shift), dims=(1, 2))
        rows, columns = padded.shape[1] // side, padded.shape[2] // side
        windows = self.attn(_windows(padded, side), mask if self._shift else None)
        merged = windows.view(len(x), rows, columns, side, side, -1).transpose(2, 3).reshape(padded.shape)
        if self._shift:
            merged = merged.roll((self._shift, self._shift), dims=(1, 2))
        x = x + merged[:, :height, :width]
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for each relative position."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", _relative_position_index(window))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self._heads = heads

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(windows, tokens, C); ``mask`` is (windows per image, tokens, tokens) float."""
        count, tokens, channels = x.shape
        q, k, v = self.qkv(x).view(count, tokens, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        index: Tensor = self.get_buffer("relative_position_index")
        bias = self.relative_position_bias_table[index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask[:, None]
            if count > len(mask):
                bias = bias.repeat(count // len(mask), 1, 1, 1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        result: Tensor = self.proj(x.transpose(1, 2).reshape(count, tokens, channels))
        return result


class _Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class _PatchMerging(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        quarters = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        result: Tensor = self.reduction(self.norm(torch.cat(quarters, dim=-1)))
        return result


def _windows(x: Tensor, side: int) -> Tensor:
    """(B, h, w, C) to (B * windows, side * side, C); h and w are multiples of ``side``."""
    batch, height, width, channels = x.shape
    tiles = x.view(batch, height // side, side, width // side, side, channels).transpose(2, 3)
    return tiles.reshape(-1, side * side, channels)


def _shift_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """-100 between tokens that only the cyclic shift brought into one window, (windows, tokens, tokens)."""

    def regions(size: int) -> Tensor:
        padded = size + -size % window
        at = torch.arange(padded, device=device)
        return (at >= padded - window).int() + (at >= padded - window // 2).int()

    labels = regions(height)[:, None] * 3 + regions(width)[None, :]
    labels = _windows(labels[None, :, :, None], window)[:, :, 0]
    return torch.where(labels[:, None] == labels[:, :, None], 0.0, -100.0)


def _relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each pair of tokens, (tokens, tokens)."""
    rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + right
