from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from ros2_ood_seg import points_bench
from ros2_ood_seg.errors import InputError


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    points_bench.register(parser.add_subparsers())
    args = parser.parse_args(["points", "--device", "cpu", *arguments])
    return int(args.run(args))


def test_writes_milliseconds_of_each_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    assert run("--width", "96", "--height", "64", "--repeats", "2", "--count", "7", "--check", "--output", str(output)) == 0
    figures = json.loads(output.read_text())
    assert figures["candidates"] == 96 * 64
    assert set(figures["milliseconds"]) == {"fps", "kmeans", "random"}
    assert all(0 < times["least"] <= times["p50"] <= times["p95"] for times in figures["milliseconds"].values())
    assert "fps equals the sequential definition" in capsys.readouterr().out


def test_another_choice_of_points_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_bench, "farthest_points_float64", lambda candidates, count: np.zeros((count, 2)))
    assert run("--width", "20", "--height", "20", "--repeats", "1", "--check", "--samplers", "fps") == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--repeats", "0"), ("--share", "0"), ("--count", "0"), ("--device", "gpu")])
def test_unusable_numbers_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        run("--width", "20", "--height", "20", *arguments)
    assert "pydantic" not in str(caught.value)
