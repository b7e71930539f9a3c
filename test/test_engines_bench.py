"""``ood-seg bench engines`` measures each engine in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ros2_ood_seg import cli, engines_bench
from ros2_ood_seg.engines import openvino_installed


def test_boxes_lie_inside_the_frame_and_grow_towards_the_camera() -> None:
    boxes = engines_bench.spread_boxes(10, 1280, 720)
    assert boxes.shape == (10, 4)
    assert float(boxes.min()) >= 0.0
    assert float(boxes[:, 2].max()) <= 1280
    assert float(boxes[:, 3].max()) <= 720
    assert bool((boxes[:, 3] - boxes[:, 1]).diff().gt(0).all())


def test_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "engines.json"
    size = ["--width", "160", "--height", "96", "--prompts", "2", "--repeats", "1", "--threads", "1"]
    assert cli.main(["bench", "engines", "--profiles", "compact", *size, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    rows = report["engines"]
    assert [row["engine"] for row in rows] == (["torch", "openvino"] if openvino_installed() else ["torch"])
    for row in rows:
        assert row["peak_memory_mb"] > report["import_torch_mb"] > 50
        assert all(row[stage] > 0 for stage in (*engines_bench.STAGES, "total"))
    assert "compact" in capsys.readouterr().out


def test_refuses_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "engines", "--prompts", "0"]) == 2
    assert "--prompts is 0, allowed: 1 or more" in capsys.readouterr().err
