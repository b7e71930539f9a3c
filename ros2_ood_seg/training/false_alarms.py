"""What a profile reports on frames in which nothing is anomalous, and how well it knows their classes (``ood-seg false-alarms``)."""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ros2_ood_seg.config import load_profile, parse_overrides
from ros2_ood_seg.errors import InputError, naming
from ros2_ood_seg.evaluation.cli import checked_output
from ros2_ood_seg.image_encodings import write_rgb
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES
from ros2_ood_seg.training.road_images import (
    IGNORE,
    RoadImage,
    evenly_spread,
    is_held_out,
    read_camvid,
    read_cityscapes,
    read_idd_lite,
    read_road_folder,
)
from ros2_ood_seg.training.setting_flags import distinct_name
from ros2_ood_seg.types import FrameResult
from ros2_ood_seg.visualization import draw_overlay, side_by_side

SCORES = (0.25, 0.5, 0.75)
"""Instances above each of these are counted."""
_TRAINING_HOLDS_OUT = 0.25
_WORST = 12


@dataclass(frozen=True)
class Frames:
    """One set of in-distribution frames.

    Args:
        name: For the report.
        images: The frames.
    """

    name: str
    images: Sequence[RoadImage]


class ClassAccuracy:
    """Confusion of the common classes, pooled over frames."""

    def __init__(self) -> None:
        self._confusion = np.zeros((len(CLASS_NAMES), len(CLASS_NAMES)), dtype=np.int64)

    def add(self, predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Counts the labelled pixels of a frame.

        Args:
            predicted: (H, W) common classes.
            truth: (H, W) common classes, :data:`IGNORE` where unknown.
        """
        known = truth != IGNORE
        pairs = truth[known].astype(np.int64) * len(CLASS_NAMES) + predicted[known]
        self._confusion += np.bincount(pairs, minlength=self._confusion.size).reshape(self._confusion.shape)

    def iou(self) -> dict[str, float]:
        """IoU of each class that occurs."""
        hit = self._confusion.diagonal()
        union = self._confusion.sum(0) + self._confusion.sum(1) - hit
        return {name: float(hit[k] / union[k]) for k, name in enumerate(CLASS_NAMES) if union[k]}


class Worst:
    """Keeps the frames with the highest scores, for the picture."""

    def __init__(self, count: int = _WORST) -> None:
        self._count = count
        self._heap: list[tuple[float, int, NDArray[np.uint8]]] = []
        self._seen = 0

    def add(self, score: float, image: NDArray[np.uint8], result: FrameResult) -> None:
        """Offers a frame."""
        self._seen += 1
        if len(self._heap) < self._count or score > self._heap[0][0]:
            # The running number keeps equal scores from comparing pictures.
            item = (score, -self._seen, draw_overlay(image, result.instances.to("cpu")))
            (heapq.heappush if len(self._heap) < self._count else heapq.heapreplace)(self._heap, item)

    def picture(self) -> NDArray[np.uint8] | None:
        """The frames side by side, worst first; None when there are none."""
        ranked = sorted(self._heap, key=lambda item: -item[0])
        if not ranked:
            return None
        return side_by_side([panel for _, _, panel in ranked], [f"{score:.2f}" for score, _, _ in ranked], columns=4, panel_width=480)


def measure(pipeline: Pipeline, frames: Frames, worst: Worst) -> dict[str, Any]:
    """Runs every frame and counts.

    Args:
        pipeline: Without tracking: the frames are no sequence.
        frames: What to look at.
        worst: Takes the frames with the highest scores.

    Returns:
        Frames, instances per 20 frames above each of :data:`SCORES`, the score that one instance in 20 frames exceeds, the share of frames
        with any above 0.5, the share of pixels whose calibrated score is above 0.5, the median time in ms, and class IoUs where there
        are labels.

    Raises:
        InputError: A frame that cannot be read or used.
    """
    found: list[float] = []
    alarmed, pixels, high = 0, 0, 0
    times: list[float] = []
    accuracy = ClassAccuracy()
    for road in tqdm(frames.images, desc=frames.name, unit="frame", mininterval=2.0):
        image, truth = road.read()
        with naming(f"'{road.image}'"):
            result = pipeline.run(image)
        scores = result.instances.scores.cpu().numpy()
        found += scores.tolist()
        alarmed += bool((scores > 0.5).any())
        high += int((result.score_map.calibrated() > 0.5).sum())
        pixels += truth.size
        times.append(result.timings_ms["total"])
        worst.add(float(scores.max(initial=0.0)), image, result)
        if road.label is not None and result.score_map.class_names == tuple(CLASS_NAMES):
            assert result.score_map.semantic is not None
            accuracy.add(result.score_map.semantic.cpu().numpy(), truth)
    iou = accuracy.iou()
    per_20 = 20 / len(frames.images)
    return {
        "frames": len(frames.images),
        "instances_per_20_frames": {f"above {limit}": per_20 * sum(score > limit for score in found) for limit in SCORES},
        "score_of_one_in_20_frames": score_of_one_in(found, len(frames.images) // 20),
        "frames_with_instance_above_0.5": alarmed / len(frames.images),
        "pixels_above_0.5": high / pixels,
        "total_ms_p50": float(np.median(times)),
        "miou": float(np.mean(list(iou.values()))) if iou else None,
        "iou": iou,
    }


def score_of_one_in(scores: Sequence[float], allowed: int) -> float:
    """The least score that no more than ``allowed`` of ``scores`` exceed; 0 when there are no more than that."""
    return sorted(scores, reverse=True)[allowed] if allowed < len(scores) else 0.0


def half_score_for(score: float, half_score: float) -> float:
    """The ``fusion.half_score`` with which what is reported as ``score`` now, under ``half_score``, becomes 0.5; within [0.01, 0.99]."""
    before = 2 * score * half_score if score < 0.5 else 1 - 2 * (1 - score) * (1 - half_score)
    return min(max(before, 0.01), 0.99)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "false-alarms",
        help="measure a profile on frames without anomalies",
        description="Counts what a profile reports on frames in which nothing is anomalous; where there are labels, measures its classes.",
    )
    parser.add_argument("--profile", default="compact", help="(default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the profile, as in ood-seg segment")
    parser.add_argument("--camvid", type=Path, metavar="DIR", help="CamVid layout: its test frames")
    parser.add_argument("--idd-lite", type=Path, metavar="DIR", help="IDD layout: its validation frames")
    parser.add_argument("--cityscapes", type=Path, metavar="DIR", help="Cityscapes layout: its validation frames")
    parser.add_argument("--roads", type=Path, nargs="+", default=[], metavar="DIR", help="folders of pictures")
    parser.add_argument("--held-out", action="store_true", help="of --roads only the quarter that ood-seg train scorer does not train on")
    parser.add_argument("--max-images", type=int, default=0, metavar="N", help="at most N frames of each set, evenly spread (default: all)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.json", help="report; the worst frames are drawn beside it (.png)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and writes the report.

    Raises:
        InputError: No set or an unusable one, a profile that cannot run, or an output that cannot be written.
    """
    output = checked_output(args.output)
    sets = [_limited(frames, args.max_images) for frames in _read(args)]
    config = load_profile(args.profile, {**parse_overrides(args.set), "tracking.enabled": False})
    pipeline = Pipeline(config)
    worst = Worst()
    with torch.inference_mode():
        report = {frames.name: measure(pipeline, frames, worst) for frames in sets}
    print(f"{'':24}{'frames':>8}" + "".join(f"{f'> {limit}':>8}" for limit in SCORES) + "   (instances per 20 frames)    mIoU")
    for name, row in report.items():
        counts = "".join(f"{count:8.1f}" for count in row["instances_per_20_frames"].values())
        print(f"{name:24}{row['frames']:8}{counts}" + (f"{row['miou']:36.3f}" if row["miou"] is not None else ""))
    highest = max(row["score_of_one_in_20_frames"] for row in report.values())
    half_score = half_score_for(highest, config.fusion.half_score) if highest > 0.0 else None
    if half_score is None:
        print(
            "fewer than one instance in 20 frames, which says nothing about fusion.half_score: lower fusion.min_score or take more frames"
        )
    else:
        print(f"one instance in 20 frames scores above {highest:.3f}; with fusion.half_score={half_score:.3f} that would be 0.5")
    try:
        output.write_text(
            json.dumps({"profile": config.profile, "half_score": half_score, "sets": report}, indent=2) + "\n", encoding="utf-8"
        )
        picture = worst.picture()
        if picture is not None:
            write_rgb(output.with_suffix(".png"), picture)
    except OSError as error:
        raise InputError(f"output '{output}' cannot be written: {error.strerror}") from error
    return 0


def _read(args: argparse.Namespace) -> list[Frames]:
    """The sets of the command line, checked."""
    sets = []
    if args.camvid:
        sets.append(Frames("camvid test", read_camvid(args.camvid, "test")))
    if args.idd_lite:
        sets.append(Frames("idd val", read_idd_lite(args.idd_lite, "val")))
    if args.cityscapes:
        sets.append(Frames("cityscapes val", read_cityscapes(args.cityscapes, "val")))
    for folder in args.roads:
        images = [road for road in read_road_folder(folder) if not args.held_out or is_held_out(road.image.stem, _TRAINING_HOLDS_OUT)]
        if not images:
            raise InputError(f"--held-out leaves no picture of '{folder}': a quarter is held out, chosen by name")
        sets.append(Frames(distinct_name(folder, {frames.name for frames in sets}, "--roads"), images))
    if not sets:
        raise InputError("false-alarms needs at least one of --camvid, --idd-lite, --cityscapes and --roads")
    return sets


def _limited(frames: Frames, most: int) -> Frames:
    if most < 0:
        raise InputError(f"--max-images is {most}, it must be 0 (all) or more")
    return Frames(frames.name, evenly_spread(frames.images, most) if most else frames.images)
