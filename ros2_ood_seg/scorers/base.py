"""What a scorer is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from ros2_ood_seg.types import ScoreMap


class Scorer(Protocol):
    """Turns an image into a per-pixel anomaly score."""

    name: str

    def __call__(self, image: Tensor, external: Tensor | None = None) -> ScoreMap:
        """Scores one image.

        Args:
            image: (H, W, 3) uint8 RGB on the runtime's device.
            external: (h, w) float32 score map from elsewhere; only the scorer ``external`` takes one.

        Returns:
            Scores in the image's pixels, on the image's device.

        Raises:
            InputError: The scores are not finite, or ``external`` is missing or of another shape.
        """
        ...


class CalibratedScorer(Scorer, Protocol):
    """A scorer with weights, whose calibrations lie beside them.

    Args:
        weights_path: The weights file.
        calibration_key: ``scorer/score``, its entry in the file of calibrations.
    """

    weights_path: Path
    calibration_key: str
