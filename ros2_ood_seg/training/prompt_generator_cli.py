"""``ood-seg train prompt-generator``: pastes, scores, and trains, each going on where it was interrupted."""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ros2_ood_seg.config import RuntimeConfig, ScorerConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.training.outlier_exposure import OutlierExposure, PasteSettings, RoadSample
from ros2_ood_seg.training.prompt_generator import PRESETS, PromptTraining, contact_sheet, train_prompt_generator
from ros2_ood_seg.training.score_maps import ScoreMaps, is_complete, write_score_maps
from ros2_ood_seg.training.scorer import ScorerData
from ros2_ood_seg.weights.store import find_weights


@dataclass(frozen=True)
class MapRecipe:
    """How the score maps are made.

    Args:
        count: Number of maps.
        width: Their width, px.
        negatives: Share of frames without any pasted anomaly.
        unseen: Share of maps from frames and objects that the scorer was not trained on; its scores there are as weak as in the field.
        paste: How objects are pasted; the scorer sees the samples at their own width.
    """

    count: int
    width: int
    negatives: float
    unseen: float
    paste: PasteSettings

    def __post_init__(self) -> None:
        if self.count < 1 or self.width < 32:
            raise InputError(f"{self.count} score maps of width {self.width} px, allowed: 1 or more, 32 px or more")
        for name in ("negatives", "unseen"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"'{name}' is {getattr(self, name)}, allowed: a number from 0 to 1")


# Like a frame 1024 px wide at the scorer and 640 px at the detector, but only three quarters of it: cheaper to score.
MAP_PRESETS = {
    "s2m": MapRecipe(2966, 700, 0.0, 0.0, PasteSettings.published()),
    "compact": MapRecipe(
        1400, 480, 0.25, 0.6, PasteSettings(crop_hw=(448, 768), frame_width_px=(800.0, 1800.0), object_px=(10.0, 420.0), native=0.3)
    ),
}


class ExposedFrames:
    """Frames with pasted objects, from both sides of the scorer's split, some without any anomaly.

    Args:
        seen: From the scorer's training data.
        unseen: From what was held out; the last ``held_out`` samples all come from here.
        recipe: Shares.
        held_out: Samples that will measure recall.
        seed: Seed of the choices.
    """

    def __init__(self, seen: OutlierExposure, unseen: OutlierExposure, recipe: MapRecipe, held_out: int, seed: int) -> None:
        self._sides = [(side, _without_anomalies(side)) for side in (seen, unseen)]
        self._recipe, self._held_out, self._seed = recipe, held_out, seed

    def __len__(self) -> int:
        return self._recipe.count

    def __getitem__(self, index: int) -> RoadSample:
        rng = np.random.default_rng([self._seed, index])
        unseen = rng.random() < self._recipe.unseen or index >= len(self) - self._held_out
        negative = rng.random() < self._recipe.negatives
        return self._sides[unseen][negative][index]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``prompt-generator`` to the commands of ``ood-seg train``."""
    parser = subparsers.add_parser(
        "prompt-generator",
        help="train the box prompt generator on score maps",
        description="Pastes objects into road images, scores them with a frozen scorer, and trains a detector on the score maps (S2M).",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="s2m", help="defaults of all that follows (%(default)s: as published)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an interrupted one goes on")
    parser.add_argument("--maps", type=Path, help="folder of score maps, made where missing (OUTPUT/maps)")
    parser.add_argument("--init", type=Path, help="prompt generator to start from, or torchvision's ImageNet ResNet-50 for s2m")
    parser.add_argument("--preview", action="store_true", help="write OUTPUT/preview.png with training examples and stop")
    parser.add_argument("--scorer", default="compact", help="registered scorer whose maps are learnt (%(default)s)")
    parser.add_argument("--scorer-weights", default="", help="its weights; empty takes its own")
    for name in ("camvid", "idd-lite", "cityscapes", "coco", "coco-panoptic"):
        parser.add_argument(f"--{name}", type=Path, help=f"data set in the layout of {name}")
    parser.add_argument("--roads", type=Path, nargs="*", default=[], help="folders of road pictures without anomalies")
    parser.add_argument("--objects", type=Path, nargs="*", default=[], help="folders with images/ and masks/ of objects")
    for name, kind in (("count", int), ("width", int), ("negatives", float), ("unseen", float)):
        parser.add_argument(f"--map-{name}", type=kind, help=f"score maps: {name}; see the preset")
    for field in fields(PromptTraining):
        if field.name != "network":
            _add_setting(parser, field.name, getattr(PRESETS["s2m"], field.name))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 leaves torch's choice")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Makes what maps are missing, then trains.

    Raises:
        InputError: Anything in the arguments or the data that cannot be used, before training starts.
    """
    recipe, map_recipe = recipes(args)
    runtime = Runtime.from_config(RuntimeConfig(device=args.device, precision="float32", threads=args.threads))
    folder = args.maps or args.output / "maps"
    weights = find_weights(args.scorer_weights or f"{args.scorer}_scorer")
    frames = exposed_frames(args, map_recipe, recipe)
    scorer_config = ScorerConfig(name=args.scorer, weights=str(weights), input_width=map_recipe.paste.crop_hw[1])
    scorer_sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    made_by = {
        "scorer": args.scorer,
        "scorer_sha256": scorer_sha256,
        "seed": recipe.seed,
        "held_out": recipe.held_out,
        **asdict(map_recipe),
    }
    device = runtime.device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
        if not is_complete(folder, map_recipe.count):
            raise InputError(f"score maps in '{folder}' are not complete: make them in one process first, with --preview")
    scorer = SCORERS.get(args.scorer)(scorer_config, runtime)
    write_score_maps(folder, frames, scorer, map_recipe.width, made_by, runtime.device)
    maps = ScoreMaps.read(folder)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.preview:
        path = args.output / "preview.png"
        cv2.imwrite(str(path), cv2.cvtColor(contact_sheet(maps, recipe), cv2.COLOR_RGB2BGR))
    else:
        path = train_prompt_generator(maps, recipe, args.output, device=device, init=args.init, extra_metadata={"maps": made_by})
    print(path)
    return 0


def recipes(args: argparse.Namespace) -> tuple[PromptTraining, MapRecipe]:
    """The preset with what the command line changes."""
    changes = {f.name: getattr(args, f.name) for f in fields(PromptTraining) if getattr(args, f.name, None) is not None}
    pairs = {name: tuple(value) for name, value in changes.items() if isinstance(value, list)}
    names = ("count", "width", "negatives", "unseen")
    map_changes = {name: getattr(args, f"map_{name}") for name in names if getattr(args, f"map_{name}") is not None}
    recipe = replace(PRESETS[args.preset], **{**changes, **pairs})
    map_recipe = replace(MAP_PRESETS[args.preset], **map_changes)
    if recipe.held_out >= map_recipe.count:
        raise InputError(f"--held-out is {recipe.held_out}, allowed: fewer than the {map_recipe.count} score maps")
    return recipe, map_recipe


def exposed_frames(args: argparse.Namespace, map_recipe: MapRecipe, recipe: PromptTraining) -> ExposedFrames:
    """Reads the data sets of the command line.

    Raises:
        InputError: A data set is empty or laid out otherwise, or none is named.
    """
    data = ScorerData(args.camvid, args.idd_lite, args.cityscapes, args.roads, args.coco, args.coco_panoptic, args.objects)
    sides = []
    for unseen in (False, True):
        roads, cutouts = data.read(held_out=unseen)
        sides.append(OutlierExposure(roads, cutouts, map_recipe.paste, recipe.seed, map_recipe.count))
    return ExposedFrames(sides[0], sides[1], map_recipe, recipe.held_out, recipe.seed)


def _without_anomalies(data: OutlierExposure) -> OutlierExposure:
    settings = replace(data.settings, objects_per_image=(0, 0))
    return OutlierExposure(data.roads, data.known, settings, data.seed, data.length, data.chances.tolist())


def _add_setting(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=f"recipe (s2m: {default})")
    elif isinstance(default, tuple):
        number = "*" if name == "steps" else 2
        parser.add_argument(flag, type=type(default[0]), nargs=number, help=f"recipe (s2m: {' '.join(map(str, default))})")
    else:
        choices = ("raw", "calibrated") if name == "input_mode" else None
        parser.add_argument(flag, type=type(default), choices=choices, help=f"recipe (s2m: {default})")
