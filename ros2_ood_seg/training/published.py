"""Training of the published scorers by outlier exposure: Max-Entropy, PEBAL, RPL+CoroCL and DenseHybrid on DeepLabV3+.

Each method starts from a segmentation network and gives weights that the scorer of the same name loads. ``segmentation`` makes such a
network. Constants are those of the official releases, named at :data:`METHODS`; :mod:`outlier_losses` holds the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import functions
from ros2_ood_seg.scorers.deeplab import PLAIN_FAMILIES, like
from ros2_ood_seg.scorers.network import ready
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES
from ros2_ood_seg.scorers.networks.deeplab import upsample_aligned
from ros2_ood_seg.scorers.networks.deeplab_anomaly import AnomalyDeepLab, DeepLabOutput
from ros2_ood_seg.scorers.networks.deeplab_mobilenet_v2 import DeepLabMobileNetV2
from ros2_ood_seg.training import outlier_losses as losses
from ros2_ood_seg.training.exposure_batches import ExposureBatch, ExposureData, collate
from ros2_ood_seg.training.loop import TrainingLoop, file_stamp
from ros2_ood_seg.training.outlier_exposure import PasteSettings
from ros2_ood_seg.training.scorer import MAY_CHANGE, ScorerData, average_precision, batches, data_stamp
from ros2_ood_seg.weights.families import recognise, without_prefixes
from ros2_ood_seg.weights.store import WeightFile, load_weights, save_weights


@dataclass(frozen=True)
class PublishedTraining:
    """The recipe of a published method.

    Args:
        method: Its name in :data:`METHODS`.
        iterations: Steps in all.
        batch_size: Samples per step.
        learning_rate: Of Adam.
        poly_power: The rate falls as ``(1 - done / iterations) ** poly_power``; 0 keeps it.
        outlier_share: Share of samples with pasted outliers.
        bfloat16: Autocast of the forward pass.
        seed: Seed of new weights and data.
        workers: Processes that make samples.
        checkpoint_minutes: Time between checkpoints.
        paste: How samples are made.
    """

    method: str = "rpl"
    iterations: int = 14_840
    batch_size: int = 8
    learning_rate: float = 7.5e-5
    poly_power: float = 0.9
    outlier_share: float = 1.0
    bfloat16: bool = False
    seed: int = 0
    workers: int = 1
    checkpoint_minutes: float = 5.0
    paste: PasteSettings = field(default_factory=PasteSettings)

    def __post_init__(self) -> None:
        for name in ("iterations", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, allowed: a number above 0")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, allowed: 0 or more")
        if self.batch_size < 2:
            raise InputError(f"batch_size is {self.batch_size}, allowed: 2 or more, which the batch norms need")
        if not 0.0 <= self.outlier_share <= 1.0:
            raise InputError(f"outlier_share is {self.outlier_share}, allowed: a number from 0 to 1")


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        scorer: The scorer that the weights are for; empty for the plain one of the network.
        recipe: As published, except for how objects are pasted.
        loss: Terms from the network's outputs for a batch, and their sum ``total``.
        terms: Names of the terms.
        score: Anomaly score (B, h, w) from the network's outputs.
        parts: What the method adds to the network, see :class:`AnomalyDeepLab`.
        abstention: Whether it adds an output that stands for no class.
        trains: Beginnings of the names of what is trained; the rest keeps its values.
        rates: Beginnings of names with factors of the learning rate.
        evaluates_rest: Whether the norms of what is not trained stay as they are.
        needs_labels: Whether it learns from class labels.
        pictures: Whether a batch also has the pictures that objects come from.
        adam_eps: Of Adam.
    """

    scorer: str
    recipe: PublishedTraining
    loss: Callable[[DeepLabOutput, ExposureBatch], losses.Terms]
    terms: tuple[str, ...]
    score: Callable[[DeepLabOutput], Tensor]
    parts: Mapping[str, bool] = field(default_factory=dict)
    abstention: bool = False
    trains: tuple[str, ...] = ("",)
    rates: tuple[tuple[str, float], ...] = ()
    evaluates_rest: bool = False
    needs_labels: bool = True
    pictures: bool = False
    adam_eps: float = 1e-8


def _at_labels(logits: Tensor, target: Tensor) -> Tensor:
    return upsample_aligned(logits.float(), target.shape[-2:])


def _segmentation(output: DeepLabOutput, batch: ExposureBatch) -> losses.Terms:
    return losses.segmentation_loss(_at_labels(output.logits, batch.target), batch.target)


def _max_entropy(output: DeepLabOutput, batch: ExposureBatch) -> losses.Terms:
    return losses.max_entropy_loss(_at_labels(output.logits, batch.target), batch.target)


def _pebal(output: DeepLabOutput, batch: ExposureBatch) -> losses.Terms:
    return losses.pebal_loss(_at_labels(output.logits, batch.target), batch.target)


def _dense_hybrid(output: DeepLabOutput, batch: ExposureBatch) -> losses.Terms:
    assert output.ood_logits is not None
    return losses.dense_hybrid_loss(_at_labels(output.logits, batch.target), _at_labels(output.ood_logits, batch.target), batch.target)


def _rpl(output: DeepLabOutput, batch: ExposureBatch) -> losses.Terms:
    assert output.residual_logits is not None
    assert output.projection is not None
    count = len(batch.target)
    residual, untouched = (_at_labels(x[:count], batch.target) for x in (output.residual_logits, output.logits))
    terms = losses.rpl_loss(residual, untouched, batch.target)
    exposed = (batch.target == losses.OUTLIER).any(dim=(1, 2))
    road, picture = torch.split(output.projection.float(), [count, len(batch.picture)])
    contrast = losses.contrastive_loss(road[exposed], batch.target[exposed], picture[exposed], batch.picture_target[exposed])
    return {**terms, "total": terms["total"] + contrast, "contrast": contrast}


def _residual_energy(output: DeepLabOutput) -> Tensor:
    assert output.residual_logits is not None
    return functions.energy(output.residual_logits)


def _hybrid(output: DeepLabOutput) -> Tensor:
    assert output.ood_logits is not None
    return functions.hybrid(output.logits, output.ood_logits.log_softmax(dim=1)[:, 1])


METHODS: Mapping[str, Method] = {
    "segmentation": Method(
        scorer="",
        recipe=PublishedTraining("segmentation", 3000, 8, 1e-3, 0.9, 0.0, paste=PasteSettings(crop_hw=(288, 480), known_per_image=(0, 0))),
        loss=_segmentation,
        terms=("segmentation",),
        score=lambda output: functions.entropy(output.logits),
        rates=(("features.", 0.1), ("mod", 0.1)),
    ),
    # yyliu01/RPL@1a327d5 rpl_corocl.code: 40 epochs of 371 steps, residual block only, its last convolution at ten times the rate.
    "rpl": Method(
        scorer="rpl",
        recipe=PublishedTraining("rpl", paste=PasteSettings(crop_hw=(700, 700), known_per_image=(0, 0))),
        loss=_rpl,
        terms=("imitation", "entropy", "energy", "contrast"),
        score=_residual_energy,
        parts={"residual": True, "projection": True},
        trains=("residual_block.",),
        rates=(("residual_block.atten_aspp_final.", 10.0),),
        evaluates_rest=True,
        needs_labels=False,
        pictures=True,
    ),
    # tianyu0207/PEBAL@0293bee: 40 epochs, the decoder's last convolutions only; one outlier picture for ten road images.
    "pebal": Method(
        scorer="pebal",
        recipe=PublishedTraining("pebal", learning_rate=1e-5, outlier_share=1 / 11, paste=PasteSettings(crop_hw=(900, 900))),
        loss=_pebal,
        terms=("abstention", "energy", "sparsity", "smoothness"),
        score=lambda output: functions.energy(output.logits[:, :-1]),
        abstention=True,
        trains=("final.",),
    ),
    # robin-chan/meta-ood@8657a5e: the published weights are those of epoch 4.
    "max_entropy": Method(
        scorer="max_entropy",
        recipe=PublishedTraining("max_entropy", 1636, 8, 1e-5, 0.0, 1 / 11, paste=PasteSettings(crop_hw=(480, 480))),
        loss=_max_entropy,
        terms=("segmentation", "uniform"),
        score=lambda output: functions.entropy(output.logits),
    ),
    # matejgrcic/DenseHybrid@742ceab: 10 epochs of 248 steps.
    "dense_hybrid": Method(
        scorer="dense_hybrid",
        recipe=PublishedTraining("dense_hybrid", 2480, 12, 1e-6, 0.0, 1.0, paste=PasteSettings(crop_hw=(512, 512))),
        loss=_dense_hybrid,
        terms=("segmentation", "likelihood", "posterior"),
        score=_hybrid,
        parts={"ood_head": True},
        adam_eps=1e-7,
    ),
}
"""The methods by name."""


def start_network(method: Method, init: Path | None) -> AnomalyDeepLab:
    """The network that a method starts from.

    Args:
        method: What is going to be trained.
        init: Weights of a segmentation network (NVIDIA's DeepLabV3+ WideResNet-38, or what ``segmentation`` made). To train a segmentation
            also torchvision's ``mobilenet_v2`` features, or None for random weights.

    Raises:
        WeightsError: Damaged weights, or weights of another network.
        InputError: None are named and the method needs some.
    """
    if init is None:
        if not method.scorer:
            return DeepLabMobileNetV2(len(CLASS_NAMES))
        raise InputError(
            f"method '{method.scorer}' starts from a segmentation network: make one with --method segmentation and name it with --init"
        )
    weights = without_prefixes(load_weights(init))
    if not method.scorer and "final.6.weight" not in weights.state:
        network = DeepLabMobileNetV2(len(CLASS_NAMES))
        network.load_imagenet_features(weights)
        return network
    family = recognise(weights).name
    if family not in PLAIN_FAMILIES:
        raise WeightsError(f"weights file '{init}' is of the family '{family}', training starts from {' or '.join(PLAIN_FAMILIES)}")
    base = ready(like, weights, family, Runtime(torch.device("cpu")))
    return _with_parts(base, method)


def _with_parts(base: AnomalyDeepLab, method: Method) -> AnomalyDeepLab:
    """The same network with what a method adds, initialised as in its release."""
    state = base.state_dict()
    classes = base.num_classes + method.abstention
    network = like(state, num_classes=classes, **method.parts).to_empty(device="cpu")
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    if method.abstention:
        row = torch.empty_like(state["final.6.weight"][:1])
        state["final.6.weight"] = torch.cat([state["final.6.weight"], nn.init.kaiming_normal_(row)])
    for key in list(state):
        if network.residual_block is not None and key.startswith(("aspp.", "bot_aspp.")):
            # The second pyramid starts as a copy of the first.
            state[f"residual_block.{key.replace('aspp.', 'atten_aspp.', 1)}"] = state[key]
    network.load_state_dict({**network.state_dict(), **state})
    if network.residual_block is not None:
        nn.init.kaiming_normal_(network.residual_block.atten_aspp_final.weight)
        for name, parameter in network.residual_block.named_parameters():
            if name.startswith("proj_head."):
                nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    return network


def train_published(
    data: ScorerData, recipe: PublishedTraining, output: Path, init: Path | None = None, device: torch.device | None = None
) -> Path:
    """Trains until ``recipe.iterations``, going on from the checkpoint in ``output`` when there is one.

    Args:
        data: What to train from.
        recipe: How.
        output: Folder for checkpoint, ``log.csv``, ``curve.png`` and the weights, named after the scorer.
        init: See :func:`start_network`.
        device: Where to train; CPU when None.

    Returns:
        The weights file.

    Raises:
        InputError: Unusable data or weights, or a checkpoint of another recipe or network, before training starts.
    """
    device = device or torch.device("cpu")
    method = METHODS[recipe.method]
    torch.manual_seed(recipe.seed)
    network = start_network(method, init)
    exposure = ExposureData.read(data, network.num_classes - method.abstention, method.needs_labels)
    network.to(device)
    weights = output / f"{method.scorer or recognise(WeightFile(output, network.state_dict(), {})).name}.safetensors"
    validation = exposure.validation(recipe.paste, recipe.seed + 1)
    optimizer = torch.optim.Adam(_groups(network, method, recipe.learning_rate), eps=method.adam_eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1.0 - min(1.0, done / recipe.iterations)) ** recipe.poly_power)
    loop = TrainingLoop(
        output,
        recipe,
        {"net": network, "optimizer": optimizer, "schedule": schedule},
        title=f"train {recipe.method}",
        panels=(("total", *method.terms), ("val_ap", "val_miou")),
        may_change=MAY_CHANGE,
        checkpoint_minutes=recipe.checkpoint_minutes,
        origin={"init": file_stamp(init), "data": data_stamp(*exposure.train)},
    )
    _training_mode(network, method)

    def step(batch: ExposureBatch) -> losses.Terms:
        # Dropout and the draw of contrasted pixels depend on the iteration alone, so that a resumed run equals an uninterrupted one.
        torch.manual_seed((recipe.seed << 32) + loop.done)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            prediction = network(batch.images())
        terms = method.loss(prediction, batch)
        loop.descend(optimizer, terms["total"])
        schedule.step()
        return terms

    def at_checkpoint() -> dict[str, float]:
        quality = validate(network, method, validation, device)
        metadata = {"class_names": exposure.class_names, "recipe": asdict(recipe), "done": loop.done, "validation": quality}
        state = network.state_dict()
        if method.abstention:
            # It stands for no class and has no part in the score.
            state["final.6.weight"] = state["final.6.weight"][:-1]
        save_weights(weights, state, {**metadata, "start": init.name if init else "random"}, half=False)
        _training_mode(network, method)
        return quality

    dataset = exposure.samples(recipe.paste, recipe.seed, recipe.iterations * recipe.batch_size, recipe.outlier_share, method.pictures)
    remaining = range(loop.done, recipe.iterations)
    loop.run(batches(dataset, collate, size=recipe.batch_size, iterations=remaining, workers=recipe.workers), step, at_checkpoint)
    return weights


@torch.no_grad()
def validate(network: AnomalyDeepLab, method: Method, validation: Sequence[ExposureBatch], device: torch.device) -> dict[str, float]:
    """Pixel AP of the method's score on held-out pastes, every fourth pixel, and mIoU of the classes where there are labels."""
    network.eval()
    scores, outliers, classes, labels = [], [], [], []
    for batch in validation:
        output = network(batch.image.to(device, torch.float32))
        target = batch.target[:, 2::4, 2::4]
        score = upsample_aligned(method.score(output)[:, None], batch.target.shape[-2:])[:, 0, 2::4, 2::4].cpu()
        logits = output.logits[:, :-1] if method.abstention else output.logits
        predicted = upsample_aligned(logits, batch.target.shape[-2:]).argmax(dim=1)[:, 2::4, 2::4].cpu()
        counted, known = target != losses.VOID, (target != losses.VOID) & (target != losses.OUTLIER)
        scores.append(score[counted])
        outliers.append(target[counted] == losses.OUTLIER)
        classes.append(predicted[known])
        labels.append(target[known])
    quality = {"val_ap": average_precision(torch.cat(scores).numpy(), torch.cat(outliers).numpy())}
    if method.needs_labels:
        quality["val_miou"] = _miou(torch.cat(classes), torch.cat(labels))
    return quality


def _miou(predicted: Tensor, label: Tensor) -> float:
    ious = [
        ((predicted == c) & (label == c)).sum() / ((predicted == c) | (label == c)).sum()
        for c in torch.bincount(torch.cat([predicted, label])).nonzero()[:, 0].tolist()
    ]
    return float(torch.stack(ious).mean())


def _training_mode(network: AnomalyDeepLab, method: Method) -> None:
    """Freezes what the method does not train, and sets the modes of norms and dropout as in its release."""
    network.train(not method.evaluates_rest)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(method.trains))
    if method.evaluates_rest:
        for prefix in method.trains:
            network.get_submodule(prefix.rstrip(".")).train()


def _groups(network: AnomalyDeepLab, method: Method, rate: float) -> list[dict[str, object]]:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if name.startswith(method.trains):
            factor = next((factor for prefix, factor in method.rates if name.startswith(prefix)), 1.0)
            groups.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "lr": rate * factor} for factor, parameters in groups.items()]
