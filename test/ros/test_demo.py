"""The demo as `make demo` runs it, on a short drive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("ros2_ood_seg.msg", reason="the messages are not built (colcon build)")

from harness import PATIENCE_S

from ros2_ood_seg.evaluation.bag_messages import instances_from_message
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.bags import BagReader
from ros2_ood_seg.ros.demo import main
from ros2_ood_seg.ros.replay import process

pytestmark = pytest.mark.dds
ROOT = Path(__file__).resolve().parents[2]


def run_demo(output: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    command = [sys.executable, ROOT / "tools" / "demo.py", "--output", output, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=3 * PATIENCE_S, check=False)


def test_a_generated_drive_becomes_report_bag_and_pictures(tmp_path):
    output = tmp_path / "demo"
    done = run_demo(output, "--frames", "2", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.strip().splitlines()[-4:]] == ["found", "right", "speed", "look at"]

    report = json.loads((output / "report.json").read_text())
    assert report["images"] == 2
    groups = ("pixel", "refined", "baseline", "s2m", "s2m_code", "component", "instance", "timings_ms", "node")
    assert set(groups) <= set(report)
    assert 0.0 <= report["pixel"]["ap"] <= 1.0
    assert report["timings_ms"]["total"]["p50"] > 0
    assert (report["node"]["frames_played"], report["node"]["frames_answered"], report["node"]["frames_replaced"]) == (2, 2, 0)

    with BagReader(output / "results.mcap") as bag:
        counts = {topic.name: topic.count for topic in bag.topics}
        assert counts == {
            "/camera/image/compressed": 2,
            "/ood_segmenter/boxes": 2,
            "/ood_segmenter/instances": 2,
            "/ood_segmenter/overlay/compressed": 2,
            "/ood_segmenter/timing": 2,
        }
        sources = {image.stamp_ns: image.rgb() for image in bag.iter_images("/camera/image")}
        overlays = {image.stamp_ns: image.rgb() for image in bag.iter_images("/ood_segmenter/overlay")}
        assert sources.keys() == overlays.keys()
        for raw in bag.iter_raw(["/ood_segmenter/instances"]):
            assert raw.time_ns in sources, "log times are the stamps of the images"
            found = instances_from_message(bag.message(raw), (540, 960))
            inside = found.masks.any(dim=0).numpy()
            change = np.abs(sources[raw.time_ns].astype(int) - overlays[raw.time_ns]).max(axis=2)
            assert not inside.any() or change[inside].mean() > change[~inside].mean()

    pictures = sorted(path.name for path in output.glob("overlay_*.png"))
    assert pictures == ["overlay_0000.png", "overlay_0001.png", "overlay_panels.png", "overlay_sheet.png"]
    assert cv2.imread(str(output / "overlay_0001.png")).shape == (540, 960, 3)


def test_bags_and_topics_that_are_not_there_are_named(tmp_path, capsys):
    with BagWriter(tmp_path / "bag") as bag:
        for name in ("/left", "/right"):
            bag.write_image(name, np.zeros((32, 32, 3), np.uint8), 1)
    cases = (
        (("--bag", tmp_path / "none"), "does not exist"),
        (("--bag", tmp_path / "bag"), "several image topics, choose one: /left"),
        (("--bag", tmp_path / "bag", "--topic", "/front"), "no topic '/front'; its topics: /left"),
        (("--profile", "nope"), "unknown profile 'nope'"),
    )
    for arguments, message in cases:
        assert main(["--output", str(tmp_path / "demo"), *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("word", "value"), [("--max-seconds", "0"), ("--max-seconds", "nan"), ("--rate", "-1")])
def test_times_that_cannot_be_are_refused(tmp_path, capsys, word, value):
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "demo"), word, value])
    assert f"{word} is {value}" in capsys.readouterr().err


def test_a_recording_that_has_the_name_of_the_results_is_not_replaced(tmp_path, capsys):
    for path in (tmp_path / "bag", tmp_path / "demo" / "results.mcap"):
        with BagWriter(path) as bag:
            bag.write_image("/camera", np.zeros((32, 32, 3), np.uint8), 1)
    for bag in (tmp_path / "bag", tmp_path / "demo" / "results.mcap"):
        assert main(["--output", str(tmp_path / "demo"), "--bag", str(bag)]) == 2
        assert "results.mcap' would replace a recording" in capsys.readouterr().err
    with BagReader(tmp_path / "demo" / "results.mcap") as bag:
        assert [topic.name for topic in bag.topics] == ["/camera"]


def test_processes_that_ignore_an_interrupt_are_ended(tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    log = tmp_path / "log"
    with process([sys.executable, "-c", stubborn], log, patience_s=0.3) as child:
        while "up" not in log.read_text():
            assert child.poll() is None
    assert child.poll() is not None
