"""``ood-seg evaluate --realtime`` as a user runs it: command, node and player in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("ros2_ood_seg.msg", reason="the messages are not built (colcon build)")

from harness import PATIENCE_S

import ros2_ood_seg
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.bags import BagReader
from ros2_ood_seg.ros import replay

pytestmark = pytest.mark.dds
FRAMES, STEP_NS, START_NS, LAG_NS = 10, 200_000_000, 1_700_000_000_000_000_000, 15_000_000
PROFILE = """\
scorer: {input_width: 64, second_scale: 1.0, coarse_scale: 1.0}
prompts:
  boxes: {method: components, threshold: 0.3, min_area_px: 5}
segmenter: {name: grabcut}
fusion: {name: s2m}
runtime: {device: cpu, threads: 1}
"""


def write_drive(path: Path) -> None:
    with BagWriter(path) as bag:
        for k in range(FRAMES):
            stamp = START_NS + k * STEP_NS
            image = np.random.default_rng(k).integers(90, 110, (96, 128, 3), dtype=np.uint8)
            label = np.zeros((96, 128), np.uint8)
            label[40:60, 30 + k : 60 + k] = 1
            image[label == 1] = (240, 30, 200)
            bag.write_image("/label", label, stamp)
            bag.write_jpeg("/front/compressed", image, stamp, "front", time_ns=stamp + LAG_NS)


def test_a_drive_in_real_time(tmp_path):
    write_drive(tmp_path / "drive")
    (tmp_path / "quick.yaml").write_text(PROFILE)
    output = tmp_path / "report.json"
    source = str(Path(ros2_ood_seg.__file__).resolve().parents[1])
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "ros2_ood_seg.cli", "evaluate", "--bag", tmp_path / "drive", "--realtime", "2", "--output", output]
    command += ["--profile", tmp_path / "quick.yaml", "--image-topic", "/front", "--label-topic", "/label", "--clips", tmp_path / "clips"]
    command += ["--clip-min-score", "0", "--clip-min-frames", "1"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "latency p50" in done.stdout

    report = json.loads(output.read_text())
    node = report["node"]
    assert node["mode"] == "2 times the recorded speed: the newest frame counts"
    assert (node["frames_recorded"], node["frames_played"], node["played_to_the_end"]) == (FRAMES, FRAMES, True)
    assert 1 <= node["frames_answered"] <= FRAMES
    dropped = node["frames_replaced"] + node["frames_lost"] + node["frames_rejected"]
    assert dropped == FRAMES - node["frames_answered"] == round(node["drop_rate"] * FRAMES)
    assert 0 < node["latency_ms"]["p50"] <= node["latency_ms"]["p90"] <= node["latency_ms"]["p99"]
    assert node["age_ms"]["p50"] == pytest.approx(node["latency_ms"]["p50"] + LAG_NS / 1e6)
    assert 0.0 <= node["stale"]["rate"] <= 1.0
    sent = node["timeline"]["sent_s"]
    assert sent[-1] >= (FRAMES - 1) * STEP_NS / 1e9 / 2 - 0.01, "not faster than asked for"
    assert report["profile"] == "quick"
    assert report["images"] == report["drive"]["bags"][0]["labelled"] == node["frames_answered"]
    assert 0.0 <= report["refined"]["ap"] <= 1.0
    with BagReader(tmp_path / "report.mcap") as results:
        counts = {topic.name: topic.count for topic in results.topics}
    assert counts["/front/compressed"] == counts["/ood_segmenter/instances"] == counts["/ood_segmenter/overlay/compressed"]
    assert counts["/ood_segmenter/instances"] == node["frames_answered"]
    assert (tmp_path / "clips/clips.json").is_file()
    assert not (tmp_path / "report.replay").exists(), "logs are kept only when something fails"
    assert "Running node" in (tmp_path / "report.html").read_text()


def test_a_node_that_cannot_start_is_told_with_its_log(tmp_path):
    from ros2_ood_seg.config import load_profile
    from ros2_ood_seg.errors import ProcessError
    from ros2_ood_seg.ros.replay import replay

    write_drive(tmp_path / "drive")
    broken = load_profile("compact").model_copy(update={"profile": "broken"})
    broken = broken.model_copy(update={"scorer": broken.scorer.model_copy(update={"name": "no_such_scorer", "input_width": 1})})
    with pytest.raises(ProcessError, match="the node ended with code 2"), replay(tmp_path / "drive", "/front", broken, tmp_path / "replay"):
        pass
    assert "input_width" in (tmp_path / "replay" / "node.log").read_text()


def test_the_size_is_that_of_the_first_image_that_can_be_decoded(tmp_path):
    with BagWriter(tmp_path / "drive") as bag:
        bag.write_jpeg("/front/compressed", np.zeros((96, 128, 3), np.uint8), START_NS, "front")
    with BagReader(tmp_path / "drive") as bag:
        whole = next(bag.iter_raw(["/front/compressed"]))
        image = bag.message(whole)
    image.data = image.data[: len(image.data) // 2]
    with BagWriter(tmp_path / "cut") as bag:
        bag.write("/front/compressed", image, START_NS)
        bag.write_jpeg("/front/compressed", np.zeros((96, 128, 3), np.uint8), START_NS + STEP_NS, "front")
    with BagReader(tmp_path / "cut") as bag:
        assert replay._size(bag, "/front/compressed") == (96, 128)
    with BagWriter(tmp_path / "none") as bag:
        bag.write("/front/compressed", image, START_NS)
    with BagReader(tmp_path / "none") as bag:
        assert replay._size(bag, "/front/compressed") is None


def test_images_without_stamps_of_their_own_are_refused(tmp_path):
    with BagWriter(tmp_path / "drive") as bag:
        for k in range(3):
            bag.write_jpeg("/front/compressed", np.zeros((96, 128, 3), np.uint8), 0, "front", time_ns=START_NS + k)
    with BagReader(tmp_path / "drive") as bag, pytest.raises(InputError, match="the first 3 images of '/front/compressed' have 1 stamps"):
        replay._size(bag, "/front/compressed")


def test_what_a_killed_replay_left_is_removed(tmp_path):
    (tmp_path / "replay" / ".bag-x").mkdir(parents=True)
    (tmp_path / "replay" / ".bag-x" / "half.mcap").write_bytes(b"")
    (tmp_path / "replay" / "node.log").write_bytes(b"")
    replay._empty(tmp_path / "replay")
    assert not list((tmp_path / "replay").iterdir())
