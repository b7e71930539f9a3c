"""Image + prompts -> masks."""

from ros2_ood_seg.registry import Registry

SEGMENTERS = Registry(
    "segmenter",
    {
        "compact": "ros2_ood_seg.segmenters.compact:build",
        "sam": "ros2_ood_seg.segmenters.sam:build",
        "grabcut": "ros2_ood_seg.segmenters.grabcut:build",
    },
)
"""Factories ``build(config: SegmenterConfig, runtime: Runtime) -> PromptableSegmenter``."""
