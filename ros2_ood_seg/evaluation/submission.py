"""``ood-seg submission``: results in the files that the SegmentMeIfYouCan and OoDIS benchmarks take; no labels are needed.

SegmentMeIfYouCan (SegmentMeIfYouCan/road-anomaly-benchmark): ``anomaly_p/<method>/<split>/<image>.hdf5`` with one compressed float16
map ``value``. OoDIS (kumuji/anomaly-benchmark-suite): ``<set>/<image>_instanceIds_pred.txt`` with a line ``<png> 1 <score>`` per
instance, and its mask as ``<image>_instanceIds_<n>_1.png`` beside it.
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ros2_ood_seg.config import load_profile, parse_overrides
from ros2_ood_seg.errors import InputError, naming
from ros2_ood_seg.evaluation.datasets import check_external, files_ending, list_images, read_map
from ros2_ood_seg.evaluation.instance import ranking_key
from ros2_ood_seg.image_encodings import read_rgb
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.types import FrameResult

DATASETS = ("road_anomaly_21", "road_obstacle_21", "lost_and_found")
SMIYC_SPLITS = {"road_anomaly_21": "AnomalyTrack-all", "road_obstacle_21": "ObstacleTrack-all", "lost_and_found": "LostAndFound-{split}"}
OODIS_FOLDERS = {"road_anomaly_21": "roadanomaly", "road_obstacle_21": "roadobstacle", "lost_and_found": "fishyscapes"}
LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Target:
    """An image and the file that marks it as done.

    Args:
        image: Its file.
        name: Its stem, as the score maps of ``--external`` are named.
        file: What is written last for it.
    """

    image: Path
    name: str
    file: Path


def smiyc_targets(dataset: str, root: Path, output: Path, method: str) -> tuple[Target, ...]:
    """Every image of a benchmark's data set, validation images included, as its evaluation expects them.

    Raises:
        InputError: The folder holds no images of this data set.
    """
    return tuple(
        Target(image, name, output / "anomaly_p" / method / SMIYC_SPLITS[dataset].format(split=split) / f"{name}.hdf5")
        for split, name, image in _images(dataset, root)
    )


def oodis_targets(dataset: str, root: Path, output: Path) -> tuple[Target, ...]:
    """Every image that OoDIS asks for: the hidden test splits, and all of Lost and Found.

    Raises:
        InputError: The folder holds no such images.
    """
    middle = "_gtCoarse" if dataset == "lost_and_found" else ""
    targets = tuple(
        Target(image, name, output / OODIS_FOLDERS[dataset] / f"{name}{middle}_instanceIds_pred.txt")
        for _, name, image in _images(dataset, root)
        if not name.startswith("validation")
    )
    if not targets:
        raise InputError(f"'{root}' holds validation images only; OoDIS takes results on the test images")
    return targets


def _images(dataset: str, root: Path) -> list[tuple[str, str, Path]]:
    """Split, name and file of every image."""
    if dataset != "lost_and_found":
        return [("all", path.stem, path) for path in list_images(root / "images")]
    found = [
        (split, name, path)
        for split in ("train", "test")
        for name, path in files_ending(root / "leftImg8bit" / split, "_leftImg8bit.png").items()
    ]
    if not found:
        raise InputError(f"'{root}' holds no leftImg8bit/train or leftImg8bit/test with *_leftImg8bit.png")
    return found


def write_smiyc(file: Path, scores: NDArray[np.float32]) -> None:
    """Writes a score map as the benchmark reads it.

    Args:
        file: ``.hdf5`` to write.
        scores: (H, W) float32, higher = more anomalous.

    Raises:
        InputError: h5py is missing, or a score is beyond 16-bit floating point.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError("submissions to SegmentMeIfYouCan need h5py: pip install h5py") from error
    extreme = float(scores.flat[np.argmax(np.abs(scores))])
    if not abs(extreme) <= LARGEST_HALF:
        raise InputError(
            f"'{file.stem}' has a score of {extreme:g}, the benchmark's 16-bit maps hold numbers up to {LARGEST_HALF:.0f}; "
            "submit the calibrated map (--map calibrated)"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with h5py.File(temporary, "w") as archive:
        archive.create_dataset("value", data=scores.astype(np.float16), compression=9)
    temporary.rename(file)


def write_oodis(file: Path, masks: NDArray[np.bool_], scores: NDArray[np.floating[Any]]) -> None:
    """Writes the instances of an image as the benchmark reads them; none become one empty mask, because it asks for one at least.

    Args:
        file: ``..._instanceIds_pred.txt`` to write; the masks lie beside it.
        masks: (N, H, W) bool.
        scores: (N,) ranking key.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    stem = file.name.removesuffix("_pred.txt")
    for old in file.parent.glob(f"{glob.escape(stem)}_*_1.png"):
        old.unlink()
    if not len(masks):
        masks, scores = np.zeros((1, *masks.shape[1:]), bool), np.zeros(1, np.float32)
    lines = []
    for k, (mask, score) in enumerate(zip(masks, scores, strict=True)):
        name = f"{stem}_{k}_1.png"
        (file.parent / name).write_bytes(cv2.imencode(".png", mask.astype(np.uint8) * 255)[1].tobytes())
        lines.append(f"{name} 1 {float(score)!r}\n")
    file.write_text("".join(lines), encoding="utf-8")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("submission", help="write results for the SegmentMeIfYouCan or OoDIS benchmark")
    parser.add_argument("benchmark", choices=("smiyc", "oodis"))
    parser.add_argument("--dataset", choices=DATASETS, required=True, help="whose images these are")
    parser.add_argument("--root", type=Path, required=True, help="folder of the data set as published; labels are not needed")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the submission; one for all data sets")
    parser.add_argument("--profile", default="compact", help="name of a bundled profile or path of a YAML file")
    parser.add_argument("--method", help="smiyc: name of the method, a folder (default: the profile's name)")
    parser.add_argument("--map", choices=tuple(MAPS), help="smiyc: which map (default: refined)")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run of the same settings has written")
    parser.add_argument("--max-images", type=int, default=0, metavar="N", help="only the first N images")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the profile; may be repeated")
    parser.add_argument("--weights-dir", help="folder of further weights")
    parser.add_argument("--external", type=Path, metavar="DIR", help="score maps <stem>.npy for the scorer 'external'")
    parser.set_defaults(run=run_submission)


MAPS: dict[str, Callable[[FrameResult], Any]] = {
    "refined": lambda result: result.refined,
    "score": lambda result: result.score_map.scores,
    "calibrated": lambda result: result.score_map.calibrated(),
}


def run_submission(args: argparse.Namespace) -> int:
    """Runs a profile over the images and writes the files.

    Raises:
        InputError: Anything in the arguments or the data that cannot be used.
    """
    if args.max_images < 0:
        raise InputError(f"--max-images is {args.max_images}, it must be 1 or more, or 0 for all")
    for flag in ("method", "map"):
        if args.benchmark == "oodis" and getattr(args, flag) is not None:
            raise InputError(f"--{flag} is of smiyc, oodis takes instances: leave it out")
    overrides = {"tracking.enabled": False} | parse_overrides(args.set)
    if args.weights_dir:
        overrides["runtime.weights_dir"] = args.weights_dir
    config = load_profile(args.profile, overrides)
    check_external(args.external, config.scorer.name)
    if args.benchmark == "smiyc":
        targets = smiyc_targets(args.dataset, args.root, args.output, args.method or config.profile)
    else:
        targets = oodis_targets(args.dataset, args.root, args.output)
    targets = targets[: args.max_images or None]
    missing = _missing(targets, args.resume)
    pipeline = Pipeline.from_config(config)
    for target in tqdm(missing, total=len(targets), initial=len(targets) - len(missing), desc=f"{config.profile}", unit="image"):
        external = read_map(args.external / f"{target.name}.npy") if args.external else None
        image = read_rgb(target.image)
        with naming(f"'{target.image}'"):
            result = pipeline.run(image, external)
        if args.benchmark == "smiyc":
            write_smiyc(target.file, MAPS[args.map or "refined"](result).cpu().numpy())
        else:
            found = result.instances
            key = ranking_key(found.scores.cpu().numpy(), found.raw_scores.cpu().numpy())
            write_oodis(target.file, found.masks.cpu().numpy(), key)
    print(f"{len(targets)} images: {args.output}")
    return 0


def _missing(targets: Sequence[Target], resume: bool) -> list[Target]:
    missing = [target for target in targets if not target.file.is_file()]
    if len(missing) < len(targets) and not resume:
        there = next(target.file for target in targets if target.file.is_file())
        raise InputError(f"'{there}' exists: name another --output, or go on with an interrupted run by --resume")
    return missing
