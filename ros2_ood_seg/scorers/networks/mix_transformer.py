"""Mix Transformer, the backbone of SegFormer (Xie et al., NeurIPS 2021), with the parameter names of mmsegmentation, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6
_STRIDES = (4, 2, 2, 2)
_PATCHES = (7, 3, 3, 3)


class MixTransformer(nn.Module):
    """Four stages of attention to reduced keys and values, each output normalised.

    Args:
        widths: Channels of the stages; the first one has one attention head, the others have as many as they are wider.
        depths: Blocks per stage.
        reductions: Side of the squares of tokens that become one key and value, per stage.
        hidden: Hidden channels of the feed-forward nets, as a multiple of a stage's channels.
    """

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], reductions: Sequence[int] = (8, 4, 2, 1), hidden: Sequence[int] = (4, 4, 4, 4)
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.layers = nn.ModuleList()
        channels = 3
        for stage, width in enumerate(widths):
            blocks = nn.ModuleList(
                _Block(width, width // widths[0], reductions[stage], hidden[stage] * width) for _ in range(depths[stage])
            )
            self.layers.append(
                nn.ModuleList([_PatchEmbed(channels, width, _PATCHES[stage], _STRIDES[stage]), blocks, nn.LayerNorm(width, eps=_EPS)])
            )
            channels = width

    @classmethod
    def like(cls, state: Mapping[str, Tensor], prefix: str = "backbone.") -> MixTransformer:
        """An untrained backbone of the same widths and depths as a state dict."""
        stages = range(len(_STRIDES))
        widths = [int(state[f"{prefix}layers.{stage}.0.projection.weight"].shape[0]) for stage in stages]
        depths, reductions, hidden = [], [], []
        for stage in stages:
            blocks = f"{prefix}layers.{stage}.1."
            depths.append(len({key.removeprefix(blocks).split(".")[0] for key in state if key.startswith(blocks)}))
            reduction = state.get(f"{blocks}0.attn.sr.weight")
            reductions.append(1 if reduction is None else int(reduction.shape[2]))
            hidden.append(int(state[f"{blocks}0.ffn.layers.0.weight"].shape[0]) // widths[stage])
        return cls(widths, depths, reductions, hidden)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features at strides 4, 8, 16 and 32.

        Args:
            image: (B, 3, h, w) normalised float RGB.

        Returns:
            Per stage (B, width, h / stride, w / stride), rounded up.
        """
        outputs = []
        x = image
        for stage in self.layers:
            patch_embed, blocks, norm = stage.children()
            x, size_hw = patch_embed(x)
            for block in blocks.children():
                x = block(x, size_hw)
            x = _to_map(norm(x), size_hw)
            outputs.append(x)
        return outputs


class _PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, channels: int, patch: int, stride: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, patch, stride=stride, padding=patch // 2)
        self.norm = nn.LayerNorm(channels, eps=_EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.projection(x)
        return self.norm(_to_tokens(x)), (int(x.shape[2]), int(x.shape[3]))


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int, reduction: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=_EPS)
        self.attn = _ReducedAttention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=_EPS)
        self.ffn = _MixFeedForward(channels, hidden)

    def forward(self, x: Tensor, size_hw: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), size_hw)
        result: Tensor = x + self.ffn(self.norm2(x), size_hw)
        return result


class _ReducedAttention(nn.Module):
    """Self-attention whose keys and values stand for squares of tokens (Eq. 2)."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.sr = nn.Conv2d(channels, channels, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels, eps=_EPS) if reduction > 1 else None

    def forward(self, x: Tensor, size_hw: tuple[int, int]) -> Tensor:
        reduced = x
        if self.sr is not None and self.norm is not None:
            reduced = self.norm(_to_tokens(self.sr(_to_map(x, size_hw))))
        # Not through the module, whose forward forms all pairs of tokens at once where its fast path does not apply.
        wq, wk, wv = self.attn.in_proj_weight.chunk(3)
        bq, bk, bv = self.attn.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(y, weight, bias).view(len(y), y.shape[1], self.attn.num_heads, -1).transpose(1, 2)
            for y, weight, bias in ((x, wq, bq), (reduced, wk, bk), (reduced, wv, bv))
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = self.attn.out_proj(attended)
        return result


class _MixFeedForward(nn.Module):
    """Feed-forward net with a depthwise 3x3 convolution that tells tokens where they are (Eq. 3)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        # The release has dropout at index 3.
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            nn.Identity(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor, size_hw: tuple[int, int]) -> Tensor:
        return _to_tokens(self.layers(_to_map(x, size_hw)))


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


def _to_map(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """(B, h * w, C) to (B, C, h, w)."""
    return x.transpose(1, 2).reshape(len(x), -1, *size_hw)
