"""Masks + scores -> instances and refined score map."""

from ros2_ood_seg.registry import Registry

FUSIONS = Registry(
    "fusion",
    {
        "s2m": "ros2_ood_seg.fusion.s2m:build",
        "ugains": "ros2_ood_seg.fusion.ugains:build",
        "hybrid": "ros2_ood_seg.fusion.hybrid:build",
    },
)
"""Factories ``build(config: FusionConfig, runtime: Runtime) -> Fusion``."""
