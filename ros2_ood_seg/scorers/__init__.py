"""Image -> anomaly score map."""

from ros2_ood_seg.registry import Registry

SCORERS = Registry(
    "scorer",
    {
        "compact": "ros2_ood_seg.scorers.compact:build",
        "external": "ros2_ood_seg.scorers.external:build",
        "deeplab_wrn38": "ros2_ood_seg.scorers.deeplab:build_plain",
        "deeplab_mobilenet_v2": "ros2_ood_seg.scorers.deeplab:build_mobilenet_v2",
        "max_entropy": "ros2_ood_seg.scorers.deeplab:build_max_entropy",
        "pebal": "ros2_ood_seg.scorers.deeplab:build_pebal",
        "rpl": "ros2_ood_seg.scorers.deeplab:build_rpl",
        "dense_hybrid": "ros2_ood_seg.scorers.deeplab:build_dense_hybrid",
        "mahalanobis": "ros2_ood_seg.scorers.deeplab:build_mahalanobis",
        "sml": "ros2_ood_seg.scorers.sml:build",
        "ldn121": "ros2_ood_seg.scorers.ladder_densenet:build_plain",
        "dense_hybrid_ldn121": "ros2_ood_seg.scorers.ladder_densenet:build_dense_hybrid",
        "segformer": "ros2_ood_seg.scorers.segformer:build_plain",
        "gmmseg": "ros2_ood_seg.scorers.segformer:build_gmmseg",
        "torchvision_segmentation": "ros2_ood_seg.scorers.torchvision_segmentation:build",
        "rba": "ros2_ood_seg.scorers.mask2former:build_rba",
        "eam": "ros2_ood_seg.scorers.mask2former:build_eam",
        "uno": "ros2_ood_seg.scorers.mask2former:build_uno",
        "mask2anomaly": "ros2_ood_seg.scorers.mask2former:build_mask2anomaly",
    },
)
"""Factories ``build(config: ScorerConfig, runtime: Runtime) -> Scorer``."""
