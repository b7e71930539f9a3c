"""``ood-seg ablate s2m``: what each stage of S2M contributes, as a table and a plot (S2M Figs. 4 and 7, Tables 2 and 4)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ros2_ood_seg.config import RuntimeConfig, load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.cli import checked_output, parse_overrides
from ros2_ood_seg.evaluation.component import TRACKS
from ros2_ood_seg.evaluation.datasets import DataSet, LabelledImage, open_dataset
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options
from ros2_ood_seg.evaluation.instance import truth_instances
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.prompts import BOX_PROMPTS
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.segmenters import SEGMENTERS
from ros2_ood_seg.training.outlier_exposure import tight_boxes_xyxy
from ros2_ood_seg.training.prompt_generator import PromptTraining, train_prompt_generator
from ros2_ood_seg.training.score_maps import ScoreMaps
from ros2_ood_seg.types import Prompts, ScoreMap
from ros2_ood_seg.weights.store import load_weights

NOISE_LEVELS = (0.0, 0.01, 0.02, 0.03, 0.04)
"""S2M Table 2."""


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        label: Its name.
        overrides: Settings that differ from the profile.
        oracle: Boxes of the ground truth instead of generated prompts.
    """

    label: str
    overrides: dict[str, Any] = field(default_factory=dict)
    oracle: bool = False


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
    def from_report(cls, dataset: str, variant: str, report: dict[str, Any]) -> Row:
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
            report["timings_ms"]["total"]["p50"],
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


def evaluate_variant(
    variant: Variant, dataset: DataSet, profile: str, overrides: dict[str, Any], work: Path, reuse: Pipeline | None = None
) -> tuple[dict[str, Any], Pipeline]:
    """Runs one variant on one data set.

    Args:
        variant: What differs.
        dataset: Labelled frames.
        profile: Name or path of the profile that differs.
        overrides: Settings common to all variants.
        work: Folder for intermediate results, removed at the end.
        reuse: A pipeline whose loaded stages are taken over where possible.

    Returns:
        The evaluation report, and the pipeline.
    """
    pipeline = Pipeline(load_profile(profile, {"tracking.enabled": False, **overrides, **variant.overrides}), reuse)
    oracle = OracleBoxes() if variant.oracle else None
    if oracle is not None:
        pipeline.box_prompts = oracle
    evaluation = Evaluation(pipeline, work, Options(minimum=TRACKS[dataset.track]), {"variant": variant.label, "root": str(dataset.root)})
    for source in tqdm(dataset.sources, desc=f"{variant.label} on {dataset.root.name}", unit="image"):
        frame = dataset.load(source)
        if oracle is not None:
            oracle.tell(frame)
        evaluation.add(frame)
    report, _ = evaluation.report(dataset.name, dataset.instance_rule)
    evaluation.finish()
    return report, pipeline


def noise_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Trains one prompt generator for each noise level on the same maps, as ``--init`` was."""
    if args.maps is None or args.init is None:
        raise InputError("--what noise trains: name --maps (score maps) and --init (prompt generator whose recipe is taken)")
    stored = load_weights(args.init).metadata.get("recipe")
    if not isinstance(stored, dict):
        raise InputError(f"weights file '{args.init}' does not hold the recipe it was trained with")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    recipe = PromptTraining(**values)
    runtime = Runtime.from_config(RuntimeConfig(device=args.device))
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
    yield Variant("ground-truth boxes", oracle=True)


def scorer_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Other scorers, or other scores of the same network, under the same prompt generator (S2M Table 4)."""
    for item in args.scorers:
        name, _, score = item.partition(":")
        yield Variant(item, {"scorer.name": name, "scorer.score": score or "default"})


def segmenter_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Other segmenters; ``sam:vit_l`` names a size (S2M Fig. 7)."""
    for item in args.segmenters:
        name, _, model = item.partition(":")
        if name not in SEGMENTERS.names:
            raise InputError(f"unknown segmenter '{name}': use one of {', '.join(SEGMENTERS.names)}, or sam:vit_b, sam:vit_l, sam:vit_h")
        yield Variant(item, {"segmenter.name": name, **({"segmenter.model": model} if model else {})})


def scale_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """A second look at enlarged tiles, for small and far objects."""
    for tiles in (1, 2, 3):
        yield Variant("whole map" if tiles == 1 else f"and {tiles}x{tiles} tiles", {"prompts.boxes.tiles": tiles})


def confidence_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """The least confidence of a box; S2M keeps all from 0.05."""
    for level in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        yield Variant(f"confidence from {level:g}", {"prompts.boxes.min_confidence": level})


ABLATIONS: dict[str, Callable[[argparse.Namespace], Iterator[Variant]]] = {
    "noise": noise_variants,
    "prompts": prompt_variants,
    "scorers": scorer_variants,
    "segmenters": segmenter_variants,
    "oracle": oracle_variants,
    "scale": scale_variants,
    "confidence": confidence_variants,
}


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, figures in percent."""
    sizes = sorted({size for row in rows for size in row.box_recall}, key=float)
    names = ["data set", "variant", "IoU", "AuIoU", "mean F1", "scorer IoU", "scorer mean F1", *(f"boxes from {s} px" for s in sizes), "ms"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        figures = [row.iou, row.auiou, row.mean_f1, row.baseline_iou, row.baseline_mean_f1, *(row.box_recall.get(s) for s in sizes)]
        shown = ["" if value is None else f"{100 * value:.1f}" for value in figures]
        lines.append("| " + " | ".join([row.dataset, row.variant, *shown, f"{row.total_ms:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Threshold-free IoU of every variant, one panel for each data set, the scorer's best threshold as a line."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(row.dataset for row in rows))
    figure = Figure(figsize=(4.2 * len(datasets), 3.6), layout="constrained")
    for axis, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        chosen = [row for row in rows if row.dataset == dataset]
        axis.bar([row.variant for row in chosen], [100 * (row.iou or 0.0) for row in chosen], color="tab:blue", label="S2M, no threshold")
        axis.axhline(100 * (chosen[0].baseline_iou or 0.0), color="tab:red", label="scorer at its best threshold")
        axis.set_title(dataset)
        axis.set_ylabel("IoU (%)")
        axis.tick_params(axis="x", rotation=30)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ablate``."""
    parser = subparsers.add_parser("ablate", help="measure what each stage of a method contributes")
    parser.add_argument("method", choices=("s2m",), help="the method")
    parser.add_argument("--what", choices=tuple(ABLATIONS), required=True, help="what is varied")
    parser.add_argument("--root", nargs="+", required=True, help="folders of data sets")
    parser.add_argument("--dataset", default="folder", help="their layout, as in 'ood-seg evaluate' (%(default)s)")
    parser.add_argument("--profile", default="compact_s2m", help="profile that is varied (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the profile; may be repeated")
    parser.add_argument("--max-images", type=int, default=0, metavar="N", help="only the first N images of each set")
    parser.add_argument("--output", type=Path, required=True, help="table.json to write; .md and .png appear beside it")
    parser.add_argument(
        "--methods", nargs="+", choices=BOX_PROMPTS.names, default=["compact_rcnn", "components"], help="prompts: which boxes"
    )
    parser.add_argument("--scorers", nargs="+", default=["compact", "compact:msp", "compact:entropy"], help="scorers: NAME or NAME:SCORE")
    parser.add_argument("--segmenters", nargs="+", default=["grabcut", "compact"], help="segmenters: NAME or sam:SIZE")
    parser.add_argument("--maps", type=Path, help="noise: score maps of 'ood-seg train prompt-generator'")
    parser.add_argument("--init", type=Path, help="noise: prompt generator whose recipe is trained again")
    parser.add_argument("--iterations", type=int, default=0, help="noise: iterations of each training, 0 for the recipe's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures all variants on all data sets and writes the table after each, so that an interrupted run leaves what it has.

    Raises:
        InputError: Anything in the arguments or the data that cannot be used.
    """
    datasets = [open_dataset(args.dataset, root) for root in args.root]
    datasets = [dataset.head(args.max_images) if args.max_images else dataset for dataset in datasets]
    overrides = {"runtime.device": args.device, **parse_overrides(args.set)}
    output = checked_output(args.output)
    order = [dataset.root.name for dataset in datasets]
    rows: list[Row] = []
    pipeline: Pipeline | None = None
    for variant in ABLATIONS[args.what](args):
        for dataset in datasets:
            work = output.with_suffix(".parts")
            report, pipeline = evaluate_variant(variant, dataset, args.profile, overrides, work, pipeline)
            if variant.oracle:
                pipeline = None
            rows.append(Row.from_report(dataset.root.name, variant.label, report))
            rows.sort(key=lambda row: order.index(row.dataset))
            text = json.dumps({"what": args.what, "profile": args.profile, "rows": [asdict(row) for row in rows]}, indent=1)
            output.write_text(text + "\n", encoding="utf-8")
            output.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
            plot(rows, output.with_suffix(".png"))
    print(markdown(rows))
    return 0
