"""``ood-seg ablate ugains``: what each stage of UGainS contributes, as a table and a plot (UGainS Tables 2 to 5)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.evaluation import sampling
from ros2_ood_seg.evaluation.datasets import DataSet, LabelledImage
from ros2_ood_seg.evaluation.instance import truth_instances
from ros2_ood_seg.fusion.base import Fusion
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.prompts.points import oracle_points, uncertain_pixels
from ros2_ood_seg.training.ablation import (
    Sweep,
    Table,
    Tell,
    Variant,
    add_arguments,
    markdown_table,
    percent,
    plot_rows,
    run_sweep,
    scorer_variants,
)
from ros2_ood_seg.types import FrameResult, Fused, Masks, Prompts, ScoreMap

COUNTS = (10, 20, 50, 100, 200, 300)
"""UGainS Table 5."""

SAMPLERS = ("random", "kmeans", "fps", "grid")
"""UGainS Table 4, and the dense grid of Table 2."""


@dataclass(frozen=True)
class Row:
    """What a variant reached on a data set; fractions, None where there is no such value.

    Args:
        dataset: Name of the data set's folder.
        variant: Label of the variant.
        ap: Pixel AP of the score map.
        fpr95: Of the score map.
        refined_ap: Pixel AP after the ensemble.
        refined_fpr95: After the ensemble.
        instance_ap: Cityscapes protocol, 10 px and more.
        instance_ap50: At an overlap of 0.5.
        point_precision: Share of the points on an object.
        point_recall: Share of the objects with a point.
        prompts: Mean number of points a frame.
        instances: Mean number of instances a frame.
        total_ms: Median time of a frame.
    """

    dataset: str
    variant: str
    ap: float | None
    fpr95: float | None
    refined_ap: float | None
    refined_fpr95: float | None
    instance_ap: float | None
    instance_ap50: float | None
    point_precision: float | None
    point_recall: float | None
    prompts: float
    instances: float
    total_ms: float


class OraclePoints:
    """A point prompt generator that knows the answer: one point deep inside each object of the frame it was told about."""

    def __init__(self) -> None:
        self._points_xy = torch.zeros((0, 2))

    def tell(self, frame: LabelledImage) -> None:
        """Sets the ground truth of the next frame."""
        truth = truth_instances(frame.label, frame.instances)
        self._points_xy = oracle_points(torch.from_numpy(np.maximum(truth, 0)))

    def __call__(self, score_map: ScoreMap, ignore: Tensor | None = None) -> Prompts:
        """See :class:`ros2_ood_seg.prompts.base.PromptGenerator`."""
        return Prompts.from_points(self._points_xy.to(score_map.device))

    @classmethod
    def replace_in(cls, pipeline: Pipeline) -> Tell:
        """Takes the place of all prompt generators."""
        oracle = cls()
        pipeline.box_prompts, pipeline.point_prompts = None, oracle
        return oracle.tell


class SegmenterScores:
    """A fusion whose instances have the segmenter's predicted IoU as score, as the oracle of UGainS Table 2; 0 where it gives none."""

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion

    def __call__(self, score_map: ScoreMap, prompts: Prompts, masks: Masks, ignore: Tensor | None = None) -> Fused:
        """See :class:`ros2_ood_seg.fusion.base.Fusion`."""
        fused = self._fusion(score_map, prompts, masks, ignore)
        scores = fused.instances.mask_quality.nan_to_num(0.0)
        ranked = replace(fused.instances, scores=scores).select(torch.argsort(scores, descending=True, stable=True))
        return Fused(ranked, fused.refined)

    @classmethod
    def with_oracle(cls, pipeline: Pipeline) -> Tell:
        """Takes the place of the fusion, behind oracle points."""
        pipeline.fusion = cls(pipeline.fusion)
        return OraclePoints.replace_in(pipeline)


class ComponentMasks:
    """Prompts and masks without a network: the connected components of the uncertain pixels themselves are the instances.

    Components smaller than ``prompts.boxes.min_area_px`` are left out, and of more than ``prompts.boxes.max_boxes`` the largest stay.
    The threshold is that of the point prompts.
    """

    name = "components"

    def __init__(self, config: PipelineConfig) -> None:
        self._points = config.prompts.points
        self._boxes = config.prompts.boxes
        self._masks = torch.zeros((0, 1, 1), dtype=torch.bool)

    def prompts(self, score_map: ScoreMap, ignore: Tensor | None = None) -> Prompts:
        """See :class:`ros2_ood_seg.prompts.base.PromptGenerator`: a point in each component."""
        inside = uncertain_pixels(score_map, self._points, ignore).cpu().numpy().astype(np.uint8)
        _, labels, stats, _ = cv2.connectedComponentsWithStats(inside, connectivity=8, ltype=cv2.CV_32S)
        area = stats[:, cv2.CC_STAT_AREA].copy()
        area[0] = 0
        largest = np.argsort(-area, kind="stable")[: self._boxes.max_boxes]
        kept = np.sort(largest[area[largest] >= self._boxes.min_area_px])
        rank = np.zeros(len(area), np.int32)
        rank[kept] = np.arange(1, len(kept) + 1)
        components = torch.from_numpy(rank[labels])
        self._masks = components == torch.arange(1, len(kept) + 1)[:, None, None]
        return Prompts.from_points(oracle_points(components).to(score_map.device))

    def __call__(self, image: Tensor, prompts: Prompts) -> Masks:
        """See :class:`ros2_ood_seg.segmenters.base.PromptableSegmenter`: the components of the last map, none for other prompts."""
        if len(prompts) != len(self._masks):
            return Masks.empty((int(image.shape[0]), int(image.shape[1])), image.device)
        return Masks(self._masks.to(image.device), torch.full((len(self._masks),), torch.nan, device=image.device))

    @classmethod
    def replace_in(cls, pipeline: Pipeline) -> Tell:
        """Takes the place of all prompt generators and of the segmenter."""
        components = cls(pipeline.config)
        pipeline.box_prompts, pipeline.point_prompts, pipeline.segmenter = None, components.prompts, components
        return lambda frame: None


def sampling_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Where the points come from (UGainS Table 4)."""
    for method in SAMPLERS:
        yield Variant(method, {"prompts.points.method": method})


def count_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """How many points (UGainS Table 5)."""
    for count in args.counts:
        yield Variant(str(count), {"prompts.points.count": count})


def bound_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """The method step by step, between what it must beat and what it cannot (UGainS Table 2)."""
    yield Variant("connected components", alter=ComponentMasks.replace_in)
    yield Variant("dense grid", {"prompts.points.method": "grid"})
    published = {"fusion.quality_power": 0.0, "fusion.nms_containment": 1.0}
    yield Variant("sampled points, no NMS", {"fusion.nms_iou": 1.0, **published})
    yield Variant("sampled points, NMS", published)
    yield Variant("and this profile's ranking")
    # Whatever the scorer says of these, they are true.
    every = {"fusion.min_score": 0.0}
    yield Variant("oracle centres", every, alter=OraclePoints.replace_in)
    yield Variant("oracle centres, segmenter's score", every, alter=SegmenterScores.with_oracle)


ABLATIONS: dict[str, Callable[[argparse.Namespace], Iterator[Variant]]] = {
    "sampling": sampling_variants,
    "points": count_variants,
    "scorers": scorer_variants,
    "bounds": bound_variants,
}


def measure(sweep: Sweep, variant: Variant, dataset: DataSet) -> Row:
    """One variant on one data set."""
    matches: list[sampling.PointMatch] = []
    found: list[tuple[int, int]] = []

    def watch(frame: LabelledImage, result: FrameResult) -> None:
        matches.append(sampling.match_points(result.prompts.points_xy.cpu().numpy(), truth_instances(frame.label, frame.instances)))
        found.append((result.prompts.num_points, len(result.instances)))

    measured = sweep.measure(variant, dataset, watch)
    scores = sampling.summarise(matches)
    prompts, instances = np.mean(found, axis=0).tolist()
    report: dict[str, Any] = measured.report
    return Row(
        dataset=dataset.root.name,
        variant=variant.label,
        ap=report["pixel"]["ap"],
        fpr95=report["pixel"]["fpr95"],
        refined_ap=report["refined"]["ap"],
        refined_fpr95=report["refined"]["fpr95"],
        instance_ap=report["instance"]["ap"],
        instance_ap50=report["instance"]["ap50"],
        point_precision=scores.precision,
        point_recall=scores.recall,
        prompts=prompts,
        instances=instances,
        total_ms=measured.total_ms,
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, figures in percent."""
    head = ["data set", "variant", "AP", "FPR95", "refined AP", "refined FPR95", "instance AP", "AP50", "points right", "objects hit"]

    def cells(row: Row) -> list[str]:
        pixels = (row.ap, row.fpr95, row.refined_ap, row.refined_fpr95)
        figures = (*pixels, row.instance_ap, row.instance_ap50, row.point_precision, row.point_recall)
        counts = (f"{row.prompts:.1f}", f"{row.instances:.1f}", f"{row.total_ms:.0f}")
        return [row.dataset, row.variant, *map(percent, figures), *counts]

    return markdown_table([*head, "points", "instances", "ms"], map(cells, rows))


def plot_bars(rows: Sequence[Row], path: Path, steps_of: str = "") -> None:
    """Pixel AP before and after the ensemble, and instance AP."""
    plot_rows(
        rows,
        path,
        "AP (%)",
        {
            "pixels, score map": lambda row: row.ap,
            "pixels, refined": lambda row: row.refined_ap,
            "instances": lambda row: row.instance_ap,
            "instances, IoU > 0.5": lambda row: row.instance_ap50,
        },
        steps_of=steps_of,
    )


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    """The same over the number of points."""
    plot_bars(rows, path, steps_of="points in a frame, at most")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ugains`` to the methods of ``ood-seg ablate``."""
    parser = subparsers.add_parser("ugains", help="points on the score map prompt the segmenter")
    add_arguments(parser, tuple(ABLATIONS), "compact_ugains")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), metavar="N", help="points: numbers of points")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and writes the table; errors as in :func:`ros2_ood_seg.training.ablation.run_sweep`."""
    table = Table(markdown, plot_curves if args.what == "points" else plot_bars)
    return run_sweep(args, ABLATIONS[args.what](args), measure, table)
