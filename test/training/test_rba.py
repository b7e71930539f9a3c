"""``ood-seg train rba`` on a very small random Mask2Former: losses against float64 references, and a whole run."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ros2_ood_seg.cli import main
from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.scorers.mask2former import RBA, RBA_TANH, mask_scores
from ros2_ood_seg.scorers.networks.mask2former import Mask2Former, Mask2FormerOutput
from ros2_ood_seg.scorers.networks.swin import SwinTransformer
from ros2_ood_seg.training.outlier_losses import OUTLIER, VOID
from ros2_ood_seg.training.rba import (
    PRESETS,
    RbaTraining,
    _groups,
    _training_mode,
    hinge_loss,
    rba_loss,
    rba_scores,
    segmentation_loss,
    train_rba,
)
from ros2_ood_seg.training.scorer import ScorerData, average_precision
from ros2_ood_seg.weights.store import load_weights


def tiny(outputs: int = 20, decoder_layers: int = 1) -> Mask2Former:
    torch.manual_seed(0)
    backbone = SwinTransformer(width=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 2), window=4)
    return Mask2Former(backbone, outputs, 9, 32, 32, 1, 1, 32, 1, decoder_layers, 48)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    path = tmp_path / "start.pth"
    torch.save({"model": tiny().state_dict()}, path)
    return path


def target(shape: tuple[int, int] = (64, 96)) -> Tensor:
    """Road below, sky above, an anomaly on the road, void at the side, in two images; the second has no anomaly."""
    labels = torch.full((2, *shape), 10)
    labels[:, shape[0] // 2 :] = 0
    labels[:, :, -8:] = VOID
    labels[0, 40:52, 30:60] = OUTLIER
    return labels


@pytest.mark.parametrize(("bounded", "rule"), [(False, RBA), (True, RBA_TANH)])
def test_the_score_is_the_scorers_own(bounded: bool, rule: object) -> None:
    class_logits, mask_logits = 3 * torch.randn(2, 9, 20), 4 * torch.randn(2, 9, 32, 64)
    actual = rba_scores(class_logits, mask_logits, bounded)
    p = torch.softmax(class_logits.double(), 2)[..., :-1].numpy()
    m = 1 / (1 + np.exp(-mask_logits.double().numpy()))
    classes = sum(p[:, q, :, None, None] * m[:, q, None] for q in range(9))
    expected = -(np.tanh(classes) if bounded else classes).sum(axis=1)
    assert np.abs(actual.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    inference = torch.stack([mask_scores(rule, class_logits[k], mask_logits[k], (32, 64)).scores for k in range(2)])
    torch.testing.assert_close(actual, inference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inlier_max", "outlier_min"), [(0.0, 5.0), (-0.9, -0.2)])
def test_the_hinge_equals_its_definition(inlier_max: float, outlier_min: float) -> None:
    scores, labels = -2 * torch.rand(2, 16, 24), target()
    full = torch.nn.functional.interpolate(scores.double()[:, None], (64, 96), mode="bilinear", align_corners=True)[:, 0].numpy()
    outlier = labels.numpy() == OUTLIER
    normal = ~outlier & (labels.numpy() != VOID)
    inlier_mean = np.mean(np.maximum(full[normal] - inlier_max, 0) ** 2)
    expected = 0.5 * (inlier_mean + np.mean(np.maximum(outlier_min - full[outlier], 0) ** 2))
    assert hinge_loss(scores, labels, inlier_max, outlier_min).item() == pytest.approx(expected, rel=1e-5)
    clean = torch.where(labels == OUTLIER, 0, labels)
    inlier_mean = np.mean(np.maximum(full[clean.numpy() != VOID] - inlier_max, 0) ** 2)
    assert hinge_loss(scores, clean, inlier_max, outlier_min).item() == pytest.approx(inlier_mean, rel=1e-5)
    assert hinge_loss(scores, torch.full_like(labels, VOID), inlier_max, outlier_min).item() == 0.0


def perfect(labels: Tensor, queries: int = 9) -> Mask2FormerOutput:
    """Query c covers class c with certainty, for the classes up to the number of queries; the others are no object."""
    classes = torch.full((len(labels), queries, 20), -20.0)
    masks = torch.full((len(labels), queries, 16, 24), -20.0)
    small = labels[:, 2::4, 2::4]
    for q, c in enumerate((0, 10)):
        classes[:, q, c] = 20.0
        masks[:, q][small == c] = 20.0
    classes[:, 2:, 19] = 20.0
    return Mask2FormerOutput(classes, masks)


def test_mask2formers_own_losses_know_right_from_wrong() -> None:
    pytest.importorskip("transformers")
    labels = target()
    loss = segmentation_loss(19, points=2000)
    right = perfect(labels)
    swapped = Mask2FormerOutput(right.class_logits[:, [1, 0, *range(2, 9)]], right.mask_logits)
    torch.manual_seed(0)
    # A quarter of the resolution leaves uncertain borders, where most points are.
    assert loss(right, labels) < 0.25 * loss(swapped, labels)
    deep = Mask2FormerOutput(right.class_logits, right.mask_logits, ((swapped.class_logits, swapped.mask_logits),))
    assert loss(deep, labels) > loss(swapped, labels)
    # Anomalies and void are no masks to be found.
    assert loss(right, torch.full_like(labels, OUTLIER)).item() == 0.0


def test_the_whole_loss_supervises_every_layer() -> None:
    pytest.importorskip("transformers")
    network = tiny(decoder_layers=3).train()
    recipe = RbaTraining(outlier_weight=2.0, segmentation_weight=0.5)
    output = network(torch.randn(2, 3, 64, 96))
    assert len(output.auxiliary) == 3
    terms = rba_loss(output, target(), recipe, segmentation_loss(19, points=500))
    torch.testing.assert_close(terms["total"], 2.0 * terms["outlier"] + 0.5 * terms["segmentation"])
    last = hinge_loss(rba_scores(output.class_logits, output.mask_logits, True), target(), 0.0, 5.0)
    assert terms["outlier"] > 3 * last * 0.5
    assert network.eval()(torch.randn(1, 3, 64, 96)).auxiliary == ()
    alone = rba_loss(output, target(), recipe, None)
    assert alone["segmentation"].item() == 0.0


@pytest.mark.parametrize("layers", ["heads", "decoder", "all"])
def test_only_the_chosen_layers_train(layers: str) -> None:
    network = tiny()
    groups = _groups(network, RbaTraining(layers=layers))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert ("backbone.patch_embed.proj.weight" in trained) == (layers == "all")
    assert ("sem_seg_head.predictor.query_feat.weight" in trained) == (layers != "heads")
    assert "sem_seg_head.predictor.class_embed.weight" in trained
    rates = {(group["lr"], group["weight_decay"]) for group in groups}
    decays = {(1e-4, 0.05)} if layers == "heads" else {(1e-4, 0.05), (1e-4, 0.0)}
    assert rates == decays | ({(1e-5, 0.05), (1e-5, 0.0)} if layers == "all" else set())


def test_the_loss_falls_and_anomalies_are_told_apart() -> None:
    network, recipe = tiny(), replace(PRESETS["ugains"], learning_rate=3e-3, clip_norm=1.0)
    optimizer = torch.optim.AdamW(_groups(network, recipe), recipe.learning_rate)
    _training_mode(network, recipe)
    labels = target()
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    image[labels[:, None].expand(-1, 3, -1, -1) == OUTLIER] += 3.0

    def ap() -> float:
        with torch.no_grad():
            output = network(image)
        scores = [mask_scores(RBA, *logits, (64, 96)).scores for logits in zip(output.class_logits, output.mask_logits, strict=True)]
        return average_precision(torch.stack(scores).flatten().numpy(), (labels == OUTLIER).flatten().numpy())

    losses, before = [], ap()
    for _ in range(30):
        output = network(image)
        # Without labels the hinge on normal pixels has to hold them down.
        loss = rba_loss(output, labels, replace(recipe, inlier_max=-3.0, outlier_min=0.0), None)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert ap() > max(0.3, 2 * before)


def words(data_dir: Path, start: Path, output: Path, *more: str) -> list[str]:
    data = ["--cityscapes", str(data_dir / "cityscapes"), "--coco", str(data_dir / "coco")]
    size = ["--crop", "64", "96", "--frame-width", "96", "120", "--batch-size", "2", "--points", "200", "--workers", "0"]
    quick = ["--outlier-share", "1", "--device", "cpu", "--calibration-frames", "2", "--input-width", "96"]
    return ["train", "rba", "--init", str(start), "--output", str(output), *data, *size, *quick, *more]


def test_a_run_gives_weights_for_the_scorer_and_goes_on_where_it_stopped(data_dir: Path, start: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output = tmp_path / "run"
    assert main(words(data_dir, start, output, "--iterations", "2")) == 0
    weights = load_weights(output / "rba.safetensors")
    before = torch.load(start, weights_only=True)["model"]
    changed = {key for key, value in weights.state.items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("sem_seg_head.predictor.") for key in changed)
    assert weights.metadata["recipe"]["layers"] == "decoder"
    assert weights.metadata["done"] == 2
    assert "rba/rba" in json.loads((output / "rba.calibration.json").read_text())
    scorer = SCORERS.get("rba")(
        ScorerConfig(name="rba", weights=str(output / "rba.safetensors"), input_width=96), Runtime(torch.device("cpu"))
    )
    result = scorer(torch.randint(0, 256, (60, 90, 3), dtype=torch.uint8))
    assert result.scores.max() <= 0
    assert len(result.class_names) == 19

    assert main(words(data_dir, start, output, "--iterations", "3")) == 0
    assert load_weights(output / "rba.safetensors").metadata["done"] == 3
    with (output / "log.csv").open() as file:
        assert [row["iteration"] for row in csv.DictReader(file) if row["val_ap"]] == ["2", "3"]


def test_frames_without_labels_need_no_segmentation_loss(
    data_dir: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roads = ["--roads", str(data_dir / "roads"), "--iterations", "1"]
    assert main(words(data_dir, start, tmp_path / "a", *roads)) == 2
    assert "leave --roads out" in capsys.readouterr().err
    assert main(words(data_dir, start, tmp_path / "b", *roads, "--segmentation-weight", "0", "--preset", "rba")) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--crop", "60", "96"), "crops are 60 96 px, allowed: multiples of 32"),
        (("--iterations", "0"), "iterations is 0, allowed: a number above 0"),
        (("--outlier-share", "2"), "outlier_share is 2.0, allowed: a number from 0 to 1"),
        (("--clip-norm", "-1"), "clip_norm is -1.0, allowed: a number from 0"),
        (("--calibration-frames", "0"), "--calibration-frames is 0"),
        (("--seed", "-1"), "seed is -1, allowed: a number from 0"),
        (("--device", "gpu"), "'runtime.device' is 'gpu'"),
    ],
)
def test_unusable_settings_are_refused(
    data_dir: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], message: str
) -> None:
    assert main(words(data_dir, start, tmp_path / "run", *settings)) == 2
    assert message in capsys.readouterr().err


def test_unusable_networks_are_refused(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    data = ScorerData(cityscapes=data_dir / "cityscapes", coco=data_dir / "coco")
    other = tmp_path / "five.pth"
    torch.save({"model": tiny(outputs=6).state_dict()}, other)
    with pytest.raises(InputError, match="the network has 5 classes, there are labels for 7 or 19"):
        train_rba(data, RbaTraining(), tmp_path / "run", other)
    state = tiny().state_dict()
    del state["sem_seg_head.predictor.decoder_norm.weight"]
    torch.save({"model": state}, other)
    with pytest.raises(WeightsError, match=r"family 'mask2former': 1 missing \(sem_seg_head\.predictor\.decoder_norm\.weight\)"):
        train_rba(data, RbaTraining(), tmp_path / "run", other)
    assert not (tmp_path / "run").exists()
