"""Scorers on Mask2Former: RbA (UGainS's scorer), EAM, UNO and Mask2Anomaly.

With class posteriors ``p[q, c]`` (softmax over K classes and "no object") and mask probabilities ``m[q]`` (sigmoid) of N queries:

================  =============================================================  ================================================
scorer            score per pixel                                                reference
================  =============================================================  ================================================
``rba``           ``-sum_c sum_q p[q, c] m[q]``                                  Nayal et al., ICCV 2023, as UGainS computes it
``rba``           ``-sum_c tanh(sum_q p[q, c] m[q])`` (score ``rba_tanh``)       the same, as its own code computes it
``eam``           ``1 - sum_q max_c p[q, c] m[q]``                               Grcić et al., CVPRW 2023
``uno``           ``-sum_q (max_c p[q, c] - p[q, negative]) m[q]``               Delić et al., BMVC 2024
``mask2anomaly``  ``1 - max_c sum_q p[q, c] m[q]``, mean with the mirror image   Rai et al., ICCV 2023, without its refinement
================  =============================================================  ================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.network import CITYSCAPES_CLASSES, NetworkScorer, RawScores, finite, only_default_score, read_checkpoint, ready
from ros2_ood_seg.scorers.networks.deeplab import normalise_imagenet
from ros2_ood_seg.scorers.networks.mask2former import SIZE_DIVISIBILITY, Mask2Former, Mask2FormerOutput
from ros2_ood_seg.scorers.transformers_folder import find_folder, load_folder
from ros2_ood_seg.weights.store import WEIGHTS_NAME, WeightFile

_QUERIES_AT_ONCE = 16
_UNO_OUTPUTS = len(CITYSCAPES_CLASSES) + 2
_FAMILIES = ("mask2former", "mask2former_ugains", "uno", "mask2anomaly")
_UNUSED = ("criterion.", "flow.", *(f"sem_seg_head.predictor.transformer_cross_attention_layers.{k}.fusion_layer." for k in range(16)))
"""Beginnings of the names of what released files hold and the network does not use: the loss's, UNO's generator of negatives, and a layer
of Mask2Anomaly."""

_UGAINS_NAMES = {"backbone.": "backbone.", "pixel_decoder.": "sem_seg_head.pixel_decoder.", "sem_seg_head.": "sem_seg_head.predictor."}

Network = Callable[[Tensor], Mask2FormerOutput]
"""Takes (1, 3, h, w) normalised float RGB, h and w multiples of 32."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network ready to run.

    Args:
        run: The network.
        outputs: Class outputs per query, "no object" included.
        path: The weights file; calibrations lie beside it.
    """

    run: Network
    outputs: int
    path: Path


@dataclass(frozen=True)
class MaskScore:
    """One scoring rule.

    Args:
        name: Part of the calibration's key.
        scores: Class masses (K, h, w) and the sum of weighted masks (h, w) to scores (h, w).
        weights: Class posteriors (N, outputs) to the weight of each query's mask (N,).
        others: Outputs behind the K in-distribution classes.
        mirrored: The score is the mean with that of the mirror image.
    """

    name: str
    scores: Callable[[Tensor, Tensor], Tensor]
    weights: Callable[[Tensor], Tensor] = lambda posterior: posterior[:, :-1].amax(dim=1)
    others: int = 1
    mirrored: bool = False


RBA = MaskScore("rba", lambda classes, weighted: -classes.sum(dim=0))
RBA_TANH = MaskScore("rba_tanh", lambda classes, weighted: -classes.tanh().sum(dim=0))
EAM = MaskScore("eam", lambda classes, weighted: 1.0 - weighted)
UNO = MaskScore("uno", lambda classes, weighted: -weighted, lambda posterior: posterior[:, :-2].amax(dim=1) - posterior[:, -2], others=2)
MASK2ANOMALY = MaskScore("mask2anomaly", lambda classes, weighted: 1.0 - classes.amax(dim=0), mirrored=True)


def build_rba(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``rba``: rejected by all classes; ``scorer.score`` ``rba_tanh`` bounds each class first.

    Raises:
        InputError: Another score, or transformers is needed and not installed.
        WeightsError: Missing, damaged, or of another network.
    """
    if config.score not in ("default", "rba_tanh"):
        raise InputError(f"scorer.score is '{config.score}' but scorer '{config.name}' has no such output: use default, rba_tanh")
    return _build(config, runtime, RBA_TANH if config.score == "rba_tanh" else RBA)


def build_eam(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``eam``: no confident mask covers the pixel; errors as in :func:`build_rba`."""
    only_default_score(config)
    return _build(config, runtime, EAM)


def build_uno(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``uno``: the same, and masks may be of the negative class; errors as in :func:`build_rba`."""
    only_default_score(config)
    return _build(config, runtime, UNO)


def build_mask2anomaly(config: ScorerConfig, runtime: Runtime) -> NetworkScorer:
    """``mask2anomaly``: no class claims the pixel; errors as in :func:`build_rba`."""
    only_default_score(config)
    return _build(config, runtime, MASK2ANOMALY)


def mask_scores(rule: MaskScore, class_logits: Tensor, mask_logits: Tensor, size_hw: tuple[int, int]) -> RawScores:
    """Anomaly scores and in-distribution classes from what Mask2Former predicts for one image.

    Mask logits are upsampled before the sigmoid, as the methods' codes do, a few queries at a time: full-size masks of all queries
    would take gigabytes.

    Args:
        rule: What to compute.
        class_logits: (N, outputs) float.
        mask_logits: (N, h, w) float.
        size_hw: Size of the result in px; the masks cover it and the padding up to multiples of 32.

    Returns:
        (H, W) float32 scores and int64 classes.
    """
    posterior = class_logits.float().softmax(dim=1)
    weights = torch.cat([posterior[:, : -rule.others], rule.weights(posterior)[:, None]], dim=1).T
    height, width = size_hw
    padded = (height + -height % SIZE_DIVISIBILITY, width + -width % SIZE_DIVISIBILITY)
    total = weights.new_zeros((len(weights), height * width))
    for start in range(0, len(mask_logits), _QUERIES_AT_ONCE):
        some = slice(start, start + _QUERIES_AT_ONCE)
        masks = F.interpolate(mask_logits[None, some].float(), size=padded, mode="bilinear", align_corners=False)[0, :, :height, :width]
        total.addmm_(weights[:, some], masks.sigmoid().flatten(1))
    classes = total[:-1].view(-1, height, width)
    return RawScores(rule.scores(classes, total[-1].view(height, width)), classes.argmax(dim=0))


def _build(config: ScorerConfig, runtime: Runtime, rule: MaskScore) -> NetworkScorer:
    folder = find_folder(config.weights or config.name, runtime)
    network = load_checkpoint(config, runtime) if folder is None else _from_folder(folder, config, runtime)
    if (network.outputs == _UNO_OUTPUTS) != (rule is UNO) and network.outputs in (_UNO_OUTPUTS, _UNO_OUTPUTS - 1):
        raise WeightsError(
            f"weights '{network.path}' have {network.outputs} outputs per query, scorer '{config.name}' needs "
            f"{_UNO_OUTPUTS if rule is UNO else _UNO_OUTPUTS - 1}: only weights of UNO have a negative class"
        )

    def scored(image: Tensor, size_hw: tuple[int, int]) -> RawScores:
        with runtime.autocast():
            output = network.run(image)
        return mask_scores(rule, finite(output.class_logits, config.name)[0], finite(output.mask_logits, config.name)[0], size_hw)

    def method(image: Tensor) -> RawScores:
        size_hw = (int(image.shape[2]), int(image.shape[3]))
        image = normalise_imagenet(image)
        raw = scored(_padded(image), size_hw)
        if not rule.mirrored:
            return raw
        mirrored = scored(_padded(image.flip(3)), size_hw)
        return RawScores((raw.scores + mirrored.scores.flip(1)) / 2, raw.classes)

    names = CITYSCAPES_CLASSES if network.outputs - rule.others == len(CITYSCAPES_CLASSES) else ()
    return NetworkScorer(method, rule.name, network.path, names, config)


def _padded(image: Tensor) -> Tensor:
    return F.pad(image, (0, -image.shape[3] % SIZE_DIVISIBILITY, 0, -image.shape[2] % SIZE_DIVISIBILITY))


def load_checkpoint(config: ScorerConfig, runtime: Runtime) -> LoadedNetwork:
    """The released layouts: detectron2 (RbA, EAM, UNO, Mask2Anomaly), and UGainS with names of its own.

    Raises:
        WeightsError: Missing, damaged, or of another network.
    """
    weights = read_checkpoint(config, runtime, config.name, _FAMILIES, unused=_UNUSED)
    if any(key.startswith("pixel_decoder.") for key in weights.state):
        # Lightning keeps losses and metrics beside the network.
        state = {
            new + key[len(old) :]: value
            for key, value in weights.state.items()
            for old, new in _UGAINS_NAMES.items()
            if key.startswith(old)
        }
        weights = WeightFile(weights.path, state, weights.metadata)
    network = ready(Mask2Former.like, weights, "mask2former", runtime)
    return LoadedNetwork(network, int(weights.state["sem_seg_head.predictor.class_embed.weight"].shape[0]), weights.path)


def _from_folder(folder: Path, config: ScorerConfig, runtime: Runtime) -> LoadedNetwork:
    model = load_folder(folder, "Mask2FormerForUniversalSegmentation", config.name, runtime)

    def run(image: Tensor) -> Mask2FormerOutput:
        output = model(pixel_values=image)
        return Mask2FormerOutput(output.class_queries_logits, output.masks_queries_logits)

    return LoadedNetwork(run, int(model.config.num_labels) + 1, folder / WEIGHTS_NAME)
