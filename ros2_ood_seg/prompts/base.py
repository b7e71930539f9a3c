"""What a prompt generator is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ros2_ood_seg.types import Prompts, ScoreMap


class PromptGenerator(Protocol):
    """Turns a score map into prompts for a promptable segmenter."""

    def __call__(self, score_map: ScoreMap, ignore: Tensor | None = None) -> Prompts:
        """Finds where to look.

        Args:
            score_map: Scores of one image.
            ignore: (H, W) bool on the same device, True where nothing is to be found; None for nowhere.

        Returns:
            Boxes or points, in the score map's pixels and on its device.
        """
        ...
