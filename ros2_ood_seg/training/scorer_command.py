"""``ood-seg train scorer``: reads the data, trains by one of the methods, calibrates, and writes weights that the pipeline can use."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ros2_ood_seg.config import ScorerConfig, build_config
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import read_rgb, write_rgb
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.base import CalibratedScorer
from ros2_ood_seg.scorers.calibration import write_calibration
from ros2_ood_seg.scorers.compact import from_weights
from ros2_ood_seg.scorers.networks.compact import ENCODERS, STRIDE, CompactNet
from ros2_ood_seg.training.averaging import add_averaging, average_weights, check_averaging
from ros2_ood_seg.training.calibrate import calibrate, calibrate_compact
from ros2_ood_seg.training.outlier_exposure import OutlierExposure, PasteSettings, contact_sheet
from ros2_ood_seg.training.published import METHODS, PublishedTraining, train_published
from ros2_ood_seg.training.scorer import ScorerData, ScorerTraining, train_scorer
from ros2_ood_seg.training.setting_flags import add_paste_settings, changed_paste, descriptions
from ros2_ood_seg.types import Calibration
from ros2_ood_seg.weights.store import load_weights, save_weights

COMPACT = "compact"
"""The method of the bundled scorer."""

_OF_COMPACT = ("encoder", "frozen_blocks")
_OF_PUBLISHED = ("outlier_share",)
_COMMON = ("iterations", "batch_size", "learning_rate", "seed", "workers", "checkpoint_minutes")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``scorer`` to the commands of ``ood-seg train``."""
    parser = subparsers.add_parser(
        "scorer",
        help="train a scorer by outlier exposure",
        description="Trains a scorer on road images with pasted objects; run it again to go on from the last checkpoint.",
    )
    parser.add_argument(
        "--method",
        choices=(COMPACT, *METHODS),
        default=COMPACT,
        help="the bundled scorer's recipe, a published one, or the segmentation network that those start from (%(default)s)",
    )
    parser.add_argument("--camvid", type=Path, metavar="DIR", help="road images in the CamVid layout")
    parser.add_argument("--idd-lite", type=Path, metavar="DIR", help="road images in the IDD-Lite layout")
    parser.add_argument("--cityscapes", type=Path, metavar="DIR", help="road images in the Cityscapes layout")
    parser.add_argument(
        "--roads", type=Path, nargs="+", default=[], metavar="DIR", help="road images without labels, nothing anomalous in them"
    )
    parser.add_argument("--coco", type=Path, metavar="DIR", help="objects: images/ and instances.json")
    parser.add_argument("--coco-panoptic", type=Path, metavar="DIR", help="objects: images/, panoptic/ and panoptic.json")
    parser.add_argument("--objects", type=Path, nargs="+", default=[], metavar="DIR", help="objects: images/ and masks/")
    parser.add_argument(
        "--scenes",
        action="store_true",
        help="compact: one more source of frames, the pictures of COCO that were taken outside, as they are",
    )
    parser.add_argument("--init", type=Path, help="weights to start from: mobilenet_v2 features, an earlier scorer, a segmentation network")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for checkpoints, log, curve and weights")
    parser.add_argument("--preview", action="store_true", help="only write preview.png with training samples")
    parser.add_argument("--published-pasting", action="store_true", help="all objects of a picture pasted as one, 700x700 crops, as S2M")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="size of the training crops; multiples of 32 for compact")
    add_paste_settings(parser, PasteSettings(), "%s", but=("crop_hw",))
    compact, common, known = ScorerTraining(), "(default: the method's, see docs/training.md)", descriptions(ScorerTraining)
    for name in _COMMON:
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(getattr(compact, name)), help=f"{known[name]} {common}")
    parser.add_argument("--encoder", choices=ENCODERS, help=f"compact: features to build on (default: {compact.encoder})")
    parser.add_argument(
        "--frozen-blocks", type=int, help=f"compact: feature blocks that stay as they are (default: {compact.frozen_blocks})"
    )
    add_averaging(parser, "scorer", "compact: ")
    parser.add_argument("--outlier-share", type=float, help=f"all but compact: share of samples with pasted outliers {common}")
    parser.add_argument("--bfloat16", action="store_true", help="autocast the forward pass; slower on CPUs without AMX")
    parser.add_argument(
        "--calibration-frames", type=int, default=200, metavar="N", help="held-out frames per set for the calibration (%(default)s)"
    )
    parser.add_argument(
        "--input-width",
        type=int,
        default=ScorerConfig().input_width,
        help="all but compact: width of the calibration's frames, px, as scorer.input_width where the scorer will be used (%(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 leaves torch's choice")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains, or writes the preview.

    Raises:
        InputError: Anything in the arguments or the data that cannot be used.
    """
    data = ScorerData(
        args.camvid,
        args.idd_lite,
        args.cityscapes,
        tuple(args.roads),
        args.coco,
        args.coco_panoptic,
        tuple(args.objects),
        whole_pictures=args.published_pasting,
        scenes=args.scenes,
    )
    recipe = _recipe(args)
    _check_averaging(args)
    if args.scenes and args.method != COMPACT:
        raise InputError(f"--scenes is no setting of method '{args.method}': leave it out")
    if args.scenes and not (args.coco or args.coco_panoptic):
        raise InputError("--scenes needs --coco or --coco-panoptic, whose pictures they are")
    if args.method != COMPACT:
        check_input_width(args.input_width)
    if args.calibration_frames < 1:
        raise InputError(f"--calibration-frames is {args.calibration_frames}, allowed: 1 or more")
    if args.preview:
        args.output.mkdir(parents=True, exist_ok=True)
        sources, cutouts = data.read_training()
        sheet = contact_sheet(OutlierExposure(sources, cutouts, recipe.paste, recipe.seed, 24)[k] for k in range(24))
        write_rgb(args.output / "preview.png", sheet)
        print(args.output / "preview.png")
        return 0
    runtime = Runtime.from_arguments(device=args.device, precision="float32", threads=args.threads)
    if isinstance(recipe, PublishedTraining):
        released = train_published(data, recipe, args.output, args.init, runtime.device)
        calibrate_published(released, data, args.calibration_frames, runtime, args.input_width)
    else:
        trained = train_scorer(data, recipe, args.output, args.init, runtime.device)
        provenance = {"start": args.init.name if args.init else "random"}
        if args.keep_start or args.average_with:
            network = CompactNet.of(load_weights(trained))
            family = f"compact scorer on {network.encoder}"
            start = load_weights(args.init)
            trained = average_weights(trained, start, args.keep_start, network, family, half=False, others=args.average_with)
        released = args.output / "compact_scorer.safetensors"
        release(trained, data, released, provenance, args.calibration_frames)
    print(released)
    return 0


def _check_averaging(args: argparse.Namespace) -> None:
    for flag, is_used in (("--keep-start", bool(args.keep_start)), ("--average-with", bool(args.average_with))):
        if is_used and args.method != COMPACT:
            raise InputError(f"{flag} is no setting of method '{args.method}': leave it out")
    start = load_weights(args.init) if (args.keep_start or args.average_with) and args.init else None
    is_scorer = start is not None and any(key.startswith("outlier_head.") for key in start.state)
    network = CompactNet.of(start) if start is not None and is_scorer else None
    check_averaging(args.keep_start, args.average_with, "scorer", start, network)


def _recipe(args: argparse.Namespace) -> ScorerTraining | PublishedTraining:
    """The method's recipe with what the arguments change."""
    foreign = _OF_PUBLISHED if args.method == COMPACT else _OF_COMPACT
    for name in foreign:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is no setting of method '{args.method}': leave it out")
    recipe = ScorerTraining() if args.method == COMPACT else METHODS[args.method].recipe
    paste = PasteSettings.published() if args.published_pasting else recipe.paste
    if args.crop:
        step = STRIDE if args.method == COMPACT else 1
        if any(side < STRIDE or side % step for side in args.crop):
            allowed = f"positive multiples of {STRIDE}" if step > 1 else f"{STRIDE} or more"
            raise InputError(f"--crop is {args.crop[0]} {args.crop[1]}, allowed: {allowed}")
        paste = replace(paste, crop_hw=tuple(args.crop))
    paste = changed_paste(args, paste)
    given = {name: getattr(args, name) for name in (*_COMMON, *_OF_COMPACT, *_OF_PUBLISHED) if getattr(args, name) is not None}
    return replace(recipe, **given, bfloat16=args.bfloat16, paste=paste)


def calibrate_published(
    weights: Path, data: ScorerData, max_frames_per_source: int, runtime: Runtime, input_width: int = ScorerConfig().input_width
) -> None:
    """Calibrates a published scorer with new weights on held-out in-distribution frames; the calibration lies beside the weights.

    Args:
        weights: What :func:`train_published` wrote, named after the scorer.
        data: What it was trained from; the held-out side is used.
        max_frames_per_source: Frames per set of road images, evenly spread.
        runtime: Where to run.
        input_width: Width the frames are resized to, px.

    Raises:
        InputError: A width that the settings do not allow.
    """
    check_input_width(input_width)
    config = ScorerConfig(name=weights.stem, weights=str(weights), input_width=input_width)
    scorer: CalibratedScorer = SCORERS.get(weights.stem)(config, runtime)
    with torch.inference_mode():
        calibration = calibrate(scorer, _held_out_frames(data, max_frames_per_source), runtime.device)
    write_calibration(scorer.weights_path, scorer.calibration_key, calibration)


def check_input_width(input_width: int) -> None:
    """Looks at ``--input-width``, which is needed only after the training.

    Raises:
        InputError: A width that the settings do not allow.
    """
    build_config({"scorer": {"input_width": input_width}}, "--input-width")


def release(trained: Path, data: ScorerData, path: Path, provenance: Mapping[str, str], max_frames_per_source: int = 200) -> None:
    """Calibrates on held-out in-distribution frames and writes half-precision weights with all that belongs to them.

    Args:
        trained: Averaged weights of the training.
        data: What it was trained from; the held-out side is used.
        path: ``*.safetensors`` to write.
        provenance: Further entries of the metadata.
        max_frames_per_source: Frames per set of road images, evenly spread.

    Raises:
        InputError: There are no held-out frames.
    """
    weights = load_weights(trained)
    scorer = from_weights(weights, ScorerConfig(score="outlier"), Runtime(torch.device("cpu")), Calibration.linear())
    with torch.inference_mode():
        frames = tqdm(_held_out_frames(data, max_frames_per_source), desc="calibrate", mininterval=5.0)
        calibrations = calibrate_compact(scorer, (read_rgb(path) for path in frames))
    metadata = {
        **weights.metadata,
        **provenance,
        "default_score": "outlier",
        "calibrations": {score: calibration.to_dict() for score, calibration in calibrations.items()},
    }
    save_weights(path, weights.state, metadata, half=True)


def _held_out_frames(data: ScorerData, max_frames_per_source: int) -> list[Path]:
    roads, _ = data.read(held_out=True)
    chosen = []
    for source in roads:
        picked = np.unique(np.linspace(0, len(source) - 1, min(len(source), max_frames_per_source)).astype(int))
        chosen += [source[k].image for k in picked]
    return chosen
