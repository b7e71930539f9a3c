"""EfficientNet-Lite's features: EfficientNet without squeeze-and-excitation and with ReLU6, made for small computers.

Source: tensorflow/tpu, ``models/official/efficientnet/lite`` (Tan and Le 2019). TensorFlow pads "SAME"; on even sizes that is more at the
lower right, which is kept here so that published ImageNet weights see what they were trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ros2_ood_seg.mobilenet import InvertedResidual, conv_norm_relu6, initialised

_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
"""Blocks, kernel, stride of the first block, expansion and channels of EfficientNet-B0 (Table 1)."""
_SCALES = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}
"""Multiples of channels and of blocks."""
_STEM = 32

VARIANTS = tuple(_SCALES)
"""Names for :func:`efficientnet_lite_features`."""


def efficientnet_lite_features(name: str) -> tuple[nn.Sequential, tuple[int, ...], tuple[int, ...]]:
    """Stem and blocks of an EfficientNet-Lite, randomly initialised.

    Args:
        name: One of :data:`VARIANTS`.

    Returns:
        The layers, and of those that end the strides 4, 8, 16 and 32 the indices and channels.
    """
    width, depth = _SCALES[name]
    layers: list[nn.Module] = [conv_norm_relu6(3, _STEM, 3, 2, like_tensorflow=True)]
    ends: dict[int, tuple[int, int]] = {}
    inputs, total_stride = _STEM, 2
    for stage, (blocks, kernel, stride, expansion, channels) in enumerate(_STAGES):
        outputs = _round_channels(channels * width)
        # Lite networks scale neither the stem nor the first and last stage's depth.
        repeats = blocks if stage in (0, len(_STAGES) - 1) else math.ceil(blocks * depth)
        for block in range(repeats):
            layers.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion, kernel, like_tensorflow=True))
            inputs = outputs
        total_stride *= stride
        ends[total_stride] = (len(layers) - 1, outputs)
    taps = [ends[s] for s in (4, 8, 16, 32)]
    return initialised(layers), tuple(index for index, _ in taps), tuple(channels for _, channels in taps)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the published PyTorch layout (``_conv_stem``, ``_blocks.N._expand_conv``, …) under this module's names; head left out."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("_conv_stem."):
            renamed[f"0.0.{key.split('.', 1)[1]}"] = value
        elif key.startswith("_bn0."):
            renamed[f"0.1.{key.split('.', 1)[1]}"] = value
        elif key.startswith("_blocks."):
            _, block, layer, entry = key.split(".", 3)
            shift = 0 if block == "0" else 1
            place = {
                "_expand_conv": "0.0",
                "_bn0": "0.1",
                "_depthwise_conv": f"{shift}.0",
                "_bn1": f"{shift}.1",
                "_project_conv": f"{shift + 1}",
                "_bn2": f"{shift + 2}",
            }[layer]
            renamed[f"{int(block) + 1}.conv.{place}.{entry}"] = value
    return renamed


def _round_channels(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
