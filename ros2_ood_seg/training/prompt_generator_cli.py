"""``ood-seg train prompt-generator``: pastes, scores, and trains, each going on where it was interrupted."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ros2_ood_seg.config import build_config
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import write_rgb
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.base import CalibratedScorer
from ros2_ood_seg.training.outlier_exposure import OutlierExposure, PasteSettings, RoadSample
from ros2_ood_seg.training.outlier_exposure import contact_sheet as frames_sheet
from ros2_ood_seg.training.processes import joined_processes, own_device
from ros2_ood_seg.training.prompt_generator import PRESETS, PreparedTraining, PromptTraining, contact_sheet
from ros2_ood_seg.training.score_maps import ScoreMaps, check_recipe, score_sample, write_score_maps
from ros2_ood_seg.training.scorer import ScorerData, data_stamp
from ros2_ood_seg.training.setting_flags import add_paste_settings, add_setting, changed_paste, descriptions


@dataclass(frozen=True)
class MapRecipe:
    """How the score maps are made.

    Args:
        count: Number of maps.
        width: Their width, px.
        negatives: Share of frames without any pasted anomaly.
        unseen: Share of maps from frames and objects that the scorer was not trained on; its scores there are as weak as in the field.
        paste: How objects are pasted; the scorer sees the samples at their own width.
        scenes: Share of maps of COCO's pictures taken outside, as they are: what the scorer makes of objects where they belong.
    """

    count: int
    width: int
    negatives: float
    unseen: float
    paste: PasteSettings
    scenes: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.width < 32:
            raise InputError(f"{self.count} score maps of width {self.width} px, allowed: 1 or more, 32 px or more")
        for name in ("negatives", "unseen", "scenes"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"'{name}' is {getattr(self, name)}, allowed: a number from 0 to 1")


# What was fixed before it became a setting, for folders of maps made then.
_DEFAULTS = {"paste": asdict(PasteSettings()), "scenes": 0.0, "choices": "of the samples' stream"}

# Like a frame 1024 px wide at the scorer and 640 px at the detector, but only three quarters of it: cheaper to score.
_COMPACT_MAPS = MapRecipe(
    1600, 640, 0.25, 0.6, PasteSettings(crop_hw=(448, 768), frame_width_px=(800.0, 1800.0), object_px=(8.0, 520.0), native=0.3)
)
MAP_PRESETS = {
    "s2m": MapRecipe(2966, 700, 0.0, 0.0, PasteSettings.published()),
    "compact": _COMPACT_MAPS,
    "mobilenet_v3": _COMPACT_MAPS,
}


class ExposedFrames:
    """Frames with pasted objects, from both sides of the scorer's split, some without any anomaly.

    Args:
        seen: From the scorer's training data.
        unseen: From what was held out; the last ``held_out`` samples all come from here.
        recipe: Shares.
        held_out: Samples that will measure recall.
        seed: Seed of the choices.
        scenes: Pictures that show objects of their own; needed where the recipe asks for some.
    """

    def __init__(
        self,
        seen: OutlierExposure,
        unseen: OutlierExposure,
        recipe: MapRecipe,
        held_out: int,
        seed: int,
        scenes: OutlierExposure | None = None,
    ) -> None:
        self._sides = [(side, _without_anomalies(side)) for side in (seen, unseen)]
        self._recipe, self._held_out, self._seed = recipe, held_out, seed
        self._scenes = scenes
        self.width = recipe.width
        """Width of their score maps, px."""
        self.data = " and ".join(data_stamp(side.roads, side.cutouts) for side in (seen, unseen))
        """How much there is of both sides."""

    def __len__(self) -> int:
        return self._recipe.count

    def __getitem__(self, index: int) -> RoadSample:
        # Not the stream that the samples draw from: source and size would follow the choices made here.
        rng = np.random.default_rng([self._seed, index, 1])
        measures = index >= len(self) - self._held_out
        unseen = rng.random() < self._recipe.unseen or measures
        negative = rng.random() < self._recipe.negatives
        if self._scenes is not None and rng.random() < self._recipe.scenes and not measures:
            return self._scenes[index]
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
    parser.add_argument("--preview", action="store_true", help="write OUTPUT/preview.png and preview_frames.png with examples and stop")
    parser.add_argument("--scorer", default="compact", help="registered scorer whose maps are learnt (%(default)s)")
    parser.add_argument("--scorer-weights", default="", help="its weights; empty takes its own")
    layouts = {"camvid": "CamVid", "idd-lite": "IDD or IDD-Lite", "cityscapes": "Cityscapes"}
    for name, layout in layouts.items():
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"road images in the {layout} layout")
    parser.add_argument("--roads", type=Path, nargs="*", default=[], metavar="DIR", help="folders of road pictures without anomalies")
    for name, content in {"coco": "instances", "coco-panoptic": "panoptic"}.items():
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"objects in the COCO layout, {content}")
    parser.add_argument("--objects", type=Path, nargs="*", default=[], metavar="DIR", help="objects: folders with images/ and masks/")
    for name, kind in (("count", int), ("width", int), ("negatives", float), ("unseen", float), ("scenes", float)):
        s2m, compact = (getattr(MAP_PRESETS[preset], name) for preset in ("s2m", "compact"))
        text = f"score maps: {descriptions(MapRecipe)[name]} (s2m: {s2m}, compact: {compact})"
        parser.add_argument(f"--map-{name}", type=kind, help=text)
    add_paste_settings(parser, MAP_PRESETS["s2m"].paste, "s2m: %s")
    known = descriptions(PromptTraining)
    for field in fields(PromptTraining):
        if field.name != "network":
            compact = str(getattr(PRESETS["compact"], field.name)).replace("%", "%%")
            text = f"{known[field.name]} (s2m: %s, compact: {compact})"
            add_setting(parser, field.name, getattr(PRESETS["s2m"], field.name), text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 leaves torch's choice")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Makes what maps are missing, then trains; under ``torchrun`` in several processes.

    Raises:
        InputError: Anything in the arguments, the data or the weights that cannot be used, before anything is scored.
    """
    recipe, map_recipe = recipes(args)
    runtime = Runtime.from_arguments(device=own_device(args.device), precision="float32", threads=args.threads)
    folder = args.maps or args.output / "maps"
    with joined_processes(runtime.device) as processes:
        scorer = frozen_scorer(args, map_recipe, runtime)
        frames = exposed_frames(args, map_recipe, recipe)
        made_by = {
            "data": frames.data,
            "scorer": args.scorer,
            "scorer_sha256": hashlib.sha256(scorer.weights_path.read_bytes()).hexdigest(),
            "seed": recipe.seed,
            "held_out": recipe.held_out,
            "choices": "of their own",
            **asdict(map_recipe),
        }
        # Maps of earlier versions do not say what they were made from.
        defaults = {**_DEFAULTS, "data": made_by["data"]}
        check_recipe(folder, made_by, defaults)
        if args.preview:
            print(*write_preview(args.output, frames, scorer, recipe, runtime.device), sep="\n")
            return 0
        training = PreparedTraining(recipe, args.output, device=runtime.device, init=args.init, maps=made_by)
        part = (processes.rank, processes.world)
        write_score_maps(folder, frames, scorer, map_recipe.width, made_by, runtime.device, defaults=defaults, part=part)
        processes.wait()
        path = training.run(ScoreMaps.read(folder), extra_metadata={"maps": made_by})
        if processes.rank == 0:
            print(path)
    return 0


def frozen_scorer(args: argparse.Namespace, map_recipe: MapRecipe, runtime: Runtime) -> CalibratedScorer:
    """The scorer whose maps are learnt; it sees the samples at their own width.

    Raises:
        InputError: Unknown, without weights of its own, or they are not found; or samples of a width that it does not take.
    """
    own = {"name": args.scorer, "weights": args.scorer_weights, "input_width": map_recipe.paste.crop_hw[1]}
    scorer = SCORERS.get(args.scorer)(build_config({"scorer": own}, "--paste-crop-hw").scorer, runtime)
    if not hasattr(scorer, "weights_path"):
        raise InputError(f"scorer '{args.scorer}' has no network that could score training images: name another with --scorer")
    return cast("CalibratedScorer", scorer)


def write_preview(
    output: Path, frames: ExposedFrames, scorer: CalibratedScorer, recipe: PromptTraining, device: torch.device, count: int = 16
) -> tuple[Path, Path]:
    """The first training examples: their score maps as the detector sees them, and their frames, each with boxes."""
    output.mkdir(parents=True, exist_ok=True)
    samples = [frames[k] for k in range(min(count, len(frames)))]
    scored = [score_sample(sample, scorer, frames.width, device) for sample in samples]
    maps = [entry for entry, _ in scored]
    examples = ScoreMaps(np.stack([m.scores for m in maps]), [m.boxes_xyxy for m in maps], [m.peaks for m in maps], scored[0][1])
    paths = output / "preview.png", output / "preview_frames.png"
    for path, sheet in zip(paths, (contact_sheet(examples, recipe), frames_sheet(samples)), strict=True):
        write_rgb(path, sheet)
    return paths


def recipes(args: argparse.Namespace) -> tuple[PromptTraining, MapRecipe]:
    """The preset with what the command line changes."""
    changes = {f.name: getattr(args, f.name) for f in fields(PromptTraining) if getattr(args, f.name, None) is not None}
    pairs = {name: tuple(value) for name, value in changes.items() if isinstance(value, list)}
    names = ("count", "width", "negatives", "unseen", "scenes")
    map_changes = {name: getattr(args, f"map_{name}") for name in names if getattr(args, f"map_{name}") is not None}
    recipe = replace(PRESETS[args.preset], **{**changes, **pairs})
    map_recipe = MAP_PRESETS[args.preset]
    map_recipe = replace(map_recipe, paste=changed_paste(args, map_recipe.paste), **map_changes)
    if recipe.held_out >= map_recipe.count:
        raise InputError(f"--held-out is {recipe.held_out}, allowed: fewer than the {map_recipe.count} score maps")
    return recipe, map_recipe


def exposed_frames(args: argparse.Namespace, map_recipe: MapRecipe, recipe: PromptTraining) -> ExposedFrames:
    """Reads the data sets of the command line.

    Raises:
        InputError: A data set is empty or laid out otherwise, or none is named.
    """
    if map_recipe.paste.procedural < 1.0 and not (args.coco or args.coco_panoptic or args.objects):
        raise InputError("there are no objects to paste: name --coco, --coco-panoptic or --objects, or set --paste-procedural 1")
    if map_recipe.scenes and not (args.coco or args.coco_panoptic):
        raise InputError("--map-scenes needs --coco or --coco-panoptic, whose pictures they are")
    data = ScorerData(args.camvid, args.idd_lite, args.cityscapes, args.roads, args.coco, args.coco_panoptic, args.objects)
    if map_recipe.paste.object_scales:
        data = replace(data, whole_pictures=True)
    sides = []
    for unseen in (False, True):
        roads, cutouts = data.read(held_out=unseen)
        side = "to hold out" if unseen else "to learn from"
        if map_recipe.paste.procedural < 1.0 and not any(cutout.is_anomaly for cutout in cutouts):
            raise InputError(f"there are no objects {side}, 15 of 100 are held out by name: give more")
        sides.append(OutlierExposure(roads, cutouts, map_recipe.paste, recipe.seed, map_recipe.count))
    scenes = None
    if map_recipe.scenes:
        pictures = replace(data, scenes=True).read_training()[0][-1]
        scenes = OutlierExposure([pictures], [], _nothing_pasted(map_recipe.paste), recipe.seed, map_recipe.count)
    return ExposedFrames(sides[0], sides[1], map_recipe, recipe.held_out, recipe.seed, scenes)


def _nothing_pasted(paste: PasteSettings) -> PasteSettings:
    return replace(paste, objects_per_image=(0, 0))


def _without_anomalies(data: OutlierExposure) -> OutlierExposure:
    settings = _nothing_pasted(data.settings)
    return OutlierExposure(data.roads, data.known, settings, data.seed, data.length, data.chances.tolist())
