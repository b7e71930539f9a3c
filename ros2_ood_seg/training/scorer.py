"""Training of the compact scorer: hard-example BCE on pasted anomalies and semantic cross-entropy (``ood-seg train scorer``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES, MOBILENET_V2, OUTPUT_STRIDE, CompactNet, CompactOutput
from ros2_ood_seg.training.loop import TrainingLoop, file_stamp
from ros2_ood_seg.training.outlier_exposure import (
    IGNORE,
    Cutout,
    OutlierExposure,
    PasteSettings,
    RoadImage,
    RoadSample,
    is_held_out,
    read_camvid,
    read_cityscapes,
    read_coco,
    read_coco_panoptic,
    read_idd_lite,
    read_mask_folder,
    read_road_folder,
)
from ros2_ood_seg.training.scenes import Scene, read_scenes
from ros2_ood_seg.weights.store import load_into, load_weights, save_weights

MAY_CHANGE = ("iterations", "workers", "checkpoint_minutes", "bfloat16")
"""Settings that a resumed training of a scorer may change."""

_PANELS = (("total", "positive", "hard", "mean", "semantic", "uniform"), ("val_ap", "val_ap_hybrid", "val_miou"))
_Sample = TypeVar("_Sample")
_Batch = TypeVar("_Batch")
_VOC_NAME = re.compile(r"_200[78]_\d+$")
_DAVIS_ANIMALS = frozenset({"blackswan", "camel", "cows", "dog", "goat", "libby"})


@dataclass(frozen=True)
class ScorerData:
    """Folders to train from; an empty one is not used.

    Args:
        camvid: CamVid layout.
        idd_lite: IDD-Lite layout.
        cityscapes: Cityscapes layout.
        roads: Plain folders of road pictures in which nothing is anomalous.
        coco: COCO instances layout.
        coco_panoptic: COCO panoptic layout.
        objects: Folders of images and masks; pictures named after VOC or after people are left out, and DAVIS sequences with people.
        held_out: Share of ``roads`` pictures and of cut-outs kept for validation and calibration.
        scenes: Use the pictures of ``coco`` and ``coco_panoptic`` that were taken outside as they are, too, one source more of training.
        whole_pictures: COCO instances as S2M uses them, see :func:`~ros2_ood_seg.training.cutouts.read_coco`.
    """

    camvid: Path | None = None
    idd_lite: Path | None = None
    cityscapes: Path | None = None
    roads: Sequence[Path] = ()
    coco: Path | None = None
    coco_panoptic: Path | None = None
    objects: Sequence[Path] = ()
    held_out: float = 0.25
    scenes: bool = False
    whole_pictures: bool = False

    def read(self, *, held_out: bool) -> tuple[list[list[RoadImage]], list[Cutout]]:
        """The road images by source and the cut-outs of one side of the split.

        Raises:
            InputError: A data set is empty or laid out otherwise, or none is named.
        """
        split = "val" if held_out else "train"
        sources = []
        if self.camvid:
            sources.append(read_camvid(self.camvid, split))
        if self.idd_lite:
            sources.append(read_idd_lite(self.idd_lite, split))
        if self.cityscapes:
            sources.append(read_cityscapes(self.cityscapes, split))
        sources += [
            [road for road in read_road_folder(folder) if is_held_out(road.image.stem, self.held_out) == held_out] for folder in self.roads
        ]
        cutouts = read_coco(self.coco, whole_pictures=self.whole_pictures) if self.coco else []
        cutouts += read_coco_panoptic(self.coco_panoptic) if self.coco_panoptic else []
        for folder in self.objects:
            cutouts += read_mask_folder(folder, keep=_is_clean_anomaly if folder.name != "davis" else _DAVIS_ANIMALS.__contains__)
        for folder, source in zip(self.roads, sources[len(sources) - len(self.roads) :], strict=True):
            if not source:
                side = "to hold out" if held_out else "to learn from"
                raise InputError(f"'{folder}' has no pictures {side}, {self.held_out:.0%} are held out by name: give it more")
        if not sources:
            raise InputError("training needs at least one set of road images: --camvid, --idd-lite, --cityscapes or --roads")
        return sources, [c for c in cutouts if self._is_held_out(c.group) == held_out]

    def read_training(self) -> tuple[list[list[RoadImage | Scene]], list[Cutout]]:
        """The training side as :meth:`read` gives it, with the scenes as a last source.

        Raises:
            InputError: As :meth:`read`, or scenes without COCO.
        """
        roads, cutouts = self.read(held_out=False)
        sources: list[list[RoadImage | Scene]] = [list(source) for source in roads]
        if self.scenes:
            sources.append([scene for scene in read_scenes(self.coco, self.coco_panoptic) if not self._is_held_out(scene.group)])
        return sources, cutouts

    def _is_held_out(self, group: str) -> bool:
        return is_held_out(group, self.held_out * 0.6)


@dataclass(frozen=True)
class ScorerTraining:
    """The recipe.

    Args:
        encoder: Features that the network is built on, see :data:`~ros2_ood_seg.scorers.networks.compact.ENCODERS`.
        iterations: Steps in all; the learning rate falls along a cosine to 2 % at the end.
        batch_size: Samples per step.
        learning_rate: Of the decoder; the features take ``feature_rate`` of it.
        feature_rate: See ``learning_rate``.
        warm_up: Steps of linear warm-up.
        frozen_blocks: Feature blocks that stay as they are.
        ema: Decay of the averaged weights, which are what is saved.
        semantic_weight: Weight of the semantic cross-entropy.
        uniform_weight: Weight of the cross-entropy between the classes and the uniform distribution on anomalies (max-entropy training).
        bfloat16: Autocast of the forward pass.
        seed: Seed of weights and data.
        workers: Processes that make samples.
        checkpoint_minutes: Time between checkpoints.
        paste: How samples are made.
    """

    encoder: str = MOBILENET_V2
    iterations: int = 6000
    batch_size: int = 6
    learning_rate: float = 1e-3
    feature_rate: float = 0.1
    warm_up: int = 100
    frozen_blocks: int = 4
    ema: float = 0.999
    semantic_weight: float = 0.3
    uniform_weight: float = 0.05
    bfloat16: bool = False
    seed: int = 0
    workers: int = 1
    checkpoint_minutes: float = 3.0
    paste: PasteSettings = field(default_factory=PasteSettings)

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, allowed: a number above 0")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, allowed: 0 or more")


@dataclass(frozen=True)
class Batch:
    """Samples as tensors.

    Args:
        image: (B, 3, H, W) uint8.
        semantic: (B, H/4, W/4) int64 class, :data:`IGNORE` for unknown.
        anomaly: (B, H/4, W/4) float32 share of anomalous pixels.
        weight: (B, H/4, W/4) float32, the anomaly share times the instance's area to the power of -1/4: small objects count too.
        counted: (B, H/4, W/4) bool, False where some pixel is neither normal nor anomalous.
    """

    image: Tensor
    semantic: Tensor
    anomaly: Tensor
    weight: Tensor
    counted: Tensor


def collate(samples: Sequence[RoadSample]) -> Batch:
    """Stacks samples and takes the labels to the network's output resolution."""
    weights = []
    for sample in samples:
        area = np.bincount(sample.instances.ravel()).astype(np.float32)
        per_id = np.maximum(area, 16.0) ** -0.25
        per_id[0] = 0.0
        weights.append(torch.from_numpy(per_id[sample.instances]))
    anomaly = np.stack([s.anomaly for s in samples])
    half = OUTPUT_STRIDE // 2
    return Batch(
        image=torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2),
        semantic=torch.from_numpy(np.stack([s.semantic for s in samples])[:, half::OUTPUT_STRIDE, half::OUTPUT_STRIDE]).long(),
        anomaly=_shares(torch.from_numpy(anomaly == 1)),
        weight=_shares(torch.stack(weights)),
        counted=_shares(torch.from_numpy(anomaly == IGNORE)) == 0,
    )


def _shares(labels: Tensor) -> Tensor:
    """(B, H, W) to means over the network's output pixels."""
    return F.avg_pool2d(labels[:, None].float(), OUTPUT_STRIDE)[:, 0]


def scorer_loss(output: CompactOutput, batch: Batch, recipe: ScorerTraining) -> dict[str, Tensor]:
    """The terms of the loss and their sum ``total``.

    Anomaly: BCE averaged over anomalous pixels (0.5), over the hardest sixteenth of the others (0.4), and over all pixels (1).
    """
    logit, target = output.outlier_logit.float(), batch.anomaly
    bce = F.binary_cross_entropy_with_logits(logit, target, reduction="none") * batch.counted
    positive = (bce * batch.weight).sum() / batch.weight.sum().clamp_min(1e-6)
    normal = bce[target == 0]
    hard = normal.topk(max(1, normal.numel() // 16)).values.mean() if normal.numel() else bce.sum() * 0
    log_p = F.log_softmax(output.class_logits.float(), dim=1)
    known = F.nll_loss(log_p, batch.semantic, ignore_index=IGNORE, reduction="sum") / (batch.semantic != IGNORE).sum().clamp_min(1)
    uniform = (-log_p.mean(1) * batch.weight).sum() / batch.weight.sum().clamp_min(1e-6)
    total = 0.5 * positive + 0.4 * hard + bce.mean() + recipe.semantic_weight * known + recipe.uniform_weight * uniform
    return {"total": total, "positive": positive, "hard": hard, "mean": bce.mean(), "semantic": known, "uniform": uniform}


def train_scorer(
    data: ScorerData, recipe: ScorerTraining, output: Path, init: Path | None = None, device: torch.device | None = None
) -> Path:
    """Trains until ``recipe.iterations``, going on from the checkpoint in ``output`` when there is one.

    Args:
        data: What to train from.
        recipe: How.
        output: Folder for ``checkpoint.pt``, ``log.csv``, ``curve.png`` and ``scorer.safetensors`` (averaged weights, float32).
        init: torchvision ``mobilenet_v2`` features or a scorer of ours to start from; None for random weights.
        device: Where to train; CPU when None.

    Returns:
        The file with the averaged weights.

    Raises:
        InputError: Unusable data or weights, or a checkpoint of another recipe, before training starts.
    """
    device = device or torch.device("cpu")
    sources, cutouts = data.read_training()
    validation = _validation_batches(data, recipe)
    torch.manual_seed(recipe.seed)
    net = CompactNet(encoder=recipe.encoder)
    if init is not None:
        start_from(net, init)
    net = net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))  # type: ignore[no-untyped-call]
    features = [p for block in list(net.features)[recipe.frozen_blocks :] for p in block.parameters()]
    head = [p for name, p in net.named_parameters() if not name.startswith("features.")]
    optimizer = torch.optim.AdamW(
        [{"params": features, "lr": recipe.learning_rate * recipe.feature_rate}, {"params": head, "lr": recipe.learning_rate}],
        weight_decay=1e-4,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(recipe))
    loop = TrainingLoop(
        output,
        recipe,
        {"net": net, "average": average, "optimizer": optimizer, "schedule": schedule},
        title="train scorer",
        panels=_PANELS,
        may_change=MAY_CHANGE,
        checkpoint_minutes=recipe.checkpoint_minutes,
        origin={"init": file_stamp(init), "data": data_stamp(sources, cutouts)},
    )

    def step(batch: Batch) -> dict[str, Tensor]:
        image = batch.image.to(device, torch.float32).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            prediction = net(image, recipe.frozen_blocks)
        terms = scorer_loss(prediction, _to(batch, device), recipe)
        loop.descend(optimizer, terms["total"], clip_norm=5.0)
        schedule.step()
        average.update_parameters(net)
        return terms

    def at_checkpoint() -> dict[str, float]:
        quality = validate(cast(CompactNet, average.module), validation, device)
        metadata = {
            "encoder": recipe.encoder,
            "class_names": CLASS_NAMES,
            "recipe": asdict(recipe),
            "done": loop.done,
            "validation": quality,
        }
        save_weights(output / "scorer.safetensors", average.module.state_dict(), metadata, half=False)
        return quality

    dataset = OutlierExposure(sources, cutouts, recipe.paste, recipe.seed, recipe.iterations * recipe.batch_size)
    remaining = range(loop.done, recipe.iterations)
    loop.run(batches(dataset, collate, size=recipe.batch_size, iterations=remaining, workers=recipe.workers), step, at_checkpoint)
    return output / "scorer.safetensors"


def data_stamp(sources: Sequence[Sequence[object]], cutouts: Sequence[object]) -> str:
    """How much there is to learn from, which tells most data sets apart wherever they lie."""
    return f"{' + '.join(str(len(source)) for source in sources)} frames, {len(cutouts)} objects"


def start_from(net: CompactNet, path: Path) -> None:
    """Loads ImageNet features, or all weights of an earlier scorer."""
    weights = load_weights(path)
    if any(key.startswith("outlier_head.") for key in weights.state):
        load_into(net, weights, "compact scorer")
    else:
        net.load_imagenet_features(weights)


@torch.no_grad()
def validate(net: CompactNet, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    """Pixel AP of both outlier scores on held-out pastes, and mIoU of the classes, at the network's resolution."""
    outlier, hybrid, target = [], [], []
    confusion = torch.zeros(len(CLASS_NAMES), len(CLASS_NAMES), dtype=torch.int64)
    for batch in batches:
        result = net(batch.image.to(device, torch.float32).contiguous(memory_format=torch.channels_last))
        counted = ((batch.anomaly == 0) | (batch.anomaly > 0.5)) & batch.counted
        outlier.append(result.outlier_logit.cpu()[counted])
        hybrid.append((result.outlier_logit - result.class_logits.logsumexp(1)).cpu()[counted])
        target.append(batch.anomaly[counted] > 0.5)
        known = batch.semantic != IGNORE
        pair = batch.semantic[known] * len(CLASS_NAMES) + result.class_logits.cpu().argmax(1)[known]
        confusion += torch.bincount(pair, minlength=confusion.numel()).view_as(confusion)
    labels = torch.cat(target).numpy()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return {
        "val_ap": average_precision(torch.cat(outlier).numpy(), labels),
        "val_ap_hybrid": average_precision(torch.cat(hybrid).numpy(), labels),
        "val_miou": float((confusion.diag()[union > 0] / union[union > 0]).mean()),
    }


def average_precision(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> float:
    """Step-sum average precision of pooled pixels; tied scores count as one threshold."""
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.r_[np.flatnonzero(np.diff(scores[order])), len(order) - 1]
    hits = np.cumsum(labels[order])[last_of_ties]
    return float((np.diff(hits, prepend=0) * hits / (last_of_ties + 1)).sum() / max(1, hits[-1]))


def _rate(recipe: ScorerTraining) -> Callable[[int], float]:
    def rate(step: int) -> float:
        if step < recipe.warm_up:
            return (step + 1) / recipe.warm_up
        progress = (step - recipe.warm_up) / max(1, recipe.iterations - recipe.warm_up)
        return float(0.02 + 0.98 * 0.5 * (1.0 + np.cos(np.pi * min(1.0, progress))))

    return rate


def batches(
    dataset: Dataset[_Sample],
    collate_fn: Callable[[list[_Sample]], _Batch],
    *,
    size: int,
    iterations: range,
    workers: int,
) -> Iterator[_Batch]:
    """The batches of some iterations of a training.

    Args:
        dataset: Sample ``k`` is always the same.
        collate_fn: Makes a batch of samples.
        size: Samples in a batch.
        iterations: Those still to do.
        workers: Processes that make samples.

    Raises:
        InputError: A file that cannot be used, in one line.
    """
    loader = DataLoader(
        dataset,
        batch_size=size,
        sampler=range(iterations.start * size, iterations.stop * size),
        num_workers=workers,
        collate_fn=collate_fn,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if workers else None,
    )
    try:
        yield from loader
    except InputError as error:
        # From a worker it comes as text with the worker's traceback, whose last line is the message.
        *_, message = str(error).strip().splitlines()
        raise InputError(message.split("InputError: ", 1)[-1]) from error


def _one_thread(_worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _validation_batches(data: ScorerData, recipe: ScorerTraining, count: int = 48) -> list[Batch]:
    roads, cutouts = data.read(held_out=True)
    dataset = OutlierExposure(roads, cutouts, recipe.paste, recipe.seed + 1, count)
    return [collate([dataset[k + j] for j in range(min(6, count - k))]) for k in range(0, count, 6)]


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.image, batch.semantic.to(device), batch.anomaly.to(device), batch.weight.to(device), batch.counted.to(device))


def _is_clean_anomaly(name: str) -> bool:
    return not _VOC_NAME.search(name) and not name.startswith("person")
