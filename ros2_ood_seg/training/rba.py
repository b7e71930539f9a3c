"""Fine-tuning of Mask2Former so that pasted objects are rejected by all classes (RbA, Nayal et al., ICCV 2023, section 3.3).

The squared hinge on the RbA score, and beside it the losses Mask2Former itself is trained with. Constants are those of the release
(NazirNayal8/RbA, ``ckpts/swin_b_1dl_rba_ood_coco/config.yaml`` and ``mask2former/modeling/criterion.py``), where the smoothness and
sparsity terms are switched off; UGainS differs in what it trains and for how long (its section 4).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.mask2former import RBA, load_checkpoint, mask_scores
from ros2_ood_seg.scorers.networks.deeplab import normalise_imagenet, upsample_aligned
from ros2_ood_seg.scorers.networks.mask2former import SIZE_DIVISIBILITY, Mask2Former, Mask2FormerOutput
from ros2_ood_seg.training.exposure_batches import ExposureBatch, ExposureData, collate
from ros2_ood_seg.training.loop import TrainingLoop, file_stamp
from ros2_ood_seg.training.outlier_exposure import PasteSettings
from ros2_ood_seg.training.outlier_losses import OUTLIER, VOID, Terms
from ros2_ood_seg.training.scorer import MAY_CHANGE, ScorerData, average_precision, batches, data_stamp
from ros2_ood_seg.weights.store import find_weights, save_weights

LAYERS: Mapping[str, tuple[str, ...]] = {
    "heads": ("sem_seg_head.predictor.class_embed.", "sem_seg_head.predictor.mask_embed."),
    "decoder": ("sem_seg_head.predictor.",),
    "all": ("",),
}
"""What is trained, by the beginnings of the parameters' names: RbA's own choice, UGainS's, or the whole network."""

PASTING = replace(
    PasteSettings.published(),
    crop_hw=(512, 1024),
    frame_width_px=(1024.0, 4096.0),
    object_scales=(1.0,),
    known_per_image=(0, 0),
    augment=True,
)
"""As released: one object of its own size with a hard edge, anywhere; frames at half to twice the width of Cityscapes."""

SegmentationLoss = Callable[[Mask2FormerOutput, Tensor], Tensor]
"""Takes the network's output and the (B, H, W) targets; a scalar."""


@dataclass(frozen=True)
class RbaTraining:
    """The recipe; by default UGainS's.

    Args:
        iterations: Steps in all.
        batch_size: Samples per step.
        learning_rate: Of AdamW.
        backbone_rate: Factor of the rate for the backbone, if it is trained.
        weight_decay: Of weights; norms, embeddings and biases of relative positions have none.
        poly_power: The rate falls as ``(1 - done / iterations) ** poly_power``.
        clip_norm: The gradient's norm is clipped to this, 0 for never.
        layers: What is trained, a key of :data:`LAYERS`.
        bounded: Each class passes ``tanh`` before the sum, as in the release.
        inlier_max: Normal pixels that score higher are punished. Scores are never above 0, so the released 0 punishes none.
        outlier_min: Anomalous pixels that score lower are punished.
        outlier_weight: Weight of the hinge.
        segmentation_weight: Weight of Mask2Former's own losses; with 0 no labels are needed.
        outlier_share: Share of samples with pasted outliers.
        points: Points at which masks are compared.
        bfloat16: Autocast of the backbone.
        seed: Seed of the data and of the points.
        workers: Processes that make samples.
        checkpoint_minutes: Time between checkpoints.
        paste: How samples are made.
    """

    iterations: int = 5000
    batch_size: int = 16
    learning_rate: float = 1e-4
    backbone_rate: float = 0.1
    weight_decay: float = 0.05
    poly_power: float = 0.9
    clip_norm: float = 0.01
    layers: str = "decoder"
    bounded: bool = True
    inlier_max: float = 0.0
    outlier_min: float = 5.0
    outlier_weight: float = 1.0
    segmentation_weight: float = 1.0
    outlier_share: float = 0.1
    points: int = 12_544
    bfloat16: bool = False
    seed: int = 0
    workers: int = 1
    checkpoint_minutes: float = 5.0
    paste: PasteSettings = field(default_factory=lambda: PASTING)

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "learning_rate", "points"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, allowed: a number above 0")
        for name in ("backbone_rate", "weight_decay", "clip_norm", "outlier_weight", "segmentation_weight", "seed", "workers"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}, allowed: a number from 0")
        if not 0.0 <= self.outlier_share <= 1.0:
            raise InputError(f"outlier_share is {self.outlier_share}, allowed: a number from 0 to 1")
        if self.layers not in LAYERS:
            raise InputError(f"layers is '{self.layers}', allowed: {', '.join(LAYERS)}")
        if any(side % SIZE_DIVISIBILITY for side in self.paste.crop_hw):
            raise InputError(f"crops are {self.paste.crop_hw[0]} {self.paste.crop_hw[1]} px, allowed: multiples of {SIZE_DIVISIBILITY}")


PRESETS: Mapping[str, RbaTraining] = {"ugains": RbaTraining(), "rba": RbaTraining(iterations=2000, layers="heads")}
"""The published recipes."""


def rba_scores(class_logits: Tensor, mask_logits: Tensor, bounded: bool) -> Tensor:
    """The RbA score of a batch, differentiable; :func:`ros2_ood_seg.scorers.mask2former.mask_scores` is its counterpart for inference.

    Args:
        class_logits: (B, N, K + 1) float.
        mask_logits: (B, N, h, w) float.
        bounded: Each class passes ``tanh``.

    Returns:
        (B, h, w) float, at most 0.
    """
    posterior = class_logits.softmax(dim=2)[..., :-1]
    classes = torch.einsum("bqc,bqhw->bchw", posterior, mask_logits.sigmoid())
    return -(classes.tanh() if bounded else classes).sum(dim=1)


def hinge_loss(scores: Tensor, target: Tensor, inlier_max: float, outlier_min: float) -> Tensor:
    """The squared hinge as released: the mean over normal pixels, or half the sum of the means over normal and anomalous ones.

    Args:
        scores: (B, h, w) float; brought to the size of the targets first.
        target: (B, H, W) int64, class, :data:`OUTLIER` or :data:`VOID`.
        inlier_max: Normal pixels pay ``max(0, score - inlier_max) ** 2``.
        outlier_min: Anomalous pixels pay ``max(0, outlier_min - score) ** 2``.
    """
    scores = upsample_aligned(scores[:, None], (int(target.shape[1]), int(target.shape[2])))[:, 0]
    outlier = target == OUTLIER
    normal = ~outlier & (target != VOID)
    loss = _mean(F.relu(scores - inlier_max).square(), normal)
    if outlier.any():
        loss = 0.5 * (loss + _mean(F.relu(outlier_min - scores).square(), outlier))
    return loss


def segmentation_loss(classes: int, points: int) -> SegmentationLoss:
    """Mask2Former's own losses, from transformers: class 2, mask 5, dice 5, "no object" counting a tenth, with deep supervision.

    Args:
        classes: In-distribution classes.
        points: Points at which masks are compared.

    Raises:
        InputError: The package transformers is not installed.
    """
    try:
        published = importlib.import_module("transformers.models.mask2former.modeling_mask2former").Mask2FormerLoss
        config = importlib.import_module("transformers").Mask2FormerConfig(num_labels=classes, train_num_points=points)
    except ImportError as error:
        raise InputError(
            "training with a segmentation loss needs the Python package 'transformers': pip install transformers, "
            "or set --segmentation-weight 0"
        ) from error
    weights = {"loss_cross_entropy": config.class_weight, "loss_mask": config.mask_weight, "loss_dice": config.dice_weight}
    criterion: nn.Module = published(config, weights)

    def loss(output: Mask2FormerOutput, target: Tensor) -> Tensor:
        present = [image.unique() for image in target]
        labels = [ids[ids < classes] for ids in present]
        rows = [k for k, ids in enumerate(labels) if len(ids)]
        if not rows:
            return output.class_logits.sum() * 0.0
        masks = [(target[k] == labels[k][:, None, None]).float() for k in rows]
        auxiliary = [
            {"class_queries_logits": class_logits[rows], "masks_queries_logits": mask_logits[rows]}
            for class_logits, mask_logits in output.auxiliary
        ]
        criterion.to(target.device)
        terms: Mapping[str, Tensor] = criterion(
            output.mask_logits[rows], output.class_logits[rows], masks, [labels[k] for k in rows], auxiliary
        )
        return torch.stack([weight * terms[key] for key in terms for name, weight in weights.items() if key.startswith(name)]).sum()

    return loss


def rba_loss(output: Mask2FormerOutput, target: Tensor, recipe: RbaTraining, segmentation: SegmentationLoss | None) -> Terms:
    """All terms and their weighted sum ``total``; the hinge also applies to the predictions before each decoder layer, as released.

    Args:
        output: Of the network in training mode.
        target: (B, H, W) int64.
        recipe: Weights and thresholds.
        segmentation: See :func:`segmentation_loss`, or None for the hinge alone.
    """
    predictions = [(output.class_logits, output.mask_logits), *output.auxiliary]
    hinges = [
        hinge_loss(rba_scores(class_logits, mask_logits, recipe.bounded), target, recipe.inlier_max, recipe.outlier_min)
        for class_logits, mask_logits in predictions
    ]
    outlier = torch.stack(hinges).sum()
    masks = outlier.new_zeros(()) if segmentation is None else segmentation(output, target)
    return {"total": recipe.outlier_weight * outlier + recipe.segmentation_weight * masks, "outlier": outlier, "segmentation": masks}


def train_rba(data: ScorerData, recipe: RbaTraining, output: Path, init: Path, device: torch.device | None = None) -> Path:
    """Trains until ``recipe.iterations``, going on from the checkpoint in ``output`` when there is one.

    Args:
        data: What to train from.
        recipe: How.
        output: Folder for checkpoint, ``log.csv``, ``curve.png`` and ``rba.safetensors``.
        init: Mask2Former in the layout of RbA or UGainS.
        device: Where to train; CPU when None.

    Returns:
        The weights file, in RbA's layout, for the scorer ``rba``.

    Raises:
        InputError: Unusable data or weights, or a checkpoint of another recipe or network, before training starts.
    """
    device = device or torch.device("cpu")
    loaded = load_checkpoint(ScorerConfig(name="rba", weights=str(init)), Runtime(device))
    network, classes = cast("Mask2Former", loaded.run), loaded.outputs - 1
    needs_labels = recipe.segmentation_weight > 0
    segmentation = segmentation_loss(classes, recipe.points) if needs_labels else None
    exposure = ExposureData.read(data, classes, needs_labels)
    validation = exposure.validation(recipe.paste, recipe.seed + 1)
    optimizer = torch.optim.AdamW(_groups(network, recipe), recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1.0 - min(1.0, done / recipe.iterations)) ** recipe.poly_power)
    loop = TrainingLoop(
        output,
        recipe,
        {"net": network, "optimizer": optimizer, "schedule": schedule},
        title=f"train rba ({recipe.layers})",
        panels=(("total", "outlier", "segmentation"), ("val_ap", "val_accuracy")),
        may_change=MAY_CHANGE,
        checkpoint_minutes=recipe.checkpoint_minutes,
        origin={"init": file_stamp(find_weights(str(init))), "data": data_stamp(*exposure.train)},
    )
    _training_mode(network, recipe)

    def step(batch: ExposureBatch) -> Terms:
        # The points at which masks are compared depend on the iteration alone, so that a resumed run equals an uninterrupted one.
        torch.manual_seed((recipe.seed << 32) + loop.done)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            prediction = network(normalise_imagenet(batch.images()))
        terms = rba_loss(prediction, batch.target, recipe, segmentation)
        loop.descend(optimizer, terms["total"], recipe.clip_norm)
        schedule.step()
        return terms

    weights = output / "rba.safetensors"

    def at_checkpoint() -> dict[str, float]:
        quality = validate(network, validation, device)
        metadata = {"class_names": exposure.class_names, "recipe": asdict(recipe), "done": loop.done, "validation": quality}
        save_weights(weights, network.state_dict(), {**metadata, "start": init.name}, half=False)
        _training_mode(network, recipe)
        return quality

    if loop.done == 0:
        quality = validate(network, validation, device)
        print("before training: " + ", ".join(f"{name} {value:.4f}" for name, value in quality.items()))
        _training_mode(network, recipe)
    dataset = exposure.samples(recipe.paste, recipe.seed, recipe.iterations * recipe.batch_size, recipe.outlier_share, pictures=False)
    remaining = range(loop.done, recipe.iterations)
    loop.run(batches(dataset, collate, size=recipe.batch_size, iterations=remaining, workers=recipe.workers), step, at_checkpoint)
    return weights


@torch.no_grad()
def validate(network: Mask2Former, validation: Sequence[ExposureBatch], device: torch.device) -> dict[str, float]:
    """Pixel AP of the score as the scorer computes it, on held-out pastes, and the share of known pixels with the right class.

    Every fourth pixel in each direction counts.
    """
    network.eval()
    scores, outliers, right = [], [], []
    for batch in validation:
        output = network(normalise_imagenet(batch.image.to(device, torch.float32)))
        target = batch.target[:, 2::4, 2::4]
        size_hw = (int(batch.target.shape[1]), int(batch.target.shape[2]))
        raw = [mask_scores(RBA, *logits, size_hw) for logits in zip(output.class_logits, output.mask_logits, strict=True)]
        score = torch.stack([result.scores for result in raw])[:, 2::4, 2::4].cpu()
        predicted = torch.stack([result.classes for result in raw])[:, 2::4, 2::4].cpu()
        counted = target != VOID
        known = counted & (target != OUTLIER)
        scores.append(score[counted])
        outliers.append(target[counted] == OUTLIER)
        right.append(predicted[known] == target[known])
    ap = average_precision(torch.cat(scores).numpy(), torch.cat(outliers).numpy())
    return {"val_ap": ap, "val_accuracy": float(torch.cat(right).float().mean())}


def _training_mode(network: Mask2Former, recipe: RbaTraining) -> None:
    """What is frozen behaves as in inference; the transformer decoder always gives its predictions before each layer."""
    network.train(recipe.layers == "all")
    network.sem_seg_head["predictor"].train()


def _groups(network: Mask2Former, recipe: RbaTraining) -> list[dict[str, object]]:
    """Parameters by rate and decay; those that are not trained are frozen."""
    undecayed = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(LAYERS[recipe.layers]))
        if not parameter.requires_grad:
            continue
        rate = recipe.learning_rate * (recipe.backbone_rate if name.startswith("backbone.") else 1.0)
        decayed = id(parameter) not in undecayed and not name.endswith("relative_position_bias_table")
        groups.setdefault((rate, recipe.weight_decay if decayed else 0.0), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return values[where].mean() if where.any() else values.sum() * 0.0
