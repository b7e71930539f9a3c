"""The bag player in its own process; this one answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("ros2_ood_seg.msg", reason="the messages are not built (colcon build)")

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from harness import PATIENCE_S
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros2_ood_seg.msg import AnomalyInstanceArray
from sensor_msgs.msg import CompressedImage, Image

import ros2_ood_seg
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.replayed import PlayReport
from ros2_ood_seg.ros.images import image_to_rgb

pytestmark = pytest.mark.dds
STAMPS = [1_700_000_000_000_000_000 + k * 20_000_000 for k in range(5)]


def picture(k: int) -> np.ndarray:
    return np.full((24, 32, 3), 20 + 40 * k, np.uint8)


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bag") / "drive"
    with BagWriter(path) as writer:
        for k, stamp in enumerate(STAMPS):
            writer.write_image("/cam/image", picture(k), stamp, "cam")
            writer.write_jpeg("/other/image/compressed", picture(k), stamp, "cam")
    return path


class Answerer:
    """Stands for the segmenter: says of every image but the skipped ones that nothing is in it."""

    def __init__(self, domain: int, kind: type, skip: tuple[int, ...] = ()) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("ood_segmenter", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        reliable = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        topic = "image" if kind is Image else "image/compressed"
        self.node.create_subscription(kind, topic, self.on_image, reliable)
        self.answers = self.node.create_publisher(AnomalyInstanceArray, "ood_segmenter/instances", reliable)
        self.diagnostics = self.node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.node.create_timer(0.1, lambda: self.diagnostics.publish(DiagnosticArray(status=[DiagnosticStatus(name="/ood_segmenter")])))
        self.images: list[Image | CompressedImage] = []
        self.skip = skip

    def on_image(self, message: Image | CompressedImage) -> None:
        self.images.append(message)
        if len(self.images) - 1 not in self.skip:
            self.answers.publish(AnomalyInstanceArray(header=message.header))

    def close(self) -> None:
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def answer(dds: int) -> Iterator[object]:
    made: list[Answerer] = []

    def start(*arguments: object) -> Answerer:
        made.append(Answerer(dds, *arguments))
        return made[-1]

    yield start
    for one in made:
        one.close()


def start_player(domain: int, *arguments: str | Path) -> subprocess.Popen[str]:
    source = str(Path(ros2_ood_seg.__file__).resolve().parents[1])
    environment = dict(os.environ, ROS_DOMAIN_ID=str(domain), OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "ros2_ood_seg.ros.bag_player", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(player: subprocess.Popen[str], answerer: Answerer | None = None) -> tuple[int, str, str]:
    while answerer is not None and player.poll() is None:
        answerer.executor.spin_once(timeout_sec=0.05)
    out, err = player.communicate(timeout=PATIENCE_S)
    return player.returncode, out, err


def stamps(answerer: Answerer) -> list[int]:
    return [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in answerer.images]


def test_lockstep_sends_every_image_as_recorded(bag, dds, answer, tmp_path):
    answerer = answer(Image)
    code, out, _ = finish(start_player(dds, bag, "--topic", "/cam/image", "--lockstep", "--report", tmp_path / "r.json"), answerer)
    assert (code, out.strip()) == (0, "played 5 of 5 images, 5 answered")
    assert stamps(answerer) == STAMPS
    for k, message in enumerate(answerer.images):
        assert message.header.frame_id == "cam"
        np.testing.assert_array_equal(image_to_rgb(message), picture(k))
    report = PlayReport.load(tmp_path / "r.json")
    assert (report.recorded, report.answered, report.complete) == (5, 5, True)
    assert [frame.stamp_ns for frame in report.frames] == STAMPS
    assert min(frame.latency_ms for frame in report.frames) > 0


def test_lockstep_tries_an_unanswered_image_once_more(bag, dds, answer):
    answerer = answer(Image, (1,))
    code, out, _ = finish(start_player(dds, bag, "--topic", "/cam/image", "--lockstep", "--patience", "0.5"), answerer)
    assert (code, out.strip()) == (0, "played 5 of 5 images, 5 answered")
    assert stamps(answerer) == [STAMPS[0], STAMPS[1], STAMPS[1], *STAMPS[2:]]


def test_compressed_images_at_recorded_pace(bag, dds, answer):
    answerer = answer(CompressedImage)
    code, out, _ = finish(start_player(dds, bag, "--topic", "/other/image", "--max-frames", "3"), answerer)
    assert (code, out.strip()) == (0, "played 3 of 5 images, 3 answered")
    assert stamps(answerer) == STAMPS[:3]
    assert np.abs(image_to_rgb(answerer.images[2]).astype(int) - picture(2)).max() < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topic", "/nope"), "has no topic '/nope'; its topics: /cam/image [sensor_msgs/msg/Image, 5 messages]"),
        ((), "several image topics, choose one"),
        (("--topic", "/cam/image", "--wait-for-subscribers", "0.2"), "no node listens to 'image'"),
        (("--topic", "/cam/image", "--rate", "0"), "--rate is 0, it must be above 0"),
    ],
)
def test_what_cannot_be_played_is_named(bag, dds, arguments, message):
    code, _, err = finish(start_player(dds, bag, *arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
