"""What a fusion is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ros2_ood_seg.types import Fused, Masks, Prompts, ScoreMap


class Fusion(Protocol):
    """Turns masks and scores into instances and a refined score map."""

    def __call__(self, score_map: ScoreMap, prompts: Prompts, masks: Masks, ignore: Tensor | None = None) -> Fused:
        """Fuses one frame.

        Args:
            score_map: The scorer's map.
            prompts: What was asked.
            masks: What the segmenter answered, one mask per prompt, boxes first.
            ignore: (H, W) bool, True where nothing is to be found; None for nowhere.
        """
        ...
