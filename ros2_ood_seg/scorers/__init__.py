"""Image -> anomaly score map."""

from ros2_ood_seg.registry import Registry

SCORERS = Registry(
    "scorer",
    {
        "compact": "ros2_ood_seg.scorers.compact:build",
        "external": "ros2_ood_seg.scorers.external:build",
    },
)
"""Factories ``build(config: ScorerConfig, runtime: Runtime) -> Scorer``."""
