from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from ros2_ood_seg.cli import main
from ros2_ood_seg.config import FusionConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.fusion.overlaps import reported
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.scorers.networks.compact import CLASS_NAMES
from ros2_ood_seg.training.false_alarms import ClassAccuracy, Frames, Worst, half_score_for, measure, score_of_one_in
from ros2_ood_seg.training.road_images import IGNORE, read_camvid
from ros2_ood_seg.types import Calibration, FrameResult, Instances, Prompts, ScoreMap


def test_class_iou_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    accuracy = ClassAccuracy()
    pictures = [(rng.integers(0, 5, (20, 30), dtype=np.uint8), rng.integers(0, 5, (20, 30), dtype=np.uint8)) for _ in range(3)]
    for predicted, truth in pictures:
        truth[:4] = IGNORE
        accuracy.add(predicted, truth)
    predicted, truth = (np.concatenate([pair[k].ravel() for pair in pictures]) for k in (0, 1))
    known = truth != IGNORE
    expected = jaccard_score(truth[known], predicted[known], average=None, labels=range(5))
    assert list(accuracy.iou().values()) == pytest.approx(expected)
    assert list(accuracy.iou()) == list(CLASS_NAMES[:5])


class Alarmed:
    """Finds two things in every frame; knows the road below and says sky above."""

    def run(self, image: np.ndarray) -> FrameResult:
        height, width = image.shape[:2]
        masks = torch.zeros((2, height, width), dtype=torch.bool)
        masks[0, :10, :10] = True
        masks[1, 50:60, 50:60] = True
        instances = Instances.from_masks(masks, torch.tensor([0.9, 0.4]), torch.zeros(2), torch.ones(2))
        scores = torch.zeros((height, width))
        scores[: height // 2] = 0.7
        classes = torch.zeros((height, width), dtype=torch.uint8)
        classes[:40] = 6
        score_map = ScoreMap(scores, "alarmed", Calibration.linear(), classes, tuple(CLASS_NAMES))
        return FrameResult(instances, score_map, Prompts.empty(), scores, {"total": 5.0})


def test_what_is_counted(data_dir: Path) -> None:
    frames = Frames("camvid", read_camvid(data_dir / "camvid", "val"))
    worst = Worst(2)
    row = measure(cast("Pipeline", Alarmed()), frames, worst)
    assert row["frames"] == 3
    assert row["instances_per_20_frames"] == {"above 0.25": 40.0, "above 0.5": 20.0, "above 0.75": 20.0}
    assert row["frames_with_instance_above_0.5"] == 1.0
    assert row["pixels_above_0.5"] == 0.5
    assert row["miou"] == 1.0
    assert worst.picture() is not None


def test_frames_that_cannot_be_used_are_named(data_dir: Path) -> None:
    class Refusing:
        def run(self, image: np.ndarray) -> FrameResult:
            raise InputError("too small")

    frames = Frames("camvid", read_camvid(data_dir / "camvid", "val"))
    with pytest.raises(InputError, match=f"'{re.escape(str(frames.images[0].image))}': too small"):
        measure(cast("Pipeline", Refusing()), frames, Worst(1))


def test_score_that_few_exceed() -> None:
    scores = [0.2, 0.9, 0.4, 0.4]
    assert [score_of_one_in(scores, allowed) for allowed in range(5)] == [0.9, 0.4, 0.4, 0.2, 0.0]


@pytest.mark.parametrize(("score", "half_score"), [(0.3, 0.5), (0.8, 0.5), (0.3, 0.7), (0.8, 0.7), (0.5, 0.2)])
def test_half_score_makes_that_score_a_half(score: float, half_score: float) -> None:
    fused = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)
    now = reported(FusionConfig(half_score=half_score), fused)
    at = int((now - score).abs().argmin())
    after = reported(FusionConfig(half_score=half_score_for(score, half_score)), fused)
    assert float(after[at]) == pytest.approx(0.5, abs=1e-3)


def test_command_measures_and_draws(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "report.json"
    arguments = ["false-alarms", "--roads", data_dir / "roads", "--held-out", "--max-images", 2, "--output", output]
    arguments += ["--profile", "compact_s2m", "--set", "scorer.input_width=96", "--set", "scorer.second_scale=1.0"]
    arguments += ["--set", "scorer.coarse_scale=1.0"]
    assert main([str(word) for word in arguments]) == 0
    row = json.loads(output.read_text())["sets"]["roads"]
    assert row["frames"] == 2
    assert row["miou"] is None
    assert row["score_of_one_in_20_frames"] <= 1.0
    half_score = json.loads(output.read_text())["half_score"]
    assert (half_score is None) == (row["score_of_one_in_20_frames"] == 0.0)
    assert half_score is None or 0.0 < half_score < 1.0
    assert cv2.imread(str(output.with_suffix(".png"))) is not None
    assert "roads" in capsys.readouterr().out


def test_frames_without_instances_say_nothing_about_half_score(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"frames": 2, "instances_per_20_frames": {"above 0.5": 0.0}, "score_of_one_in_20_frames": 0.0, "miou": None}
    monkeypatch.setattr("ros2_ood_seg.training.false_alarms.measure", lambda *_: nothing)
    output = tmp_path / "report.json"
    assert main(["false-alarms", "--roads", str(data_dir / "roads"), "--output", str(output), "--profile", "compact_s2m"]) == 0
    assert json.loads(output.read_text())["half_score"] is None
    assert "fusion.half_score=" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "at least one of --camvid"),
        (["--roads", "nowhere"], "nowhere"),
        (["--roads", "DATA/roads", "DATA/roads", "DATA/roads"], "roads' twice"),
        (["--roads", "DATA/roads", "--output", "DATA"], "is a folder"),
        (["--camvid", "DATA/camvid"], "test"),
        (["--roads", "DATA/roads", "--max-images", "-1"], "--max-images is -1"),
        (["--roads", "DATA/roads", "--set", "scorer.nonsense=1"], "nonsense"),
    ],
)
def test_command_refuses(words: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("DATA", str(data_dir)) for word in words]
    assert main(["false-alarms", "--output", str(tmp_path / "report.json"), *words]) == 2
    assert message in capsys.readouterr().err


def test_sets_of_one_name_are_told_apart(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "roads"
    other.mkdir()
    cv2.imwrite(str(other / "frame.jpg"), np.full((100, 160, 3), 90, np.uint8))
    monkeypatch.setattr("ros2_ood_seg.training.false_alarms.Pipeline", lambda config: Alarmed())
    command = ["false-alarms", "--roads", str(data_dir / "roads"), str(other), "--output", str(tmp_path / "report.json")]
    assert main(command) == 0
    sets = json.loads((tmp_path / "report.json").read_text())["sets"]
    assert {name: row["frames"] for name, row in sets.items()} == {"roads": 24, str(other): 1}
