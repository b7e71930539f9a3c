from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ros2_ood_seg.cli import main
from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.scorers.calibration import read_calibration
from ros2_ood_seg.scorers.compact import build
from ros2_ood_seg.scorers.networks.compact import CompactNet
from ros2_ood_seg.training.calibrate import calibrate, calibrate_compact
from ros2_ood_seg.training.outlier_exposure import list_images
from ros2_ood_seg.types import Calibration, ScoreMap
from ros2_ood_seg.weights.store import save_weights

CPU = torch.device("cpu")


class Uniform:
    """Scores spread evenly over [0, 1)."""

    name = "uniform"

    def __call__(self, image: torch.Tensor, external: torch.Tensor | None = None) -> ScoreMap:
        scores = torch.rand(200, 300, generator=torch.Generator().manual_seed(int(image[0, 0, 0])))
        return ScoreMap(scores, self.name, Calibration.linear())


def test_known_distribution_gives_its_quantiles(data_dir: Path) -> None:
    result = calibrate(Uniform(), list_images(data_dir / "roads"), CPU)
    # P(score > 0.99) = 10**-2, and one pixel in 10**6 is 1.
    assert float(result.to_unit(torch.tensor(0.99))) == pytest.approx(2 / 6, abs=0.01)
    assert float(result.to_unit(torch.tensor(0.9))) == pytest.approx(1 / 6, abs=0.01)
    assert result == calibrate(Uniform(), list_images(data_dir / "roads"), CPU)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "own.safetensors"
    save_weights(path, CompactNet().state_dict(), {"calibrations": {"outlier": Calibration.linear(-7, 7).to_dict()}}, half=False)
    return path


def test_command_writes_what_the_scorer_then_uses(weights: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, runtime = ScorerConfig(weights=str(weights), input_width=128), Runtime(CPU)
    image = torch.zeros(50, 80, 3, dtype=torch.uint8)
    assert build(config, runtime)(image).calibration == Calibration.linear(-7, 7)
    arguments = ["calibrate", "--scorer", "compact", "--weights", weights, "--images", data_dir / "camvid" / "train" / "images"]
    assert main([str(a) for a in [*arguments, "--input-width", 128, "--max-images", 2]]) == 0
    path = weights.with_suffix(".calibration.json")
    assert str(path) in capsys.readouterr().out
    stored = json.loads(path.read_text())
    assert list(stored) == ["compact/outlier"]
    assert build(config, runtime)(image).calibration == Calibration.from_dict(stored["compact/outlier"])


def test_all_scores_of_the_compact_scorer_at_once(weights: Path) -> None:
    scorer = build(ScorerConfig(weights=str(weights), input_width=256), Runtime(CPU))
    image = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    found = calibrate_compact(scorer, [image])
    raw = scorer.logits(torch.from_numpy(image)).outlier_logit
    assert found["outlier"].to_raw(-np.log10(0.5) / 6) == pytest.approx(float(raw.median()), abs=1e-3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-images", "0"], "--max-images is 0"),
        (["--score", "nonsense"], "calibrate: 'scorer.score' is 'nonsense', allowed: one of default, "),
        (["--images", "x"], "'x'"),
    ],
)
def test_command_refuses(extra: list[str], message: str, weights: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["calibrate", "--scorer", "compact", "--weights", str(weights), "--images", str(data_dir / "roads"), *extra]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_scored(
    weights: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["calibrate", "--scorer", "compact", "--weights", str(weights), "--images", str(data_dir / "roads")]) == 2
    assert "whose folder cannot be written: copy the file to one of yours" in capsys.readouterr().err


def test_what_the_warning_names_makes_the_calibration(tmp_path: Path, data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    for key, words in (
        ("rba/rba", "--scorer rba --weights {w} --images DIR'"),
        ("rba/rba_tanh", "--scorer rba --weights {w} --images DIR --score rba_tanh'"),
        ("pebal/energy@2", "--scorer pebal --weights {w} --images DIR --score energy --set scorer.temperature=2'"),
    ):
        caplog.clear()
        read_calibration(tmp_path / "w.pth", key, Calibration.linear())
        assert words.format(w=tmp_path / "w.pth") in caplog.text


def test_further_settings_of_the_scorer_count(weights: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", "--scorer", "compact", "--weights", str(weights), "--images", str(data_dir / "roads"), "--max-images", "2"]
    assert main([*command, "--input-width", "256", "--set", "scorer.coarse_scale=1.0", "--set", "scorer.second_scale=1.0"]) == 0
    assert main([*command, "--set", "fusion.name=s2m"]) == 2
    assert "only settings of the scorer count here" in capsys.readouterr().err
