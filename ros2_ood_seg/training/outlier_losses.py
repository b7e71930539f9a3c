"""Losses of the published outlier-exposure methods: Max-Entropy, PEBAL, RPL, CoroCL and DenseHybrid.

Logits are (B, K, H, W) float at the labels' resolution; targets are (B, H, W) int64: an in-distribution class, :data:`OUTLIER` or
:data:`VOID`. Each function gives scalars: the terms as they enter the sum, and the sum as ``total``. A term whose pixels are missing
from the batch is 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ros2_ood_seg.training.outlier_exposure import IGNORE

OUTLIER = 254
"""Target of pixels of pasted objects."""

VOID = IGNORE
"""Target of pixels that take no part."""

Terms = dict[str, Tensor]


class PebalWeights(NamedTuple):
    """Constants of PEBAL's release (tianyu0207/PEBAL, losses.py and trainer.py).

    Args:
        inlier_energy: Energies of inliers above this are punished.
        outlier_energy: Energies of outliers below this are punished.
        sparsity: Weight of the norm of the outliers' energies.
        smoothness: Weight of the squared differences between neighbouring energies.
        energy: Weight of the energy loss beside the abstention loss.
        outlier: Weight of the abstention loss on outliers.
    """

    inlier_energy: float = -12.0
    outlier_energy: float = -6.0
    sparsity: float = 5e-4
    smoothness: float = 3e-6
    energy: float = 0.1
    outlier: float = 0.1


def segmentation_loss(logits: Tensor, target: Tensor) -> Terms:
    """Cross-entropy over the pixels of known class."""
    loss = _mean(F.cross_entropy(logits, _classes(target), ignore_index=VOID, reduction="none"), _is_class(target))
    return {"total": loss, "segmentation": loss}


def max_entropy_loss(logits: Tensor, target: Tensor, outlier_weight: float = 0.9) -> Terms:
    """Meta-OoD, Eq. 3 (Chan et al., ICCV 2021): cross-entropy on inliers, cross-entropy to the uniform distribution on outliers.

    As in the release, the sums are divided by the number of all pixels and classes.

    Args:
        logits: See module.
        target: See module.
        outlier_weight: lambda, the share of the outliers' term.
    """
    log_p = F.log_softmax(logits, dim=1)
    inlier = F.nll_loss(log_p, _classes(target), ignore_index=VOID, reduction="sum")
    outlier = -log_p.mean(dim=1)[target == OUTLIER].sum()
    scale = 1.0 / logits.numel()
    terms = {"segmentation": (1.0 - outlier_weight) * scale * inlier, "uniform": outlier_weight * scale * outlier}
    return {"total": terms["segmentation"] + terms["uniform"], **terms}


def pebal_loss(logits: Tensor, target: Tensor, weights: PebalWeights = PebalWeights()) -> Terms:  # noqa: B008 (immutable)
    """PEBAL (Tian et al., ECCV 2022, Eqs. 3-6): abstention whose price is the energy, and a hinge on the energy itself.

    Args:
        logits: See module; the last output is abstention.
        target: See module.
        weights: Constants.
    """
    energy = -logits[:, :-1].logsumexp(dim=1)
    abstention = _abstention_loss(logits, target, weights.outlier)
    inlier, outlier = energy[_is_class(target)], energy[target == OUTLIER]
    hinge = _mean_of(F.relu(inlier - weights.inlier_energy).square())
    if outlier.numel():
        hinge = 0.5 * (hinge + F.relu(weights.outlier_energy - outlier).square().mean())
    differences = energy.diff(dim=1).square().sum() + energy.diff(dim=2).square().sum()
    terms = {
        "abstention": abstention,
        "energy": weights.energy * hinge,
        "sparsity": weights.energy * weights.sparsity * outlier.norm(),
        "smoothness": weights.energy * weights.smoothness * 0.5 * differences,
    }
    return {"total": sum(terms.values(), start=torch.zeros_like(abstention)), **terms}


def _abstention_loss(logits: Tensor, target: Tensor, outlier_weight: float) -> Tensor:
    """Gambler's loss whose reward is the squared, blurred log-sum-exp; means over images with and without outliers are added."""
    log_p = F.log_softmax(logits, dim=1)
    reward = gaussian_blur(logits[:, :-1].logsumexp(dim=1).square(), [7, 7], [1.0, 1.0])
    log_abstention = log_p[:, -1] - reward.log()
    classes = _classes(target)
    log_true = log_p[:, :-1].gather(1, classes.where(classes != VOID, 0)[:, None])[:, 0]
    gain = torch.logaddexp(log_true, log_abstention)
    known, exposed = _is_class(target), (target == OUTLIER).any(dim=(1, 2))
    loss = -_mean_of(gain[~exposed][known[~exposed]]) - _mean_of(gain[exposed][known[exposed]])
    boosted = torch.logaddexp(log_p[:, :-1], log_abstention[:, None]).movedim(1, -1)[target == OUTLIER]
    return loss - outlier_weight * _mean_of(boosted.clamp(min=math.log(1e-7)))


def rpl_loss(logits: Tensor, untouched: Tensor, target: Tensor, energy_weight: float = 0.05) -> Terms:
    """RPL (Liu et al., ICCV 2023, Eqs. 2-4): on inliers imitate the frozen segmentation, on outliers raise the energy to 0 or more.

    Args:
        logits: With the residual, see module.
        untouched: Of the frozen segmentation.
        target: See module.
        energy_weight: Weight of the outliers' term (the release's).
    """
    inlier = _is_class(target)
    imitation = _mean(F.cross_entropy(logits, untouched.argmax(dim=1), reduction="none"), inlier)
    entropy = _mean((_entropy(logits) - _entropy(untouched)).square(), inlier)
    energy = energy_weight * _mean_of(F.relu(logits.logsumexp(dim=1)[target == OUTLIER]))
    return {"total": imitation + entropy + energy, "imitation": imitation, "entropy": entropy, "energy": energy}


def contrastive_loss(
    road: Tensor,
    road_target: Tensor,
    picture: Tensor,
    picture_target: Tensor,
    samples: int = 512,
    temperature: float = 0.1,
) -> Tensor:
    """CoroCL (Liu et al., ICCV 2023, Eqs. 5-7): outliers attract outliers and inliers inliers, on the road and in other pictures.

    Anchors are pixels of road images, drawn with torch's generator of the CPU; they are compared with themselves and with pixels of
    pictures, as many of each kind.

    Args:
        road: (B, C, h, w) embedding of road images with pasted objects.
        road_target: (B, H, W), see module.
        picture: (B, C, h, w) embedding of the pictures that objects come from.
        picture_target: (B, H, W).
        samples: At most so many pixels of each kind.
        temperature: Divides the cosine similarities.

    Returns:
        A scalar, 0 when one of the four kinds is missing.
    """
    kinds = [*_embeddings(road, road_target), *_embeddings(picture, picture_target)]
    count = min(samples, *(len(kind) for kind in kinds))
    if count == 0:
        return road.sum() * 0.0
    drawn = [kind[torch.randperm(len(kind))[:count].to(kind.device)] for kind in kinds]
    contrasts = torch.cat(drawn)
    similarity = torch.cat(drawn[:2]) @ contrasts.T / temperature
    outlier = torch.tensor([1, 0, 1, 0], device=road.device).repeat_interleave(count)
    same = outlier[: 2 * count, None] == outlier[None]
    negatives = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_p = similarity - torch.logaddexp(similarity, negatives)
    # An anchor is no positive of itself.
    positive = same.float().fill_diagonal_(0.0)
    return -((positive * log_p).sum(dim=1) / positive.sum(dim=1)).mean()


def dense_hybrid_loss(logits: Tensor, posterior: Tensor, target: Tensor, beta: float = 0.03) -> Terms:
    """DenseHybrid (Grcic et al., ECCV 2022, Eqs. 6-9): segmentation, low likelihood of outliers, and which data set a pixel is of.

    The release adds a term to the likelihood that is detached from the graph; it changes no gradient and is left out here.

    Args:
        logits: See module.
        posterior: (B, 2, H, W) logits of (in, out).
        target: See module.
        beta: Weight of the likelihood; the posterior's is ten times that (the release's).
    """
    outlier = target == OUTLIER
    terms = {
        "segmentation": segmentation_loss(logits, target)["total"],
        "likelihood": beta * _mean(logits.logsumexp(dim=1), outlier),
        "posterior": 10.0 * beta * F.cross_entropy(posterior, outlier.long()),
    }
    return {"total": terms["segmentation"] + terms["likelihood"] + terms["posterior"], **terms}


def _is_class(target: Tensor) -> Tensor:
    return (target != OUTLIER) & (target != VOID)


def _classes(target: Tensor) -> Tensor:
    return target.where(target != OUTLIER, VOID)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return _mean_of(values[where])


def _mean_of(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()


def _entropy(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, dim=1).clamp(min=math.log(1e-7))
    return -(log_p.exp() * log_p).sum(dim=1)


def _embeddings(projection: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (N, C) of outliers and of inliers."""
    small = F.interpolate(target[:, None].float(), size=projection.shape[-2:], mode="nearest")[:, 0].long()
    vectors = F.normalize(projection, dim=1).movedim(1, -1)
    return vectors[small == OUTLIER], vectors[_is_class(small)]
