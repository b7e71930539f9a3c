from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.utils.data import Dataset

from ros2_ood_seg.cli import main
from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.compact import SCORES, build
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES, CompactNet, CompactOutput
from ros2_ood_seg.training.outlier_exposure import IGNORE, OutlierExposure, PasteSettings, RoadSample
from ros2_ood_seg.training.scorer import (
    Batch,
    ScorerData,
    ScorerTraining,
    average_precision,
    batches,
    collate,
    scorer_loss,
    start_from,
    train_scorer,
    validate,
)
from ros2_ood_seg.weights.store import load_weights, save_weights

PASTE = PasteSettings(crop_hw=(64, 96), frame_width_px=(100, 200), object_px=(10, 50))
RECIPE = ScorerTraining(iterations=4, batch_size=2, warm_up=2, workers=0, checkpoint_minutes=1e9, paste=PASTE)


@pytest.fixture
def data(data_dir: Path) -> ScorerData:
    return ScorerData(camvid=data_dir / "camvid", roads=[data_dir / "roads"], coco=data_dir / "coco", objects=[data_dir / "grabcut"])


def sample(area_px: int = 64) -> RoadSample:
    instances = np.zeros((64, 96), np.int32)
    side = math.isqrt(area_px)
    instances[8 : 8 + side, 16 : 16 + side] = 1
    semantic = np.full((64, 96), 3, np.uint8)
    semantic[instances > 0] = IGNORE
    return RoadSample(np.zeros((64, 96, 3), np.uint8), semantic, (instances > 0).astype(np.uint8), instances, np.zeros((1, 4), np.float32))


def test_collate_takes_labels_to_a_quarter() -> None:
    batch = collate([sample(64)])
    assert batch.image.shape == (1, 3, 64, 96)
    assert batch.semantic.shape == batch.anomaly.shape == batch.weight.shape == (1, 16, 24)
    assert batch.anomaly[0, 2:4, 4:6].eq(1).all()
    assert batch.anomaly.sum() == 4
    assert batch.semantic[0, 2, 4] == IGNORE
    assert batch.semantic[0, 0, 0] == 3
    # 16 times the area weighs 8 times as much in all, not 16 times.
    assert (collate([sample(1024)]).weight.sum() / batch.weight.sum()).item() == pytest.approx(8.0, rel=1e-5)


def test_loss_prefers_the_truth() -> None:
    batch = collate([sample(), sample(256)])
    right = CompactOutput(torch.zeros(2, len(CLASS_NAMES), 16, 24), torch.where(batch.anomaly > 0, 9.0, -9.0))
    right.class_logits[:, 3] = 9.0 * (batch.anomaly == 0)
    wrong = CompactOutput(-right.class_logits, -right.outlier_logit)
    good, bad = scorer_loss(right, batch, RECIPE), scorer_loss(wrong, batch, RECIPE)
    assert good["total"] < 0.2 < bad["total"]
    assert good["uniform"].item() == pytest.approx(math.log(len(CLASS_NAMES)))
    parts = 0.5 * bad["positive"] + 0.4 * bad["hard"] + bad["mean"]
    assert bad["total"].item() == pytest.approx((parts + 0.3 * bad["semantic"] + 0.05 * bad["uniform"]).item())


def test_loss_is_finite_without_anomalies_or_labels() -> None:
    empty = torch.zeros(1, 16, 24)
    batch = Batch(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.full((1, 16, 24), IGNORE), empty, empty, empty == 0)
    output = CompactOutput(torch.zeros(1, len(CLASS_NAMES), 16, 24, requires_grad=True), torch.zeros(1, 16, 24, requires_grad=True))
    loss = scorer_loss(output, batch, RECIPE)["total"]
    loss.backward()
    assert torch.isfinite(loss)
    assert output.outlier_logit.grad is not None
    assert torch.isfinite(output.outlier_logit.grad).all()


def test_average_precision_equals_sklearn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 12, 300).astype(np.float32)
        labels = rng.random(300) < 0.2
        assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


def test_sides_share_no_picture(data: ScorerData) -> None:
    (train_roads, train_cutouts), (val_roads, val_cutouts) = data.read(held_out=False), data.read(held_out=True)
    train = {r.image for source in train_roads for r in source} | {c.image for c in train_cutouts}
    held = {r.image for source in val_roads for r in source} | {c.image for c in val_cutouts}
    assert train
    assert held
    assert not train & held
    names = {c.image.stem for c in [*train_cutouts, *val_cutouts] if c.image.parent.parent.name == "grabcut"}
    # People and pictures of VOC, whose objects are in Fishyscapes Static, are never used.
    assert names == {"doll"}


def test_interrupted_training_equals_uninterrupted(data: ScorerData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_scorer(data, RECIPE, tmp_path / "whole")
    calls = 0
    read = OutlierExposure.__getitem__

    def interrupted(self: OutlierExposure, index: int) -> RoadSample:
        nonlocal calls
        calls += self.seed == RECIPE.seed
        if calls > 5:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(OutlierExposure, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_scorer(data, replace(RECIPE, checkpoint_minutes=0.0), tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint.pt").is_file()
    parts = train_scorer(data, RECIPE, tmp_path / "parts")
    expected, actual = load_weights(whole).state, load_weights(parts).state
    assert any((value - CompactNet().state_dict()[key]).abs().max() > 0 for key, value in actual.items())
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6)
    # Checkpoints of the first version hold no recipe; a longer run goes on from them.
    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({key: saved[key] for key in ("net", "average", "optimizer", "schedule", "done")}, checkpoint)
    train_scorer(data, replace(RECIPE, iterations=5), tmp_path / "parts")
    assert load_weights(parts).metadata["done"] == 5


def test_validation_recognises_a_perfect_score(data: ScorerData) -> None:
    batch = collate([sample(256), sample(1024)])

    class Oracle(CompactNet):
        def forward(self, image: torch.Tensor, trainable_from: int = 0) -> CompactOutput:
            logits = torch.nn.functional.one_hot(batch.semantic.clamp_max(6), 7).permute(0, 3, 1, 2).float()
            return CompactOutput(logits, batch.anomaly)

    quality = validate(Oracle(), [batch], torch.device("cpu"))
    assert quality["val_ap"] == pytest.approx(1.0)
    assert quality["val_miou"] == pytest.approx(1.0)


def test_start_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "other.safetensors", {"0.0.weight": torch.zeros(3)}, {})
    with pytest.raises(WeightsError, match="torchvision mobilenet_v2 features"):
        start_from(CompactNet(), tmp_path / "other.safetensors")
    net, copy = CompactNet(), CompactNet()
    save_weights(tmp_path / "own.safetensors", net.state_dict(), {}, half=False)
    start_from(copy, tmp_path / "own.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), copy.state_dict().values(), strict=True))


def test_command_trains_calibrates_and_the_scorer_runs(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "scorer", "--camvid", data_dir / "camvid", "--coco", data_dir / "coco", "--output", tmp_path, "--crop", 64, 96]
    arguments += ["--iterations", 2, "--batch-size", 2, "--workers", 0, "--device", "cpu"]
    assert main([str(a) for a in [*arguments, "--preview"]]) == 0
    assert (tmp_path / "preview.png").is_file()
    assert main([str(a) for a in arguments]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    weights = tmp_path / "compact_scorer.safetensors"
    metadata = load_weights(weights).metadata
    assert set(metadata["calibrations"]) == set(SCORES)
    assert metadata["recipe"]["iterations"] == 2
    assert str(data_dir) not in str(metadata)
    scorer = build(ScorerConfig(weights=str(weights), input_width=128), Runtime(torch.device("cpu")))
    assert scorer(torch.zeros(50, 120, 3, dtype=torch.uint8)).shape_hw == (50, 120)
    with (tmp_path / "log.csv").open() as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["2"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "at least one set of road images"),
        (["--camvid", "missing", "--coco", "missing"], "does not exist"),
        (["--crop", "65", "96"], "--crop is 65 96"),
    ],
)
def test_command_refuses(extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "scorer", "--output", str(tmp_path), *extra]) == 2
    assert message in capsys.readouterr().err


def test_loss_that_is_not_finite_stops_training(data: ScorerData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lower the learning rate"):
        train_scorer(data, replace(RECIPE, learning_rate=1e12, iterations=20, warm_up=1), tmp_path)


class Broken(Dataset[RoadSample]):
    """Its third sample cannot be read."""

    def __getitem__(self, index: int) -> RoadSample:
        if index == 2:
            raise InputError("picture 'c.jpg' cannot be read")
        return sample()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_cannot_read_is_one_line(workers: int) -> None:
    made = batches(Broken(), collate, size=1, iterations=range(4), workers=workers)
    assert next(made).image.shape == (1, 3, 64, 96)
    next(made)
    with pytest.raises(InputError, match=r"^picture 'c\.jpg' cannot be read$"):
        next(made)
