from __future__ import annotations

import json
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
from ros2_ood_seg.scorers.calibration import calibration_path
from ros2_ood_seg.scorers.mahalanobis import mahalanobis_distance
from ros2_ood_seg.scorers.networks.deeplab_resnet101 import DeepLabResNet101
from ros2_ood_seg.scorers.networks.deeplab_wrn38 import DeepLabWideResNet38
from ros2_ood_seg.scorers.statistics import read_feature_statistics, read_max_logit_statistics
from ros2_ood_seg.training.class_statistics import ClassMoments, make_statistics, write_feature_statistics, write_max_logit_statistics

CPU = torch.device("cpu")


def pixels(count: int, features: int, classes: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(0, classes, (count,), generator=generator)
    spread = 0.5 + torch.rand(classes, generator=generator)
    values = offset + labels + spread[labels] * torch.randn(features, count, generator=generator)
    values[0] += 0.5 * values[-1]
    return values.double(), labels


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streamed_moments_are_those_of_all_pixels(offset: float) -> None:
    values, labels = pixels(4000, 5, 3, offset)
    moments = ClassMoments(3)
    for part in torch.arange(4000).split([1, 999, 2000, 1000]):
        moments.add(values[:, part], labels[part])
    residuals = []
    for c in range(3):
        own = values[:, labels == c].numpy()
        np.testing.assert_allclose(moments.mean()[c], own.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance()[c], np.cov(own), rtol=1e-6)
        residuals.append(own - own.mean(axis=1, keepdims=True))
    everything = np.concatenate(residuals, axis=1)
    np.testing.assert_allclose(moments.pooled(), everything @ everything.T / (4000 - 3), rtol=1e-6)
    assert moments.count.sum() == 4000


def test_max_logit_statistics_of_rare_classes(tmp_path: Path) -> None:
    moments = ClassMoments(4)
    moments.add(torch.tensor([[1.0, 2.0, 3.0, 10.0]]), torch.tensor([0, 0, 0, 1]))
    write_max_logit_statistics(moments, tmp_path / "s.json")
    found = read_max_logit_statistics(tmp_path / "s.json")
    assert found.mean.tolist() == pytest.approx([2.0, 10.0, 4.0, 4.0])
    assert found.variance.tolist() == pytest.approx([1.0] * 4)
    constant = ClassMoments(2)
    constant.add(torch.ones(1, 5), torch.zeros(5, dtype=torch.long))
    with pytest.raises(InputError, match="same at every pixel"):
        write_max_logit_statistics(constant, tmp_path / "none.json")


def test_feature_statistics_give_the_distance_of_their_gaussians(tmp_path: Path) -> None:
    values, labels = pixels(20_000, 3, 2)
    moments = ClassMoments(4)
    moments.add(values, labels)
    moments.add(torch.tensor([[9.0], [8.0], [7.0]]), torch.tensor([2]))
    write_feature_statistics(moments, tmp_path / "s.safetensors")
    found = read_feature_statistics(tmp_path / "s.safetensors")
    own = values[:, labels == 1].numpy()
    z = np.array([2.0, 0.0, 1.0])
    expected = (z - own.mean(axis=1)) @ np.linalg.inv(np.cov(own)) @ (z - own.mean(axis=1))
    centred = torch.from_numpy(z).float() - found.mean[1]
    assert (centred @ found.inverse[1] @ centred).item() == pytest.approx(expected, rel=2e-3)
    # The class of one pixel has an inverse, and the one without any changes no distance.
    distance, _ = mahalanobis_distance(torch.tensor([9.0, 8.0, 7.0])[:, None, None], found)
    assert distance.item() == pytest.approx(0.0, abs=1e-3)
    frequent = int(moments.count.argmax())
    assert torch.equal(found.inverse[3], found.inverse[frequent])


def weights(tmp_path: Path, name: str, file: str = "w.pth") -> Path:
    torch.manual_seed(0)
    network = DeepLabResNet101(19, stem=8, structure=(1, 1, 1, 1)) if name == "sml" else DeepLabWideResNet38(19, stem=8, structure=(1,) * 6)
    path = tmp_path / file
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["sml", "mahalanobis"])
def test_command_makes_statistics_and_calibration(name: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights(tmp_path, name)
    config = ScorerConfig(name=name, weights=str(path), input_width=64)
    with pytest.raises(WeightsError, match=f"ood-seg calibrate --scorer {name} --images DIR"):
        SCORERS.get(name)(config, Runtime(CPU))
    arguments = ["calibrate", "--scorer", name, "--weights", path, "--images", data_dir / "roads", "--input-width", 64, "--max-images", 3]
    assert main([str(a) for a in arguments]) == 0
    statistics = tmp_path / f"w.statistics.{'json' if name == 'sml' else 'safetensors'}"
    assert str(statistics) in capsys.readouterr().out
    assert list(json.loads(calibration_path(path).read_text())) == [f"{name}/{'sml' if name == 'sml' else 'distance'}"]
    before = statistics.stat().st_mtime_ns
    image = torch.randint(0, 256, (40, 64, 3), dtype=torch.uint8)
    assert torch.isfinite(SCORERS.get(name)(config, Runtime(CPU))(image).scores).all()
    assert main([str(a) for a in arguments]) == 0
    assert "there are some already" in capsys.readouterr().out
    assert statistics.stat().st_mtime_ns == before
    assert main([str(a) for a in [*arguments, "--statistics"]]) == 0
    assert statistics.stat().st_mtime_ns > before


def test_statistics_somewhere_else_are_not_overwritten(data_dir: Path, tmp_path: Path) -> None:
    config = ScorerConfig(name="sml", weights=str(weights(tmp_path, "sml")), input_width=64, statistics="published.npy")
    with pytest.raises(InputError, match=r"'published.npy', which is never written to"):
        make_statistics(config, Runtime(CPU), [data_dir / "roads" / "frame_0.jpg"], anew=True)


def test_a_folder_that_cannot_be_written_is_named_before_a_picture_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScorerConfig(name="sml", weights=str(weights(tmp_path, "sml")), input_width=64)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="which cannot be written: copy the weights to a folder of yours"):
        make_statistics(config, Runtime(CPU), [tmp_path / "nowhere.jpg"])


def test_statistics_of_weights_with_brackets_in_their_name_are_found(tmp_path: Path) -> None:
    config = ScorerConfig(name="sml", weights=str(weights(tmp_path, "sml", "w[1].pth")), input_width=64)
    (tmp_path / "w[1].statistics.json").write_text("{}")
    assert make_statistics(config, Runtime(CPU), [tmp_path / "nowhere.jpg"]) is None


def test_other_scorers_need_none(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--scorer", "compact", "--images", str(data_dir / "roads"), "--statistics"]) == 2
    assert "scorer 'compact' needs none" in capsys.readouterr().err
