"""DeepLabV3+ on MobileNetV2: the small network on which the published anomaly methods can be trained without a GPU.

Trunk: torchvision's ``mobilenet_v2().features`` without its last convolution, skip connection at stride 4, the stage at stride 32
dilated to stride 16 (Sandler et al., CVPR 2018, section 6.3). Batch norms of the trunk stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d

from ros2_ood_seg.scorers.networks.deeplab_anomaly import AnomalyDeepLab, outputs_and_parts
from ros2_ood_seg.weights.store import WeightFile, load_into

WIDTH = 64
"""Channels of the decoder."""

_FINE_BLOCKS = 4
_BLOCKS = 18
_LAST_STRIDE = 14
_FINE_CHANNELS, _DEEP_CHANNELS = 24, 320
_RATES = (6, 12, 18)


class DeepLabMobileNetV2(AnomalyDeepLab):
    """The network; see :class:`AnomalyDeepLab` for the arguments.

    Args:
        num_classes: Outputs K.
        residual: Add RPL's residual block.
        projection: Add CoroCL's projection head to the residual block.
        ood_head: Add DenseHybrid's data-set posterior.
    """

    def __init__(self, num_classes: int, *, residual: bool = False, projection: bool = False, ood_head: bool = False) -> None:
        super().__init__(num_classes, residual=residual, projection=projection, ood_head=ood_head)
        self.features = _features()[:_BLOCKS]
        _dilate(self.features)
        self._add_decoder(_FINE_CHANNELS, _DEEP_CHANNELS, WIDTH, WIDTH // 4, _RATES)

    @classmethod
    def like(cls, state: Mapping[str, Tensor], **changed: int | bool) -> DeepLabMobileNetV2:
        """An untrained network of the same outputs and parts as a state dict but for what changed, on the meta device."""
        with torch.device("meta"):
            return cls(**{**outputs_and_parts(state), **changed})

    def load_imagenet_features(self, weights: WeightFile) -> None:
        """Starts the trunk from a state dict of torchvision's ``mobilenet_v2().features``.

        Raises:
            WeightsError: The file is of another network.
        """
        features = _features()
        own = features.state_dict().keys()
        state = {key.removeprefix("features."): value for key, value in weights.state.items() if not key.startswith("classifier.")}
        # Frozen norms count no batches.
        state = {key: value for key, value in state.items() if key in own or not key.endswith("num_batches_tracked")}
        load_into(features, WeightFile(weights.path, state, weights.metadata), "torchvision mobilenet_v2 features")
        self.features.load_state_dict(features[:_BLOCKS].state_dict())

    def trunk(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`AnomalyDeepLab.trunk`; (B, 24, h/4, w/4) and (B, 320, h/16, w/16)."""
        fine = self.features[:_FINE_BLOCKS]((image - 127.5) / 127.5)
        return fine, self.features[_FINE_BLOCKS:](fine)


def _features() -> nn.Sequential:
    return cast(nn.Sequential, mobilenet_v2(weights=None, norm_layer=FrozenBatchNorm2d).features)


def _dilate(features: nn.Sequential) -> None:
    """Takes the last stride away and spreads the taps of the blocks behind it instead."""
    for index in range(_LAST_STRIDE, _BLOCKS):
        for conv in features[index].modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                conv.stride = (1, 1)
                if index > _LAST_STRIDE:
                    conv.dilation = conv.padding = (2, 2)
