"""Each loss against its definition, pixel by pixel in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from ros2_ood_seg.training.outlier_losses import (
    OUTLIER,
    VOID,
    contrastive_loss,
    dense_hybrid_loss,
    max_entropy_loss,
    pebal_loss,
    rpl_loss,
    segmentation_loss,
)

B, K, H, W = 3, 5, 9, 11


def example(outputs: int = K, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits and targets; the last image has no outliers."""
    generator = torch.Generator().manual_seed(outputs)
    logits = scale * torch.randn(B, outputs, H, W, generator=generator)
    target = torch.randint(0, K, (B, H, W), generator=generator)
    target[:, :2] = VOID
    target[:2, 3:6, 4:9] = OUTLIER
    return logits, target


def pixels(logits: Tensor, target: Tensor) -> list[tuple[np.ndarray, int, int]]:
    """(logits, target, image) of each pixel."""
    flat = logits.double().permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).numpy()
    labels = target.flatten().tolist()
    return [(flat[k], labels[k], k // (H * W)) for k in range(len(labels))]


def softmax(f: np.ndarray) -> np.ndarray:
    e = np.exp(f - f.max())
    return e / e.sum()


def lse(f: np.ndarray) -> float:
    return float(np.log(np.exp(f).sum()))


def test_segmentation() -> None:
    logits, target = example()
    expected = np.mean([-math.log(softmax(f)[y]) for f, y, _ in pixels(logits, target) if y < K])
    assert segmentation_loss(logits, target)["total"].item() == pytest.approx(expected, rel=1e-5)


def test_max_entropy() -> None:
    logits, target = example()
    total = 0.0
    for f, y, _ in pixels(logits, target):
        one_or_all_hot = np.zeros(K)
        if y == OUTLIER:
            one_or_all_hot[:] = 0.9 / K
        elif y != VOID:
            one_or_all_hot[y] = 0.1
        total -= (one_or_all_hot * np.log(softmax(f))).sum()
    assert max_entropy_loss(logits, target)["total"].item() == pytest.approx(total / (B * H * W * K), rel=1e-5)


def blurred(values: np.ndarray) -> np.ndarray:
    taps = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    return ndimage.correlate(values, np.outer(taps, taps) / taps.sum() ** 2, mode="mirror")


def test_pebal() -> None:
    logits, target = example(K + 1)
    energy = np.array([-lse(f[:K]) for f, _, _ in pixels(logits, target)])
    reward = np.stack([blurred(e**2) for e in energy.reshape(B, H, W)]).ravel()
    inside: dict[bool, list[float]] = {True: [], False: []}
    outside = []
    for (f, y, image), price in zip(pixels(logits, target), reward, strict=True):
        p = softmax(f)
        if y == OUTLIER:
            outside += [math.log(max(p[c] + p[K] / price, 1e-7)) for c in range(K)]
        elif y != VOID:
            inside[image < 2].append(math.log(p[y] + p[K] / price))
    abstention = -np.mean(inside[False]) - np.mean(inside[True]) - 0.1 * np.mean(outside)
    labels = target.flatten().numpy()
    inlier, outlier = energy[labels < K], energy[labels == OUTLIER]
    hinge = 0.5 * (np.mean(np.maximum(inlier + 12, 0) ** 2) + np.mean(np.maximum(-6 - outlier, 0) ** 2))
    maps = energy.reshape(B, H, W)
    smooth = 0.5 * ((np.diff(maps, axis=1) ** 2).sum() + (np.diff(maps, axis=2) ** 2).sum())
    expected = abstention + 0.1 * (hinge + 5e-4 * np.sqrt((outlier**2).sum()) + 3e-6 * smooth)
    assert pebal_loss(logits, target)["total"].item() == pytest.approx(expected, rel=1e-5)


def test_rpl() -> None:
    logits, target = example()
    untouched = example(K, 3.0)[0].flip(0)

    def entropy(f: np.ndarray) -> float:
        p = np.maximum(softmax(f), 1e-7)
        return float(-(p * np.log(p)).sum())

    imitation, difference, energy = [], [], []
    for (f, y, _), (g, _, _) in zip(pixels(logits, target), pixels(untouched, target), strict=True):
        if y == OUTLIER:
            energy.append(max(lse(f), 0.0))
        elif y != VOID:
            imitation.append(-math.log(softmax(f)[g.argmax()]))
            difference.append((entropy(f) - entropy(g)) ** 2)
    expected = np.mean(imitation) + np.mean(difference) + 0.05 * np.mean(energy)
    assert rpl_loss(logits, untouched, target)["total"].item() == pytest.approx(expected, rel=1e-5)


def test_dense_hybrid() -> None:
    logits, target = example()
    posterior = example(2)[0]
    out = [y == OUTLIER for _, y, _ in pixels(logits, target)]
    seg = np.mean([-math.log(softmax(f)[y]) for f, y, _ in pixels(logits, target) if y < K])
    likelihood = np.mean([lse(f) for f, y, _ in pixels(logits, target) if y == OUTLIER])
    head = np.mean([-math.log(softmax(f)[int(o)]) for (f, _, _), o in zip(pixels(posterior, target), out, strict=True)])
    expected = seg + 0.03 * likelihood + 0.3 * head
    assert dense_hybrid_loss(logits, posterior, target)["total"].item() == pytest.approx(expected, rel=1e-5)


def test_contrast() -> None:
    generator = torch.Generator().manual_seed(3)
    road, picture = torch.randn(2, 2, 6, 4, 5, generator=generator)
    target = torch.zeros(2, 8, 10, dtype=torch.long)
    target[:, :4, :4] = OUTLIER
    target[:, 4:] = VOID
    target[:, :, 8:] = VOID
    # Of each kind there are as many pixels as are drawn, so the order of drawing cannot matter.
    count = 8
    found = contrastive_loss(road, target, picture, target, samples=count).item()

    small = target[:, ::2, ::2]
    sets = []
    for vectors in (road, picture):
        units = (vectors / vectors.norm(dim=1, keepdim=True)).double().permute(0, 2, 3, 1)
        sets += [units[small == OUTLIER].numpy(), units[small == 0].numpy()]
    assert {len(s) for s in sets} == {count}
    everything = [(v, k % 2 == 0) for k, s in enumerate(sets) for v in s]
    losses = []
    for a, (anchor, kind) in enumerate(everything[: 2 * count]):
        powers = [math.exp(anchor @ v / 0.1) for v, _ in everything]
        negative = sum(power for power, (_, other) in zip(powers, everything, strict=True) if other != kind)
        same = [power for c, (power, (_, other)) in enumerate(zip(powers, everything, strict=True)) if other == kind and c != a]
        losses.append(-np.mean([math.log(power / (power + negative)) for power in same]))
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_contrast_needs_all_four_kinds() -> None:
    road = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = contrastive_loss(road, torch.zeros(1, 3, 3), road, torch.zeros(1, 3, 3))
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("fill", [0, OUTLIER, VOID])
def test_batches_of_one_kind_of_pixel_have_finite_losses_and_gradients(fill: int) -> None:
    target = torch.full((2, 4, 6), fill)
    for loss, outputs in ((segmentation_loss, K), (max_entropy_loss, K), (pebal_loss, K + 1)):
        logits = (40 * torch.randn(2, outputs, 4, 6)).requires_grad_()
        total = loss(logits, target)["total"]
        total.backward()
        assert math.isfinite(total.item()), loss
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all(), loss
    logits = (40 * torch.randn(2, K, 4, 6)).requires_grad_()
    total = rpl_loss(logits, logits.detach(), target)["total"] + dense_hybrid_loss(logits, logits[:, :2], target)["total"]
    total.backward()
    assert math.isfinite(total.item())
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
