"""The network of the compact segmenter: a crop and its prompt to a mask and its expected IoU.

MobileNetV2 (Sandler et al. 2018) without its classifier, a top-down decoder in the manner of feature pyramids (Lin et al. 2017)
and, as in Segment Anything (Kirillov et al. 2023), a head that predicts the IoU of the mask it stands beside.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.mobilenet import mobilenet_v2_features
from ros2_ood_seg.weights import WeightFile

INPUT_CHANNELS = 5
"""RGB in [-1, 1], then box coverage and point map in [0, 1]."""
MASK_STRIDE = 2
"""Input pixels per mask logit."""
_LAST = 17
_FROZEN = 4
_TAPS = {1: 16, 3: 24, 6: 32, 13: 96, _LAST: 320}
_FINE = 32


class CompactNet(nn.Module):
    """Segments the object that the prompt channels point at.

    The encoder's batch norms are folded into its convolutions, for training too: the start weights come folded, so statistics of
    small batches would only destroy them. Its first blocks, at strides 2 and 4, see the image alone and are never trained; the prompt
    joins behind them.

    Args:
        width: Channels of the decoder.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.encoder = fold_batch_norm(mobilenet_v2_features()[: _LAST + 1])
        # The folded biases come without gradients.
        self.encoder.requires_grad_()
        self.encoder[:_FROZEN].requires_grad_(False)
        _, c4, c8, c16, c32 = _TAPS.values()
        self.prompt = nn.Conv2d(INPUT_CHANNELS - 3, c4, 3, padding=1)
        nn.init.zeros_(self.prompt.weight)
        self.lateral32 = nn.Conv2d(c32, width, 1)
        self.lateral16 = nn.Conv2d(c16, width, 1)
        self.lateral8 = nn.Conv2d(c8, width, 1)
        self.lateral4 = nn.Conv2d(c4, width, 1)
        self.lateral2 = nn.Conv2d(_TAPS[1], _FINE, 1)
        self.narrow = nn.Conv2d(width, _FINE, 1)
        self.smooth16 = _block(width)
        self.smooth8 = _block(width)
        self.smooth4 = _block(width)
        self.smooth2 = _block(_FINE)
        self.mask = nn.Conv2d(_FINE, 1, 1)
        self.quality = nn.Sequential(nn.Linear(3 * width + 2, 64), nn.ReLU(inplace=True), nn.Linear(64, 1))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Segments a batch of crops.

        Args:
            crops: (N, 5, S, S) float32, see :data:`INPUT_CHANNELS`; S a multiple of 32.

        Returns:
            (N, 1, S/2, S/2) mask logits, positive inside; (N,) logits of the mask's expected IoU.
        """
        x = crops[:, :3]
        taps = []
        for index, layer in enumerate(self.encoder):
            x = layer(x)
            if index == _FROZEN - 1:
                x = x + self.prompt(F.avg_pool2d(crops[:, 3:], 4))
            if index in _TAPS:
                taps.append(x)
        f2, f4, f8, f16, f32 = taps
        coarse = self.lateral32(f32)
        y = self.smooth16(self.lateral16(f16) + _up(coarse))
        y = self.smooth8(self.lateral8(f8) + _up(y))
        y = self.smooth4(self.lateral4(f4) + _up(y))
        logits = self.mask(self.smooth2(self.lateral2(f2) + _up(self.narrow(y))))
        return logits, self._quality(y, coarse, logits)

    def _quality(self, fine: Tensor, coarse: Tensor, logits: Tensor) -> Tensor:
        # The head judges the mask; it must not be able to make a mask that is easy to judge.
        inside = F.avg_pool2d(logits.detach().float(), 2).sigmoid()
        area = inside.mean(dim=(2, 3))
        doubt = (inside * (1 - inside)).mean(dim=(2, 3))
        on_mask = (fine * inside).mean(dim=(2, 3)) / (area + 1e-3)
        features = torch.cat([on_mask, fine.mean(dim=(2, 3)), coarse.mean(dim=(2, 3)), area, doubt / (area + 1e-3)], dim=1)
        return cast("Tensor", self.quality(features)).squeeze(1)

    def load_imagenet(self, start: WeightFile) -> None:
        """Starts the encoder from an ImageNet ``mobilenet_v2().features`` whose input is ``(x - 127.5) / 127.5``.

        Raises:
            WeightsError: The file does not hold that network.
        """
        features = mobilenet_v2_features()
        try:
            features.load_state_dict(start.state)
        except RuntimeError as error:
            raise WeightsError(f"weights file '{start.path}' must hold torchvision's mobilenet_v2().features") from error
        self.encoder.load_state_dict(fold_batch_norm(features[: _LAST + 1]).state_dict())


def fold_batch_norm(network: nn.Sequential) -> nn.Sequential:
    """Folds every batch norm behind a convolution into it, in place; the function in eval mode stays the same."""
    network.eval()
    for module in network.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for index in range(len(module) - 1):
            conv, norm = module[index], module[index + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[index] = fuse_conv_bn_eval(conv, norm)
                module[index + 1] = nn.Identity()
    return network


def _block(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
