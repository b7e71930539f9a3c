"""A node in a process of its own, and a client that talks to it over DDS."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image

import ros2_ood_seg
from ros2_ood_seg.ros.outputs import IMAGE_TOPICS, SMALL_TOPICS
from ros2_ood_seg.ros.transport import make_room_for_images

PATIENCE_S = 200.0
T = TypeVar("T")

PROFILE = """\
scorer:
  name: external
  external_high: 1.0
prompts:
  boxes:
    method: components
    threshold: 0.5
    min_area_px: 20
segmenter:
  name: grabcut
fusion:
  name: s2m
tracking:
  enabled: true
"""


_tries = itertools.count(os.getpid() * 7)


def free_domain() -> int:
    """A DDS domain (1 to 100), another at every call, whose first port nobody uses on this machine."""
    for number in itertools.islice(_tries, 100):
        domain = 1 + number % 100
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", 7400 + 250 * domain + 10))
            except OSError:
                continue
        return domain
    raise RuntimeError("all DDS domains are in use")


class Process:
    """A process in a DDS domain; its output goes to a file.

    Args:
        command: What to start.
        folder: Where it runs and leaves its output.
        domain: DDS domain.
    """

    def __init__(self, command: Sequence[str], folder: Path, domain: int) -> None:
        # The package under test comes first, whatever is installed.
        source = str(Path(ros2_ood_seg.__file__).resolve().parents[1])
        environment = dict(os.environ, ROS_DOMAIN_ID=str(domain), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, environment.get("PYTHONPATH"))))
        self._log = folder / "output.txt"
        with self._log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def end(self, by: signal.Signals = signal.SIGINT) -> int:
        """Ends it and returns its exit code."""
        self.process.send_signal(by)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """Makes sure that it is gone."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)


class NodeProcess(Process):
    """The node in its own process.

    Args:
        folder: For its profile and its output.
        domain: DDS domain.
        command: What to start instead of the node.
        remaps: Remapping rules.
        parameters: Parameters, with ``__`` for dots.
    """

    def __init__(self, folder: Path, domain: int, command: Sequence[str] = (), remaps: Sequence[str] = (), **parameters: Any) -> None:
        folder.mkdir(exist_ok=True)
        profile = folder / "external.yaml"
        profile.write_text(PROFILE)
        given = {"profile": profile, "diagnostics_period_s": 0.2, "warm_up.height": 96, "warm_up.width": 128}
        given |= {name.replace("__", "."): value for name, value in parameters.items()}
        options = [word for name, value in given.items() for word in ("-p", f"{name}:={value}")]
        options += [word for rule in remaps for word in ("-r", rule)]
        super().__init__([*(command or (sys.executable, "-m", "ros2_ood_seg.ros.node")), "--ros-args", *options], folder, domain)


class Client:
    """Sends images and anomaly maps to the node and collects all it answers."""

    def __init__(self, domain: int, namespace: str = "") -> None:
        make_room_for_images()
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("client", namespace=namespace, context=self.context)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        reliable = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        self.images = self.node.create_publisher(Image, "image", reliable)
        self.maps = self.node.create_publisher(Image, "anomaly_map", reliable)
        self.compressed = self.node.create_publisher(CompressedImage, "image/compressed", reliable)
        self.answers: dict[str, list[Any]] = {name: [] for name in (*SMALL_TOPICS, *IMAGE_TOPICS)}
        for topics, quality in ((SMALL_TOPICS, reliable), (IMAGE_TOPICS, qos_profile_sensor_data)):
            for name, kind in topics.items():
                self.node.create_subscription(kind, f"ood_segmenter/{name}", self.answers[name].append, quality)
        self.diagnostics: dict[str, str] = {}
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _on_diagnostics(self, message: Any) -> None:
        status = message.status[0]
        self.diagnostics = {entry.key: entry.value for entry in status.values} | {"message": status.message}

    def until(self, condition: Callable[[], T], what: str, again: Callable[[], None] | None = None) -> T:
        """Spins until the condition holds; on the way calls ``again`` every second, for what best effort may lose."""
        start = last = time.monotonic()
        while time.monotonic() - start < PATIENCE_S:
            self._executor.spin_once(timeout_sec=0.05)
            if value := condition():
                return value
            if again is not None and time.monotonic() - last > 1.0:
                again()
                last = time.monotonic()
        raise AssertionError(f"waited in vain for {what}")

    def spin(self, seconds: float) -> None:
        """Takes what comes for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def connect(self, *publishers: Any) -> None:
        """Waits until the node listens and all its topics are there."""
        publishers = publishers or (self.images, self.maps)
        self.until(lambda: all(p.get_subscription_count() for p in publishers), "the node to subscribe")
        subscriptions = [s for s in self.node.subscriptions if "ood_segmenter/" in s.topic_name]
        self.until(lambda: all(self.node.count_publishers(s.topic_name) for s in subscriptions), "the node's topics")

    def answer(self, topic: str, stamp_ns: int) -> Any | None:
        """The message of that stamp on an output topic, if it has come."""
        return next((m for m in self.answers[topic] if m.header.stamp.sec * 10**9 + m.header.stamp.nanosec == stamp_ns), None)

    def call(self, kind: type, service: str, request: Any) -> Any:
        """Calls a service of the node."""
        client = self.node.create_client(kind, f"ood_segmenter/{service}")
        self.until(client.service_is_ready, f"service {service}")
        future = client.call_async(request)
        self.until(future.done, f"the answer of {service}")
        self.node.destroy_client(client)
        return future.result()

    def close(self) -> None:
        """Leaves the domain."""
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def scene(*boxes_xyxy: tuple[int, int, int, int], height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A grey road with bright objects, (H, W, 3) uint8, and its score map, (H, W) float32: 0.9 on objects, 0.1 elsewhere."""
    image = np.random.default_rng(0).integers(90, 110, (height, width, 3), dtype=np.uint8)
    scores = np.full((height, width), 0.1, np.float32)
    for x_min, y_min, x_max, y_max in boxes_xyxy:
        image[y_min:y_max, x_min:x_max] = (230, 60, 20)
        scores[y_min:y_max, x_min:x_max] = 0.9
    return image, scores
