"""Weights averaged with those of other trainings and with those they started from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ros2_ood_seg.cli import main
from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.segmenters.compact import FAMILY
from ros2_ood_seg.segmenters.networks.compact import CompactNet
from ros2_ood_seg.training.averaging import average_weights, check_averaging
from ros2_ood_seg.weights.store import WeightFile, load_weights, save_weights


def filled(path: Path, value: float) -> Path:
    """A segmenter all of whose weights are ``value``."""
    state = CompactNet().state_dict()
    state = {key: torch.full_like(weight, value) if weight.is_floating_point() else weight for key, weight in state.items()}
    save_weights(path, state, {"recipe": {"seed": 7}}, half=False)
    return path


def test_the_average_lies_between(tmp_path: Path) -> None:
    start, trained = filled(tmp_path / "start.safetensors", 1.0), filled(tmp_path / "trained.safetensors", 5.0)
    averaged = load_weights(average_weights(trained, load_weights(start), 0.25, CompactNet(), FAMILY, half=True))
    assert averaged.path == tmp_path / "averaged.safetensors"
    assert averaged.metadata == {"recipe": {"seed": 7}, "keep_start": 0.25}
    assert set(averaged.state) == set(CompactNet().state_dict())
    assert all((weight == 4.0).all() for weight in averaged.state.values() if weight.is_floating_point())


def test_several_trainings_share_what_the_start_leaves(tmp_path: Path) -> None:
    start, trained, other = (filled(tmp_path / f"{value}.safetensors", value) for value in (1.0, 5.0, 8.0))
    averaged = load_weights(average_weights(trained, load_weights(start), 0.2, CompactNet(), FAMILY, half=False, others=[other, other]))
    assert averaged.metadata == {"recipe": {"seed": 7}, "keep_start": 0.2, "averaged_with": [{"seed": 7}, {"seed": 7}]}
    assert all(torch.allclose(weight, torch.tensor(5.8)) for weight in averaged.state.values() if weight.is_floating_point())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = WeightFile(tmp_path / "other.safetensors", {"head.weight": torch.zeros(3)}, {})
    with pytest.raises(WeightsError, match=FAMILY):
        average_weights(filled(tmp_path / "trained.safetensors", 5.0), other, 0.5, CompactNet(), FAMILY, half=True)


def test_other_weights_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    start = load_weights(filled(tmp_path / "start.safetensors", 1.0))
    other = tmp_path / "other.safetensors"
    save_weights(other, {"head.weight": torch.zeros(3)}, {}, half=False)
    check_averaging(0.0, [start.path], "segmenter", start, CompactNet())
    with pytest.raises(WeightsError, match="segmenter"):
        check_averaging(0.0, [other], "segmenter", start, CompactNet())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-start", "1.0"], "--keep-start is 1.0, allowed: 0 to below 1"),
        (["--keep-start", "0.5"], "--keep-start needs an earlier segmenter as --init"),
        (["--keep-start", "0.5", "--init", "{base}"], "--keep-start needs an earlier segmenter as --init"),
        (["--average-with", "{base}", "--init", "{base}"], "--average-with needs an earlier segmenter as --init"),
    ],
)
def test_a_segmenter_without_a_start_is_refused_before_it_is_trained(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = filled(tmp_path / "base.safetensors", 0.0)
    command = ["train", "segmenter", "--objects", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*command, *(text.format(base=base) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
