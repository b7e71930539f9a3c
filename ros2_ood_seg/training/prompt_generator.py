"""Training of the prompt generator on score maps (``ood-seg train prompt-generator``; S2M section 3.4, Eq. 7).

The published recipe is the preset ``s2m``; ``compact`` is ours for the small detector. Everything random in iteration k depends on
(seed, k, rank) alone, so a resumed run equals one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_iou

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.prompts.networks.detectron2 import convert_detectron2_state, is_detectron2_state
from ros2_ood_seg.prompts.networks.rcnn import SMALL_NETWORKS, InputMode, MapInput, s2m_rcnn
from ros2_ood_seg.training.loop import TrainingLoop, file_stamp, value_stamp
from ros2_ood_seg.training.processes import Processes
from ros2_ood_seg.training.score_maps import LabelledMap, ScoreMaps
from ros2_ood_seg.types import Calibration
from ros2_ood_seg.weights.store import WeightFile, find_weights, load_into, load_weights, save_weights

SIZE_BINS_PX = (0.0, 16.0, 32.0, 96.0, float("inf"))
"""Bounds of the square root of a box's area by which recall is reported, px of the map."""
_MAY_CHANGE = ("iterations", "steps", "checkpoint_every", "workers", "amp")
_LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
_RECALLS = ("recall", *(f"recall_from_{low:g}px" for low in SIZE_BINS_PX[:-1]))


@dataclass(frozen=True)
class PromptTraining:
    """The recipe; the defaults are S2M's as released (detectron2 configuration and command line).

    Args:
        network: ``s2m`` (ResNet-50-FPN), ``compact`` (slim) or ``mobilenet_v3`` (MobileNetV3-Large-FPN).
        input_mode: ``raw`` scores (published) or ``calibrated`` ones.
        iterations: Steps in all.
        batch_size: Maps per step and process.
        learning_rate: After warm-up.
        warmup_iterations: Steps of linear warm-up.
        warmup_factor: The first step's rate as a fraction of ``learning_rate`` (released code 0.001, paper 0.04).
        steps: Iterations after which the rate is multiplied by ``decay``.
        decay: See ``steps``.
        momentum: Of SGD.
        weight_decay: Of SGD.
        clip_norm: Greatest norm of the gradient, 0 for none.
        noise: Scores are multiplied by 1 + noise * U(-1, 1), per pixel and channel (S2M Table 2: 0.01).
        flip: Chance of a horizontal flip.
        shortest_px: Maps are resized so that the shorter side is this (published: 800, longer at most 1333).
        longest_px: See ``shortest_px``.
        input_width: Width px to which whole maps are resized in use, 0 for their own (published); stored beside the weights.
        scale: Range of a further random factor of the size, log-uniform.
        crop_hw: Random crop after resizing, (0, 0) for none.
        fragments: Chance that smooth random patches of the map are dimmed, as scorers do inside real objects.
        contrast: Range of the exponent applied to calibrated scores, log-uniform.
        min_box_px: Shorter boxes are not labelled after resizing.
        min_peak: Objects whose highest calibrated score is lower are not labelled: the map does not show them.
        amp: bfloat16 autocast of the backbone.
        seed: Seed of weights and data.
        workers: Processes that prepare batches, 0 for none.
        checkpoint_every: Iterations between checkpoints.
        held_out: Maps at the end of the set that are only used to measure recall.
    """

    network: Literal["s2m", "compact", "mobilenet_v3"] = "s2m"
    input_mode: InputMode = "raw"
    iterations: int = 148_300
    batch_size: int = 4
    learning_rate: float = 2.5e-3
    warmup_iterations: int = 1000
    warmup_factor: float = 1e-3
    steps: tuple[int, ...] = (60_000, 80_000)
    decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    noise: float = 0.01
    flip: float = 0.5
    shortest_px: int = 800
    longest_px: int = 1333
    input_width: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    crop_hw: tuple[int, int] = (0, 0)
    fragments: float = 0.0
    contrast: tuple[float, float] = (1.0, 1.0)
    min_box_px: float = 1.0
    min_peak: float = 0.0
    amp: bool = False
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 500
    held_out: int = 100

    def __post_init__(self) -> None:
        if self.network not in ("s2m", *SMALL_NETWORKS):
            raise InputError(f"network is '{self.network}': use one of s2m, {', '.join(SMALL_NETWORKS)}")
        for name in ("iterations", "batch_size", "checkpoint_every", "shortest_px", "longest_px"):
            if getattr(self, name) < 1:
                raise InputError(f"'{name}' is {getattr(self, name)}, allowed: 1 or more")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"'{name}' is {getattr(self, name)}, allowed: 0 or more")
        for name in ("noise", "flip", "fragments", "min_peak"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"'{name}' is {getattr(self, name)}, allowed: a number from 0 to 1")
        for name in ("scale", "contrast"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise InputError(f"'{name}' is {low} {high}, allowed: a range from low to high, above 0")
        if self.learning_rate <= 0.0 or self.held_out < 0 or min(self.crop_hw) < 0:
            raise InputError(
                f"'learning_rate' is {self.learning_rate}, 'held_out' {self.held_out}, 'crop_hw' {self.crop_hw}, "
                "allowed: above 0, and not negative"
            )
        if self.contrast != (1.0, 1.0) and self.input_mode == "raw":
            raise InputError("'contrast' needs calibrated scores: set input_mode to 'calibrated'")


_COMPACT = PromptTraining(
    network="compact",
    input_mode="calibrated",
    iterations=3000,
    batch_size=6,
    learning_rate=0.02,
    warmup_iterations=200,
    steps=(2100, 2700),
    clip_norm=10.0,
    shortest_px=373,
    longest_px=640,
    input_width=640,
    scale=(0.5, 1.6),
    crop_hw=(288, 480),
    fragments=0.5,
    contrast=(0.6, 1.6),
    min_box_px=2.0,
    min_peak=0.3,
)
PRESETS = {"s2m": PromptTraining(), "compact": _COMPACT, "mobilenet_v3": replace(_COMPACT, network="mobilenet_v3")}


def build_network(recipe: PromptTraining, *, pretrained: bool = False) -> tuple[nn.Module, MapInput]:
    """The detector and its input for a recipe.

    Args:
        recipe: Network and input mode.
        pretrained: Whether its backbone will be given weights: then the batch norms stay frozen, and stem and first stage too.
    """
    if recipe.network in SMALL_NETWORKS:
        if recipe.input_mode == "raw":
            raise InputError(f"the {recipe.network} prompt generator takes calibrated scores: set input_mode to 'calibrated'")
        map_input = MapInput.calibrated()
        return SMALL_NETWORKS[recipe.network](map_input), map_input
    map_input = MapInput.published() if recipe.input_mode == "raw" else MapInput.calibrated(3)
    network = s2m_rcnn(map_input, num_classes=1, frozen_norm=pretrained)
    if pretrained:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith(("backbone.body.conv1", "backbone.body.layer1")))
    return network, map_input


def learning_rate(recipe: PromptTraining, iteration: int) -> float:
    """Linear warm-up, then steps (detectron2's WarmupMultiStepLR)."""
    progress = min(1.0, iteration / recipe.warmup_iterations) if recipe.warmup_iterations else 1.0
    warm = recipe.warmup_factor * (1.0 - progress) + progress
    return recipe.learning_rate * warm * recipe.decay ** sum(iteration >= step for step in recipe.steps)


def augmented(entry: LabelledMap, calibration: Calibration, recipe: PromptTraining, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One training example.

    Returns:
        (C, h, w) float32 scores, C the network's channels; (N, 4) float32 boxes px of it.
    """
    scores = torch.from_numpy(entry.scores)
    scores = calibration.to_unit(scores) if recipe.input_mode == "calibrated" else scores
    boxes = torch.from_numpy(entry.boxes_xyxy[entry.peaks >= recipe.min_peak]).reshape(-1, 4)
    height, width = scores.shape
    factor = min(recipe.shortest_px / min(height, width), recipe.longest_px / max(height, width)) * _log_uniform(rng, recipe.scale)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    if size != (height, width):
        scores = F.interpolate(scores[None, None], size=size, mode="bilinear", antialias=factor < 1.0)[0, 0]
        boxes = boxes * boxes.new_tensor([size[1] / width, size[0] / height]).repeat(2)
    scores, boxes = _cropped(scores, boxes, recipe.crop_hw, rng)
    if rng.random() < recipe.flip:
        scores, boxes = scores.flip(1), _flipped(boxes, scores.shape[1])
    if recipe.contrast != (1.0, 1.0):
        scores = scores ** _log_uniform(rng, recipe.contrast)
    if rng.random() < recipe.fragments:
        scores = scores * _dimming(tuple(scores.shape), rng)
    channels = 3 if recipe.network == "s2m" else 1
    noise = torch.from_numpy(rng.uniform(-1.0, 1.0, (channels, *scores.shape)).astype(np.float32))
    scores = scores * (1.0 + recipe.noise * noise)
    sides = boxes[:, 2:] - boxes[:, :2]
    return scores, boxes[(sides >= recipe.min_box_px).all(dim=1)]


Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
"""(C, h, w) scores, and ``boxes`` and ``labels``, of each map."""


class Batches(Dataset[Batch]):
    """Batch k of a run; item k is always the same for the same maps, recipe and rank."""

    def __init__(self, maps: ScoreMaps, recipe: PromptTraining, start: int = 0, rank: int = 0) -> None:
        self.maps, self.recipe, self.start, self.rank = maps, recipe, start, rank

    def __len__(self) -> int:
        return max(0, self.recipe.iterations - self.start)

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng([self.recipe.seed, self.start + index, self.rank])
        images, targets = [], []
        for k in rng.integers(len(self.maps), size=self.recipe.batch_size):
            scores, boxes = augmented(self.maps[int(k)], self.maps.calibration, self.recipe, rng)
            images.append(scores)
            targets.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)})
        return images, targets


class PreparedTraining:
    """A prompt generator about to be trained: weights to start from and checkpoint are read, so what is wrong with them is known by now.

    In several processes (:mod:`~ros2_ood_seg.training.processes`) each trains on its own batches and the first one writes.

    Args:
        recipe: Everything but the maps.
        output: Folder for ``last.pt``, ``log.csv``, ``curve.png`` and the final ``prompt_generator.safetensors``; a run that was
            interrupted there goes on.
        device: Where to train; CPU when None.
        init: Prompt generator weights or, for ``s2m``, S2M's released ones or ImageNet weights of torchvision's ResNet-50 to start from.
        maps: JSON values that say how the maps were made, where that is known; a run goes on with the same ones only.

    Raises:
        InputError: Weights of another network, or a checkpoint of another recipe or of other maps.
    """

    def __init__(
        self,
        recipe: PromptTraining,
        output: Path,
        *,
        device: torch.device | None = None,
        init: Path | None = None,
        maps: Mapping[str, Any] | None = None,
    ) -> None:
        self._recipe, self._output = recipe, output
        self._device = device or torch.device("cpu")
        self._processes = Processes.current()
        torch.manual_seed(recipe.seed)
        network, self._map_input = build_network(recipe, pretrained=init is not None)
        if init is not None:
            start_from(network, load_weights(find_weights(str(init))))
        if recipe.amp:
            autocast_backbone(network)
        self._network = network.to(self._device).to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(
            [p for p in network.parameters() if p.requires_grad],
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self._loop = TrainingLoop(
            output,
            recipe,
            {"network": self._network, "optimizer": self._optimizer},
            title="train prompt generator",
            panels=(_LOSSES, _RECALLS, ("boxes_per_map",)),
            may_change=_MAY_CHANGE,
            checkpoint_every=recipe.checkpoint_every,
            checkpoint_name="last.pt",
            writes=self._processes.rank == 0,
            origin={"init": file_stamp(find_weights(str(init)) if init is not None else None), "maps": value_stamp(maps)},
        )

    def run(self, maps: ScoreMaps, extra_metadata: dict[str, Any] | None = None) -> Path:
        """Trains to the end.

        Args:
            maps: Score maps and boxes; the last ``recipe.held_out`` only measure.
            extra_metadata: Stored beside the weights.

        Returns:
            The final weights file, which ``prompts.boxes.weights`` takes.

        Raises:
            InputError: Too few maps, or the loss is not finite.
        """
        recipe, loop = self._recipe, self._loop
        training, measured = maps.split(recipe.held_out)
        parallel = self._processes.parallel(self._network, self._device)
        loader = DataLoader(Batches(training, recipe, loop.done, self._processes.rank), batch_size=None, num_workers=recipe.workers)
        loop.run(
            loader,
            lambda batch: self._step(parallel, batch),
            lambda: recall_by_size(self._network, measured, recipe, self._device) if len(measured) else {},
        )
        path = self._output / "prompt_generator.safetensors"
        if self._processes.rank == 0:
            metadata = {"network": recipe.network, "map_input": self._map_input.to_dict(), "input_width": recipe.input_width}
            training_log = {"training_seconds": round(loop.seconds), "processes": self._processes.world}
            save_weights(path, self._network.state_dict(), {**metadata, "recipe": asdict(recipe), **training_log, **(extra_metadata or {})})
        return path

    def _step(self, parallel: nn.Module, batch: Batch) -> dict[str, Tensor]:
        recipe, done, device = self._recipe, self._loop.done, self._device
        # The detector samples anchors and proposals from torch's generator.
        torch.manual_seed(hash((recipe.seed, done, self._processes.rank)) % 2**63)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(recipe, done)
        parallel.train()
        images, targets = batch
        losses = parallel([image.to(device) for image in images], [{k: v.to(device) for k, v in t.items()} for t in targets])
        self._loop.descend(self._optimizer, sum(losses.values(), torch.zeros((), device=device)), recipe.clip_norm)
        return cast("dict[str, Tensor]", losses)


def autocast_backbone(network: Any) -> None:
    """Runs the backbone in bfloat16 from now on, and the rest in float32: boxes in bfloat16 would be rounded to 4 px above 512.

    Args:
        network: torchvision's GeneralizedRCNN.
    """
    whole = network.backbone.forward

    def forward(x: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16):
            features = whole(x)
        return {name: level.float() for name, level in features.items()}

    network.backbone.forward = forward


def train_prompt_generator(
    maps: ScoreMaps,
    recipe: PromptTraining,
    output: Path,
    *,
    device: torch.device | None = None,
    init: Path | None = None,
    extra_metadata: dict[str, Any] | None = None,
) -> Path:
    """Prepares and trains at once; see :class:`PreparedTraining`."""
    maps.split(recipe.held_out)
    return PreparedTraining(recipe, output, device=device, init=init).run(maps, extra_metadata)


def start_from(network: nn.Module, weights: WeightFile) -> None:
    """Loads a whole prompt generator, S2M's released one among them, or the backbone from a torchvision ResNet-50.

    Raises:
        WeightsError: None of them fits.
    """
    if is_detectron2_state(weights.state):
        weights = WeightFile(weights.path, _one_class(convert_detectron2_state(weights.state)), weights.metadata)
    whole = not hasattr(network.backbone, "body") or any(key.startswith("rpn.") for key in weights.state)
    target = network if whole else cast("nn.Module", cast("nn.Module", network.backbone).body)
    own = target.state_dict()
    # The classifier of ImageNet has no use here, and frozen batch norms do not count batches.
    state = {k: v for k, v in weights.state.items() if k in own or not (k.startswith("fc.") or k.endswith("num_batches_tracked"))}
    load_into(target, WeightFile(weights.path, state, weights.metadata), "prompt generator" if whole else "torchvision ResNet-50")


def _one_class(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the class that S2M's prompt generator has and never uses."""
    rows = {"cls_score": 2, "bbox_pred": 8}
    return {key: value[: rows[key.split(".")[-2]]] if "box_predictor" in key else value for key, value in state.items()}


@torch.no_grad()
def detect(network: nn.Module, scores: Tensor, recipe: PromptTraining) -> tuple[Tensor, Tensor]:
    """Boxes px of ``scores`` (h, w) and their confidence, at the size that the recipe trains on."""
    height, width = scores.shape
    factor = min(recipe.shortest_px / min(height, width), recipe.longest_px / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    network.eval()
    resized = F.interpolate(scores[None, None], size=size, mode="bilinear", antialias=factor < 1.0)[0]
    found = network([resized])[0]
    return found["boxes"] * found["boxes"].new_tensor([width / size[1], height / size[0]]).repeat(2), found["scores"]


def recall_by_size(network: nn.Module, maps: ScoreMaps, recipe: PromptTraining, device: torch.device) -> dict[str, float]:
    """Share of objects with a box of IoU >= 0.5, in all and by size, and boxes per map, at the published confidence of 0.05."""
    sides, hits, count = [], [], 0
    for k in range(len(maps)):
        entry = maps[k]
        scores = torch.from_numpy(entry.scores).to(device)
        scores = maps.calibration.to_unit(scores) if recipe.input_mode == "calibrated" else scores
        boxes, _ = detect(network, scores, recipe)
        truth = torch.from_numpy(entry.boxes_xyxy).to(device)
        hits.append(found_boxes(truth, boxes).cpu())
        sides.append((truth[:, 2:] - truth[:, :2]).prod(1).sqrt().cpu())
        count += len(boxes)
    side, hit = torch.cat(sides), torch.cat(hits).float()
    result = {"recall": float(hit.mean()) if len(hit) else float("nan"), "boxes_per_map": count / len(maps)}
    for low, high in pairwise(SIZE_BINS_PX):
        inside = hit[(side >= low) & (side < high)]
        result[f"recall_from_{low:g}px"] = float(inside.mean()) if len(inside) else float("nan")
    return result


def found_boxes(truth_xyxy: Tensor, boxes_xyxy: Tensor, iou: float = 0.5) -> Tensor:
    """(N,) bool: which of the N true boxes have a detected one with at least this IoU."""
    if len(boxes_xyxy) == 0:
        return torch.zeros(len(truth_xyxy), dtype=torch.bool, device=truth_xyxy.device)
    return cast("Tensor", box_iou(truth_xyxy, boxes_xyxy).amax(dim=1) >= iou)


def contact_sheet(maps: ScoreMaps, recipe: PromptTraining, count: int = 16, columns: int = 4) -> NDArray[np.uint8]:
    """The first training examples with their boxes, (H, W, 3) uint8 RGB; scores from black (0 or the least) to white."""
    tiles = []
    for k in range(min(count, len(maps))):
        scores, boxes = augmented(maps[k], maps.calibration, recipe, np.random.default_rng([recipe.seed, k]))
        grey = scores[0].numpy()
        low, high = (0.0, 1.0) if recipe.input_mode == "calibrated" else (float(grey.min()), float(grey.max()) + 1e-6)
        tile = cv2.cvtColor((255 * np.clip((grey - low) / (high - low), 0, 1)).astype(np.uint8), cv2.COLOR_GRAY2RGB)
        for x0, y0, x1, y1 in boxes.round().int().tolist():
            cv2.rectangle(tile, (x0, y0), (x1 - 1, y1 - 1), (255, 200, 0), 1)
        tiles.append(np.asarray(cv2.resize(tile, (400, 225), interpolation=cv2.INTER_AREA), np.uint8))
    if not tiles:
        raise InputError("a contact sheet needs at least one score map")
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[k : k + columns]) for k in range(0, len(tiles), columns)])


def _cropped(scores: Tensor, boxes: Tensor, crop_hw: tuple[int, int], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    height, width = scores.shape
    if crop_hw == (0, 0):
        return scores, boxes
    h, w = min(height, crop_hw[0]), min(width, crop_hw[1])
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    shifted = boxes - boxes.new_tensor([x, y]).repeat(2)
    clipped = shifted.clamp(min=0).minimum(boxes.new_tensor([w, h]).repeat(2))
    # A sliver at the border is no example of its object.
    visible = (clipped[:, 2:] - clipped[:, :2]).clamp(min=0).prod(1) / (shifted[:, 2:] - shifted[:, :2]).prod(1)
    return scores[y : y + h, x : x + w], clipped[visible > 0.2]


def _flipped(boxes: Tensor, width: int) -> Tensor:
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def _dimming(shape_hw: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """(h, w) factors in [0.2, 1]: smooth patches of random size."""
    cells = int(rng.integers(4, 24))
    coarse = torch.from_numpy(rng.random((1, 1, cells, 2 * cells)).astype(np.float32))
    smooth = F.interpolate(coarse, size=shape_hw, mode="bicubic")[0, 0].clamp(0, 1)
    depth = float(rng.uniform(0.2, 0.8))
    return 1.0 - depth * ((smooth - 0.4) / 0.4).clamp(0, 1)


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))
