"""``ood-seg bench scorers`` measures every scorer and writes what it printed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

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
    assert "torchvision_segmentation" in capsys.readouterr().out


def test_knows_every_scorer_that_has_a_network_to_load() -> None:
    assert set(scorers_bench.NETWORKS) <= set(SCORERS.names)
    with pytest.raises(InputError, match="--repeats is 0"):
        run("--repeats", "0")
