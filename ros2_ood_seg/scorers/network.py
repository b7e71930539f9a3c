"""What scorers with published segmentation networks share: reading the checkpoint, feeding the image, sizing and checking the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import functions
from ros2_ood_seg.scorers.calibration import DEFAULT_RANGES, read_calibration
from ros2_ood_seg.types import Calibration, ScoreMap
from ros2_ood_seg.weights.families import recognise, without_prefixes
from ros2_ood_seg.weights.store import WeightFile, find_weights, load_into, load_weights

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""The 19 evaluated Cityscapes classes, by train id."""


@dataclass(frozen=True)
class RawScores:
    """What a method makes of one image.

    Args:
        scores: (h, w) float32 in the network input's pixels, higher = more anomalous.
        classes: (h, w) predicted in-distribution class.
    """

    scores: Tensor
    classes: Tensor


NetworkT = TypeVar("NetworkT", bound=nn.Module)

Method = Callable[[Tensor], RawScores]
"""A network with its score function: takes (1, 3, h, w) float32 RGB in [0, 255]."""


class NetworkScorer:
    """Resizes the image, runs a method, and brings its scores back to the image's size.

    Args:
        method: Network and score function.
        score: Name of the score function, part of :attr:`calibration_key`.
        weights: The method's weights file; its calibrations lie beside it.
        class_names: Names of the classes the method predicts.
        config: Name, input width, temperature and smoothing.
        smoothing_px: Kernel of the blur that belongs to the score, 1 for none.

    Raises:
        WeightsError: The file of calibrations is damaged.
    """

    def __init__(
        self,
        method: Method,
        score: str,
        weights: Path,
        class_names: Sequence[str],
        config: ScorerConfig,
        smoothing_px: int = 1,
    ) -> None:
        self.name = config.name
        self.weights_path = weights
        self.calibration_key = f"{config.name}/{score}"
        if score == "energy" and config.temperature != 1.0:
            self.calibration_key += f"@{config.temperature:g}"
        self._calibration = read_calibration(weights, self.calibration_key, Calibration.linear(*DEFAULT_RANGES[score]))
        self._method = method
        self._class_names = tuple(class_names)
        self._input_width = config.input_width
        self._smoothing_px = config.smoothing_px or smoothing_px

    def __call__(self, image: Tensor, external: Tensor | None = None) -> ScoreMap:
        """Scores one image; see :class:`ros2_ood_seg.scorers.base.Scorer`."""
        if external is not None:
            raise InputError(f"scorer '{self.name}' makes its own score map and takes none from elsewhere: use scorer 'external'")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
            raise InputError(f"image must be (H, W, 3) uint8 RGB, got shape {tuple(image.shape)} of {image.dtype}")
        height, width = int(image.shape[0]), int(image.shape[1])
        with torch.inference_mode():
            raw = self._method(network_input(image, self._input_width))
            scores, classes = smooth(raw.scores, self._smoothing_px), raw.classes.to(torch.uint8)
            if tuple(scores.shape) != (height, width):
                scores = F.interpolate(scores[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
                classes = F.interpolate(classes[None, None], size=(height, width), mode="nearest-exact")[0, 0]
        if not torch.isfinite(scores).all():
            raise InputError(f"scorer '{self.name}' gives scores that are not finite: the weights are damaged, or the precision is too low")
        return ScoreMap(scores, self.name, self._calibration, classes, self._class_names)


def network_input(image: Tensor, width: int) -> Tensor:
    """An image as a method takes it: (1, 3, h, ``width``) float32 in [0, 255], of the shape of (H, W, 3) uint8; 0 leaves its width."""
    x = image.permute(2, 0, 1)[None].float()
    if width in (0, image.shape[1]):
        return x
    size = (max(1, round(image.shape[0] * width / image.shape[1])), width)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def read_checkpoint(
    config: ScorerConfig, runtime: Runtime, default: str, families: Sequence[str], unused: tuple[str, ...] = ()
) -> WeightFile:
    """Finds and reads a scorer's weights.

    Args:
        config: Names the scorer and the weights.
        runtime: Names the folder of weights.
        default: Name of the weights when the settings name none.
        families: Names of the families the scorer can use.
        unused: Beginnings of names that belong to the family but are not needed, and dropped.

    Raises:
        WeightsError: Missing, damaged, or of another family.
    """
    weights = without_prefixes(load_weights(find_weights(config.weights or default, runtime.weights_dir)))
    family = recognise(weights)
    if family.name not in families:
        raise WeightsError(
            f"weights file '{weights.path}' is of the family '{family.name}', scorer '{config.name}' needs {' or '.join(families)}"
        )
    state = {key: value for key, value in weights.state.items() if not key.startswith(unused)}
    return WeightFile(weights.path, state, weights.metadata)


def ready(like: Callable[[Mapping[str, Tensor]], NetworkT], weights: WeightFile, family: str, runtime: Runtime) -> NetworkT:
    """Makes the network of a checkpoint, fills it, strictly, and puts it on the runtime's device in evaluation mode.

    Args:
        like: Gives the untrained network that a state dict belongs to, on the meta device.
        weights: The checkpoint.
        family: What it should be, for messages.
        runtime: Device.

    Raises:
        WeightsError: Missing or left-over entries, or of another shape.
    """
    try:
        network = like(weights.state)
    except KeyError as error:
        raise WeightsError(f"weights file '{weights.path}' is not of the family '{family}': {error.args[0]} is missing") from error
    except WeightsError:
        raise
    except (IndexError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"weights file '{weights.path}' is not of the family '{family}': no such network has its shapes") from error
    network.to_empty(device="cpu")
    # Checkpoints from before PyTorch 0.4.1 lack the batch counters, which inference does not use.
    counters = {key: torch.zeros((), dtype=torch.int64) for key in network.state_dict() if key.endswith(".num_batches_tracked")}
    load_into(network, WeightFile(weights.path, {**counters, **weights.state}, weights.metadata), family)
    network.to(runtime.device).eval()
    if runtime.device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    return network


def logit_score(config: ScorerConfig, default: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The name and the function of the score that the settings ask for.

    Args:
        config: Score and temperature.
        default: What ``default`` stands for.

    Raises:
        InputError: A score that needs an outlier head.
    """
    name = default if config.score == "default" else config.score
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "msp": functions.msp,
        "entropy": functions.entropy,
        "energy": lambda logits: functions.energy(logits, config.temperature),
        "max_logit": functions.max_logit,
    }
    if name not in scores:
        raise InputError(f"scorer.score is '{name}' but scorer '{config.name}' has no such output: use default, {', '.join(scores)}")
    return name, scores[name]


def only_default_score(config: ScorerConfig) -> None:
    """Refuses another score function where the method is one.

    Raises:
        InputError: ``scorer.score`` is not ``default``.
    """
    if config.score != "default":
        raise InputError(f"scorer.score is '{config.score}' but scorer '{config.name}' has one score only: use default")


def finite(logits: Tensor, scorer: str) -> Tensor:
    """Network outputs in float32.

    Raises:
        InputError: Some are not finite.
    """
    logits = logits.float()
    if not torch.isfinite(logits).all():
        raise InputError(f"scorer '{scorer}': network outputs are not finite, the weights are damaged or the precision is too low")
    return logits


def smooth(scores: Tensor, kernel_px: int) -> Tensor:
    """Blurs (h, w) as PEBAL and RPL do: the border is mirrored, sigma is a seventh of the kernel."""
    if kernel_px == 1:
        return scores
    # A mirrored border is less wide than the map.
    sides = [min(kernel_px, 2 * int(side) - 1) for side in (scores.shape[1], scores.shape[0])]
    blurred: Tensor = gaussian_blur(scores[None], sides, [kernel_px / 7.0, kernel_px / 7.0])
    return blurred[0]
