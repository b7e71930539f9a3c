"""``ood-seg ablate s2m``: what each stage of S2M contributes, as a table and a plot (S2M Figs. 4 and 7, Tables 2 and 4)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.datasets import DataSet, LabelledImage
from ros2_ood_seg.evaluation.instance import truth_instances
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.prompts import BOX_PROMPTS
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.segmenters import SEGMENTERS
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
from ros2_ood_seg.training.outlier_exposure import tight_boxes_xyxy
from ros2_ood_seg.training.prompt_generator import PromptTraining, train_prompt_generator
from ros2_ood_seg.training.score_maps import ScoreMaps
from ros2_ood_seg.types import Prompts, ScoreMap
from ros2_ood_seg.weights.store import load_weights

NOISE_LEVELS = (0.0, 0.01, 0.02, 0.03, 0.04)
"""S2M Table 2."""


@dataclass(frozen=True)
class Row:
    """What a variant reached on a data set; fractions, None where there is no such value.

    Args:
        dataset: Name of the data set's folder.
        variant: Label of the variant.
        iou: Union of all masks, no threshold.
        auiou: See S2M section 4.1.
        mean_f1: See S2M section 4.1.
        baseline_iou: The scorer's own map at its best threshold on this very set.
        baseline_mean_f1: The scorer's own map.
        box_recall: Objects with a box of IoU above 0.5, by size; keys are the least area in px.
        total_ms: Median time of a frame.
    """

    dataset: str
    variant: str
    iou: float | None
    auiou: float | None
    mean_f1: float | None
    baseline_iou: float | None
    baseline_mean_f1: float | None
    box_recall: dict[str, float | None]
    total_ms: float

    @classmethod
    def from_report(cls, dataset: str, variant: str, report: dict[str, Any], total_ms: float) -> Row:
        """Picks the figures out of an evaluation report."""
        masks, baseline = report["s2m"], report["baseline"]
        recall = {str(size["from"]): size["box_recall"] for size in report["sizes"] if size["truth"]}
        return cls(
            dataset,
            variant,
            masks["iou"],
            masks["auiou"],
            masks["mean_f1"],
            baseline["iou_best"],
            baseline["mean_f1"],
            recall,
            total_ms,
        )


class OracleBoxes:
    """A prompt generator that knows the answer: the tight boxes of the frame it was told about."""

    def __init__(self) -> None:
        self._boxes_xyxy = torch.zeros((0, 4))

    def tell(self, frame: LabelledImage) -> None:
        """Sets the ground truth of the next frame."""
        truth = truth_instances(frame.label, frame.instances)
        self._boxes_xyxy = torch.from_numpy(tight_boxes_xyxy(np.maximum(truth, 0)))

    def __call__(self, score_map: ScoreMap, ignore: Tensor | None = None) -> Prompts:
        """See :class:`ros2_ood_seg.prompts.base.PromptGenerator`."""
        boxes = self._boxes_xyxy.to(score_map.device)
        return Prompts.from_boxes(boxes, torch.ones(len(boxes), device=score_map.device))

    @classmethod
    def replace_in(cls, pipeline: Pipeline) -> Tell:
        """Takes the place of the pipeline's box prompt generator."""
        oracle = cls()
        pipeline.box_prompts = oracle
        return oracle.tell


def noise_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Trains one prompt generator for each noise level on the same maps, as ``--init`` was."""
    if args.maps is None or args.init is None:
        raise InputError("--what noise trains: name --maps (score maps) and --init (prompt generator whose recipe is taken)")
    stored = load_weights(args.init).metadata.get("recipe")
    if not isinstance(stored, dict):
        raise InputError(f"weights file '{args.init}' does not hold the recipe it was trained with")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    recipe = PromptTraining(**values)
    runtime = Runtime.from_arguments(device=args.device)
    maps = ScoreMaps.read(args.maps)
    if args.iterations:
        scale = args.iterations / recipe.iterations
        recipe = replace(recipe, iterations=args.iterations, steps=tuple(round(step * scale) for step in recipe.steps))
    for level in NOISE_LEVELS:
        folder = args.output.parent / f"noise_{level:g}"
        weights = train_prompt_generator(maps, replace(recipe, noise=level), folder, device=runtime.device)
        yield Variant(f"noise {level:.0%}", {"prompts.boxes.weights": str(weights)})


def prompt_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Every registered box prompt generator that has weights here, points, and boxes with points."""
    points = {"prompts.points.method": "fps"}
    for method in args.methods:
        yield Variant(f"boxes: {method}", {"prompts.boxes.method": method, "prompts.points.method": "none"})
    yield Variant("points: fps", {"prompts.boxes.method": "none", **points})
    yield Variant(f"boxes and points: {args.methods[0]}", {"prompts.boxes.method": args.methods[0], **points})


def oracle_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Generated boxes beside the ground truth's: how much the prompts lose, and how much the segmenter."""
    yield Variant("generated boxes")
    # The scorer has no say in whether these are true.
    yield Variant("ground-truth boxes", {"fusion.min_score": 0.0}, alter=OracleBoxes.replace_in)


def segmenter_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Other segmenters; ``sam:vit_l`` names a size (S2M Fig. 7)."""
    for item in args.segmenters:
        name, _, model = item.partition(":")
        if name not in SEGMENTERS.names:
            raise InputError(f"unknown segmenter '{name}': use one of {', '.join(SEGMENTERS.names)}, or sam:vit_b, sam:vit_l, sam:vit_h")
        yield Variant(item, {"segmenter.name": name, **({"segmenter.model": model} if model else {})})


def scale_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """A second look, at the end of the road or at enlarged tiles, for small and far objects."""
    yield Variant("whole map", {"prompts.boxes.zoom": 0.0})
    yield Variant("and the end of the road", {})
    for tiles in (2, 3):
        yield Variant(f"and {tiles}x{tiles} tiles", {"prompts.boxes.zoom": 0.0, "prompts.boxes.tiles": tiles})


def confidence_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """The least confidence of a box; S2M keeps all from 0.05."""
    for level in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        yield Variant(f"confidence from {level:g}", {"prompts.boxes.min_confidence": level})


def mask_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Which masks stay: those of sure boxes, all, or those whose score inside, box and outline speak for them together."""
    sure = {"fusion.box_weight": 1.0, "fusion.quality_power": 0.0, "fusion.min_score": 0.0}
    yield Variant("confidence from 0.05, as published", {**sure, "prompts.boxes.min_confidence": 0.05})
    yield Variant("confidence from 0.25", {**sure, "prompts.boxes.min_confidence": 0.25})
    yield Variant("this profile's boxes, all masks", {"fusion.min_score": 0.0})
    yield Variant("and this profile's least score")


ABLATIONS: dict[str, Callable[[argparse.Namespace], Iterator[Variant]]] = {
    "noise": noise_variants,
    "prompts": prompt_variants,
    "scorers": scorer_variants,
    "segmenters": segmenter_variants,
    "oracle": oracle_variants,
    "scale": scale_variants,
    "confidence": confidence_variants,
    "masks": mask_variants,
}


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, figures in percent."""
    sizes = sorted({size for row in rows for size in row.box_recall}, key=float)
    head = ["data set", "variant", "IoU", "AuIoU", "mean F1", "scorer IoU", "scorer mean F1", *(f"boxes from {s} px" for s in sizes), "ms"]

    def cells(row: Row) -> list[str]:
        figures = [row.iou, row.auiou, row.mean_f1, row.baseline_iou, row.baseline_mean_f1, *(row.box_recall.get(s) for s in sizes)]
        return [row.dataset, row.variant, *map(percent, figures), f"{row.total_ms:.0f}"]

    return markdown_table(head, map(cells, rows))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Threshold-free IoU of every variant, and its scorer's best threshold as a line across."""
    scorer = ("scorer at its best threshold", lambda row: row.baseline_iou)
    plot_rows(rows, path, "IoU (%)", {"S2M, no threshold": lambda row: row.iou}, scorer)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``s2m`` to the methods of ``ood-seg ablate``."""
    parser = subparsers.add_parser("s2m", help="boxes on the score map prompt the segmenter")
    add_arguments(parser, tuple(ABLATIONS), "compact_s2m")
    parser.add_argument(
        "--methods", nargs="+", choices=BOX_PROMPTS.names, default=["compact_rcnn", "components"], help="prompts: which boxes"
    )
    parser.add_argument("--segmenters", nargs="+", default=["grabcut", "compact"], help="segmenters: NAME or sam:SIZE")
    parser.add_argument("--maps", type=Path, help="noise: score maps of 'ood-seg train prompt-generator'")
    parser.add_argument("--init", type=Path, help="noise: prompt generator whose recipe is trained again")
    parser.add_argument("--iterations", type=int, default=0, help="noise: iterations of each training, 0 for the recipe's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and writes the table; errors as in :func:`ros2_ood_seg.training.ablation.run_sweep`."""

    def measure(sweep: Sweep, variant: Variant, dataset: DataSet) -> Row:
        measured = sweep.measure(variant, dataset)
        return Row.from_report(dataset.root.name, variant.label, measured.report, measured.total_ms)

    return run_sweep(args, ABLATIONS[args.what](args), measure, Table(markdown, plot))
