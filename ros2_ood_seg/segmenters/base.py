"""What a promptable segmenter is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ros2_ood_seg.types import Masks, Prompts


class PromptableSegmenter(Protocol):
    """Segments what each prompt points at."""

    name: str

    def __call__(self, image: Tensor, prompts: Prompts) -> Masks:
        """Segments one image.

        Args:
            image: (H, W, 3) uint8 RGB on the runtime's device.
            prompts: Boxes and points in the image's pixels.

        Returns:
            One mask per prompt, the boxes' first. Without prompts no network runs.
        """
        ...
