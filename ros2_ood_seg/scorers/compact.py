"""The bundled scorer: a small network with in-distribution classes and an outlier head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import functions
from ros2_ood_seg.scorers.calibration import calibration_path, read_calibration
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES, OUTPUT_STRIDE, STRIDE, CompactNet, CompactOutput
from ros2_ood_seg.types import Calibration, ScoreMap
from ros2_ood_seg.weights.store import WeightFile, find_weights, load_into, load_weights

SCORES = ("outlier", "msp", "entropy", "energy", "max_logit")
"""Score functions that this network has outputs for."""


def build(config: ScorerConfig, runtime: Runtime) -> CompactScorer:
    """Loads the network.

    Raises:
        WeightsError: The weights are missing, damaged, of another network, or hold no calibration for the chosen score.
    """
    weights = load_weights(find_weights(config.weights or "compact_scorer", runtime.weights_dir))
    return from_weights(weights, config, runtime)


def from_weights(weights: WeightFile, config: ScorerConfig, runtime: Runtime, calibration: Calibration | None = None) -> CompactScorer:
    """The scorer of weights in memory; ``calibration`` replaces the one in their metadata.

    Raises:
        WeightsError: See :func:`build`.
    """
    net = CompactNet()
    load_into(net, weights, "compact_scorer")
    score = config.score if config.score != "default" else str(weights.metadata.get("default_score", "outlier"))
    return CompactScorer(net, score, weights.path, calibration or _calibration(weights, score, config.temperature), config, runtime)


class CompactScorer:
    """Runs the network at ``config.input_width`` and at ``config.second_scale`` times it, and gives scores in the image's pixels.

    Args:
        net: The network, with weights.
        score: One of :data:`SCORES`.
        weights: Where the weights came from; further calibrations lie beside it.
        calibration: Of that score.
        config: Input width, second scale, temperature and smoothing.
        runtime: Device and precision.
    """

    name = "compact"

    def __init__(
        self, net: CompactNet, score: str, weights: Path, calibration: Calibration, config: ScorerConfig, runtime: Runtime
    ) -> None:
        if config.smoothing_px and config.smoothing_px % 2 == 0:
            raise InputError(f"scorer.smoothing_px is {config.smoothing_px}, allowed: 0 or an odd number")
        self._net = net.eval().requires_grad_(False).to(runtime.device)
        self._net.to(memory_format=torch.channels_last)
        self.weights_path = weights
        self.calibration_key = f"{self.name}/{score}"
        self._score = score
        self._calibration = calibration
        self._config = config
        self._runtime = runtime

    def __call__(self, image: Tensor, external: Tensor | None = None) -> ScoreMap:
        """Scores one image; see :class:`~ros2_ood_seg.scorers.base.Scorer`."""
        if external is not None:
            raise InputError("scorer 'compact' computes its own map and takes no external one: set scorer.name to 'external'")
        height, width = int(image.shape[0]), int(image.shape[1])
        output = self.logits(image)
        # Upsampling the logits, not the finished score, keeps borders between classes sharp.
        semantic = _to_image(output.class_logits, (height, width))[0].argmax(0).to(torch.uint8)
        scores = _to_image(score_of(self._score, output, self._config.temperature)[:, None], (height, width))
        if self._config.smoothing_px:
            # As in PEBAL and RPL: sigma 1 at 7 px.
            scores = gaussian_blur(scores, [self._config.smoothing_px] * 2, [self._config.smoothing_px / 7.0] * 2)
        scores = scores[0, 0]
        if not torch.isfinite(scores).all():
            raise InputError(f"scorer 'compact' gave {int((~torch.isfinite(scores)).sum())} scores that are not finite: damaged weights?")
        return ScoreMap(scores, self.name, self._calibration, semantic, CLASS_NAMES)

    def logits(self, image: Tensor) -> CompactOutput:
        """The network's outputs for one image, averaged over its scales.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            Outputs with a batch of one that cover exactly the image, a quarter as wide as the network's widest input.
        """
        config = self._config
        scales = (1.0,) if config.second_scale == 1.0 else (1.0, config.second_scale)
        looks = [self._logits_at(image, round(config.input_width * scale)) for scale in scales]
        height, width = max((int(look.outlier_logit.shape[1]), int(look.outlier_logit.shape[2])) for look in looks)
        classes = torch.stack([_to_image(look.class_logits, (height, width)) for look in looks]).mean(0)
        outlier = torch.stack([_to_image(look.outlier_logit[:, None], (height, width))[:, 0] for look in looks]).mean(0)
        return CompactOutput(classes, outlier)

    def _logits_at(self, image: Tensor, in_w: int) -> CompactOutput:
        height, width = int(image.shape[0]), int(image.shape[1])
        in_h = max(1, round(height * in_w / width))
        x = image.permute(2, 0, 1)[None].float()
        if (in_h, in_w) != (height, width):
            x = F.interpolate(x, size=(in_h, in_w), mode="bilinear", antialias=in_w < width, align_corners=False)
        # Repeating the border rather than padding with zeros: the network never saw black frames around pictures.
        x = F.pad(x, (0, -in_w % STRIDE, 0, -in_h % STRIDE), mode="replicate")
        with torch.inference_mode(), self._runtime.autocast():
            output = self._net(x.contiguous(memory_format=torch.channels_last))
        rows, columns = math.ceil(in_h / OUTPUT_STRIDE), math.ceil(in_w / OUTPUT_STRIDE)
        return CompactOutput(output.class_logits[..., :rows, :columns].float(), output.outlier_logit[..., :rows, :columns].float())


def score_of(score: str, output: CompactOutput, temperature: float = 1.0) -> Tensor:
    """One of :data:`SCORES` from the network's outputs; (B, h, w) float32."""
    if score == "outlier":
        return output.outlier_logit
    if score == "energy":
        return functions.energy(output.class_logits, temperature)
    return {"msp": functions.msp, "entropy": functions.entropy, "max_logit": functions.max_logit}[score](output.class_logits)


def _to_image(x: Tensor, shape_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=shape_hw, mode="bilinear", align_corners=False)


def _calibration(weights: WeightFile, score: str, temperature: float) -> Calibration:
    if score not in SCORES:
        raise WeightsError(f"scorer 'compact' has no score '{score}': use one of {', '.join(SCORES)}")
    if score == "energy" and temperature != 1.0:
        raise WeightsError(f"scorer 'compact' is calibrated for temperature 1, scorer.temperature is {temperature}")
    found: Mapping[str, Any] = weights.metadata.get("calibrations", {})
    published = Calibration.from_dict(found[score]) if score in found else None
    # Calibrations that a user made on their own camera come before those the weights were published with.
    if calibration_path(weights.path).is_file():
        return read_calibration(weights.path, f"compact/{score}", published or Calibration.linear())
    if published is None:
        raise WeightsError(f"weights file '{weights.path}' has no calibration for score '{score}', it has {', '.join(found) or 'none'}")
    return published
