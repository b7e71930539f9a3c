"""The bundled scorer: a small network with in-distribution classes and an outlier head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import functions
from ros2_ood_seg.scorers.calibration import calibration_path, read_calibration
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES, STRIDE, CompactNet, CompactOutput, MergedHeads
from ros2_ood_seg.types import Calibration, ScoreMap
from ros2_ood_seg.weights.store import WeightFile, find_weights, load_weights
from ros2_ood_seg.zoom import MORE_DETAIL, raise_to, road_end, window_at

SCORES = ("outlier", "msp", "entropy", "energy", "max_logit")
"""Score functions that this network has outputs for."""
_ROAD = CLASS_NAMES.index("drivable")


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
    net = CompactNet.of(weights)
    score = config.score if config.score != "default" else str(weights.metadata.get("default_score", "outlier"))
    return CompactScorer(net, score, weights.path, calibration or _calibration(weights, score, config.temperature), config, runtime)


class CompactScorer:
    """Runs the network at ``config.input_width`` and at two multiples of it, and gives scores in the image's pixels.

    In pictures with more detail than that, it looks at the end of the road (``config.zoom``) in the camera's own pixels, too, but no
    wider than the widest of the others.

    Args:
        net: The network, with weights.
        score: One of :data:`SCORES`.
        weights: Where the weights came from; further calibrations lie beside it.
        calibration: Of that score.
        config: Input width, further scales, temperature and smoothing.
        runtime: Device and precision.
    """

    name = "compact"

    def __init__(
        self, net: CompactNet, score: str, weights: Path, calibration: Calibration, config: ScorerConfig, runtime: Runtime
    ) -> None:
        merged = MergedHeads(net.eval()).requires_grad_(False).to(runtime.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward = runtime.prepare(merged.eval(), torch.zeros((1, 3, 2 * STRIDE, 2 * STRIDE), device=runtime.device))
        self.weights_path = weights
        self.calibration_key = f"{self.name}/{score}"
        self._score = score
        self._calibration = calibration
        self._config = config

    def __call__(self, image: Tensor, external: Tensor | None = None) -> ScoreMap:
        """Scores one image; see :class:`~ros2_ood_seg.scorers.base.Scorer`."""
        if external is not None:
            raise InputError("scorer 'compact' computes its own map and takes no external one: set scorer.name to 'external'")
        shape_hw = (int(image.shape[0]), int(image.shape[1]))
        output = self.logits(image)
        scores = _to_image(self._score_of(output)[:, None], shape_hw)
        end = road_end((output.class_logits[0].argmax(0) == _ROAD).cpu().numpy())
        scores = self._with_zoom(image, end, scores)
        if self._config.smoothing_px:
            from ros2_ood_seg.scorers.network import smooth

            scores = smooth(scores[0, 0], self._config.smoothing_px)[None, None]
        scores = scores[0, 0]
        if not torch.isfinite(scores).all():
            raise InputError(f"scorer 'compact' gave {int((~torch.isfinite(scores)).sum())} scores that are not finite: damaged weights?")
        return ScoreMap(scores, self.name, self._calibration, lambda: _classes(output.class_logits, shape_hw), CLASS_NAMES, end)

    def logits(self, image: Tensor) -> CompactOutput:
        """The network's outputs for one image, averaged over its scales, without zoom.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            Outputs with a batch of one that cover exactly the image, a quarter as wide as the network's widest input.
        """
        config = self._config
        scales = (1.0, *(scale for scale in (config.coarse_scale, config.second_scale) if scale != 1.0))
        pixels = image.permute(2, 0, 1)[None].float()
        width = config.input_width or int(image.shape[1])
        looks = [self._logits_at(pixels, round(width * scale)) for scale in scales]
        size = max((int(look.shape[2]), int(look.shape[3])) for look in looks)
        logits = torch.stack([_to_image(look, size) for look in looks]).mean(0)
        return CompactOutput(logits[:, :-1], logits[:, -1])

    def _score_of(self, output: CompactOutput) -> Tensor:
        return score_of(self._score, output, self._config.temperature)

    def _with_zoom(self, image: Tensor, end: tuple[float, float] | None, scores: Tensor) -> Tensor:
        """(1, 1, H, W) scores, raised at the end of the road to what a closer look gives there."""
        config = self._config
        height, width = scores.shape[-2:]
        widest = (config.input_width or width) * max(1.0, config.second_scale)
        if end is None or not config.zoom or width < MORE_DETAIL * widest:
            return scores
        x, y, right, bottom = window = window_at(end, config.zoom, (height, width))
        part = image[y:bottom, x:right].permute(2, 0, 1)[None].float()
        # No wider than the widest look: pictures of more pixels would cost more and be larger than anything seen in training.
        logits = self._logits_at(part, min(right - x, round(widest)))
        closer = _to_image(self._score_of(CompactOutput(logits[:, :-1], logits[:, -1]))[:, None], (bottom - y, right - x))
        return raise_to(scores[0, 0], closer[0, 0], window)[None, None]

    def _logits_at(self, pixels: Tensor, in_w: int) -> Tensor:
        """(1, classes + 1, h/4, w/4) of the image at about this width."""
        height, width = int(pixels.shape[2]), int(pixels.shape[3])
        # Whole strides at the cost of a slightly other shape: padding would show the network a border that no picture has.
        in_h, in_w = (max(STRIDE, round(side / STRIDE) * STRIDE) for side in (height * in_w / width, in_w))
        x = pixels
        if (in_h, in_w) != (height, width):
            x = F.interpolate(x, size=(in_h, in_w), mode="bilinear", antialias=in_w < width, align_corners=False)
        with torch.inference_mode():
            return self._forward(x)[0].float()


def score_of(score: str, output: CompactOutput, temperature: float = 1.0) -> Tensor:
    """One of :data:`SCORES` from the network's outputs; (B, h, w) float32."""
    if score == "outlier":
        return output.outlier_logit
    if score == "energy":
        return functions.energy(output.class_logits, temperature)
    return {"msp": functions.msp, "entropy": functions.entropy, "max_logit": functions.max_logit}[score](output.class_logits)


def _to_image(x: Tensor, shape_hw: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == shape_hw:
        return x
    return F.interpolate(x, size=shape_hw, mode="bilinear", align_corners=False)


def _classes(class_logits: Tensor, shape_hw: tuple[int, int]) -> Tensor:
    """(H, W) uint8; upsampling the logits, not the classes, keeps borders between them sharp."""
    return _to_image(class_logits, shape_hw)[0].argmax(0).to(torch.uint8)


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
