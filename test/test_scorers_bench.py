"""``ood-seg bench scorers`` measures every scorer and writes what it printed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from ros2_ood_seg import scorers_bench
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.scorers import SCORERS


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    scorers_bench.register(parser.add_subparsers())
    args = parser.parse_args(["scorers", *arguments])
    return int(args.run(args))


def test_writes_time_memory_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    arguments = ("--width", "128", "--height", "64", "--repeats", "2", "--device", "cpu", "--output", str(output))
    assert run("--scorers", "torchvision_segmentation", *arguments) == 0
    figures = json.loads(output.read_text())["scorers"]["torchvision_segmentation"]
    assert 0 < figures["p50_ms"] <= figures["p95_ms"]
    assert figures["peak_memory_mb"] > 50
    # The published size of LR-ASPP with 21 classes.
    assert figures["parameters"] == 3_221_538
    printed = capsys.readouterr().out
    assert "torchvision_segmentation" in printed
    assert "random weights" in printed


# With 19 classes, and without what only training uses; sources in docs/scorers.md.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("rpl", 167.999),
        ("dense_hybrid_ldn121", 11.065),
        ("segformer", 84.611),
        ("gmmseg", 84.658),
        ("rba", 95.142),
        ("mask2anomaly", 46.376),
    ],
)
def test_networks_have_the_sizes_of_their_releases(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = scorers_bench.NETWORKS[name]()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.001)


def test_counts_the_bundled_network() -> None:
    assert scorers_bench._bundled_parameters() / 1e6 == pytest.approx(1.95, abs=0.01)


def test_knows_every_scorer_that_has_a_network_to_load() -> None:
    assert {"compact", "external", *scorers_bench.NETWORKS} == set(SCORERS.names)
    with pytest.raises(InputError, match="--repeats is 0"):
        run("--repeats", "0")


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'runtime.device' is 'gpu', allowed: text \(auto"):
        scorers_bench.measure("compact", tmp_path, 64, 64, 1, "gpu", "auto")
