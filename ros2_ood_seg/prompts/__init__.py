"""Anomaly score map -> prompts: boxes (S2M) or points (UGainS)."""

from ros2_ood_seg.registry import Registry

BOX_PROMPTS = Registry(
    "box prompt generator",
    {
        "components": "ros2_ood_seg.prompts.components:build",
        "faster_rcnn": "ros2_ood_seg.prompts.faster_rcnn:build",
        "compact_rcnn": "ros2_ood_seg.prompts.faster_rcnn:build_compact",
    },
)
"""Factories ``build(config: BoxPromptsConfig, runtime: Runtime) -> PromptGenerator``."""

POINT_PROMPTS = Registry(
    "point prompt generator",
    {
        "fps": "ros2_ood_seg.prompts.points:build_fps",
        "kmeans": "ros2_ood_seg.prompts.points:build_kmeans",
        "random": "ros2_ood_seg.prompts.points:build_random",
        "grid": "ros2_ood_seg.prompts.points:build_grid",
    },
)
"""Factories ``build(config: PointPromptsConfig, runtime: Runtime) -> PromptGenerator``."""
