"""``ood-seg bench node``: what the node costs beside the pipeline, measured from another process over DDS."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from numpy.typing import NDArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from ros2_ood_seg.config import load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.msg import AnomalyInstanceArray, FrameTiming
from ros2_ood_seg.ros import qos
from ros2_ood_seg.ros.images import array_to_image
from ros2_ood_seg.ros.transport import make_room_for_images
from ros2_ood_seg.synthetic.drive import SyntheticDrive

WARM_UP_FRAMES = 3
_START_S = 300.0
_ANSWER_S = 120.0
_RETRY_S = 5.0
_IMAGES = ("instance_mask", "anomaly_map", "overlay")


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ood-seg bench node``."""
    parser = kinds.add_parser("node", help="milliseconds that conversion, messages and transport take beside the pipeline")
    parser.add_argument("--profile", default="compact")
    parser.add_argument("--width", type=int, default=1280, help="px")
    parser.add_argument("--height", type=int, default=720, help="px")
    parser.add_argument("--frames", type=int, default=30, help="measured frames after three that warm up")
    parser.add_argument("--images", action="store_true", help="also subscribe to label image, anomaly map and overlay")
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.frames < 1:
        raise InputError(f"--frames is {args.frames}, allowed: 1 or more")
    external = load_profile(args.profile).scorer.name == "external"
    # A domain of its own: nothing else may talk, and nothing else shall hear.
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    make_room_for_images()
    options = {"profile": args.profile, "warm_up.width": args.width, "warm_up.height": args.height}
    command = [sys.executable, "-m", "ros2_ood_seg.ros.node", "--ros-args"]
    node = subprocess.Popen([*command, *(word for name, value in options.items() for word in ("-p", f"{name}:={value}"))])
    try:
        rclpy.init(args=[])
        rows = _measure(_Probe(node, args.images, external), args)
    finally:
        rclpy.try_shutdown()
        node.terminate()
        node.wait(_ANSWER_S)
    report = {
        name: {"best": min(ms), "p50": float(np.percentile(ms, 50)), "p95": float(np.percentile(ms, 95))} for name, ms in rows.items()
    }
    print(f"{args.profile} on {args.width}x{args.height} bgr8, {args.frames} frames")
    for name, ms in report.items():
        print(f"  {name:32} best {ms['best']:8.1f} ms   p50 {ms['p50']:8.1f} ms   p95 {ms['p95']:8.1f} ms")
    if args.output is not None:
        args.output.write_text(json.dumps({"profile": args.profile, "timings_ms": report}, indent=2) + "\n", encoding="utf-8")
    return 0


class _Probe:
    """Sends a frame and clocks what comes back."""

    def __init__(self, node: subprocess.Popen[bytes], images: bool, external: bool) -> None:
        self._process = node
        self._node = rclpy.create_node("bench")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._image = self._node.create_publisher(Image, "image", qos_profile_sensor_data)
        self._map = self._node.create_publisher(Image, "anomaly_map", qos_profile_sensor_data) if external else None
        self._arrivals: dict[str, tuple[float, Any]] = {}
        topics: dict[str, tuple[type, Any]] = {
            "instances": (AnomalyInstanceArray, qos.small_output()),
            "timing": (FrameTiming, qos.small_output()),
        }
        topics |= dict.fromkeys(_IMAGES if images else (), (Image, qos_profile_sensor_data))
        for name, (kind, profile) in topics.items():
            self._node.create_subscription(kind, f"ood_segmenter/{name}", self._recorder(name), profile)
        self._topics = tuple(topics)
        self._sent = 0
        publishers = [publisher for publisher in (self._image, self._map) if publisher is not None]
        if not self._until(lambda: all(publisher.get_subscription_count() for publisher in publishers), _START_S):
            raise InputError(f"the node did not subscribe within {_START_S:.0f} s, its reason may be above")

    def ask(self, image_bgr: NDArray[np.uint8], scores: NDArray[np.float32]) -> tuple[dict[str, float], FrameTiming]:
        """Seconds until each topic answered, and what the node says about the frame."""
        end = time.monotonic() + _ANSWER_S
        while time.monotonic() < end:
            # Best effort may lose a frame; its second try is another frame.
            self._sent += 1
            header = Header(frame_id="bench")
            header.stamp.sec = self._sent
            message, anomaly_map = array_to_image(image_bgr, "bgr8", header), array_to_image(scores, "32FC1", header)
            self._arrivals.clear()
            start = time.perf_counter()
            if self._map is not None:
                self._map.publish(anomaly_map)
            self._image.publish(message)
            if self._until(lambda: len(self._arrivals) == len(self._topics), _RETRY_S):
                return {name: arrived - start for name, (arrived, _) in self._arrivals.items()}, self._arrivals["timing"][1]
        raise InputError(f"the node did not answer within {_ANSWER_S:.0f} s, its reason may be above")

    def _recorder(self, name: str) -> Callable[[Any], None]:
        def record(message: Any) -> None:
            if message.header.stamp.sec == self._sent:
                self._arrivals[name] = (time.perf_counter(), message)

        return record

    def _until(self, condition: Callable[[], bool], patience_s: float) -> bool:
        end = time.monotonic() + patience_s
        while not condition():
            if self._process.poll() is not None:
                raise InputError(f"the node ended with exit code {self._process.returncode}, its reason is above")
            if time.monotonic() > end:
                return False
            self._executor.spin_once(timeout_sec=0.1)
        return True


def _measure(probe: _Probe, args: argparse.Namespace) -> dict[str, list[float]]:
    count = WARM_UP_FRAMES + args.frames
    rows: dict[str, list[float]] = {}
    for number, frame in enumerate(SyntheticDrive(seed=0, height=args.height, width=args.width, frames=count), start=1):
        bgr = np.ascontiguousarray(frame.image[..., ::-1])
        arrivals, timing = probe.ask(bgr, (frame.instances > 0).astype(np.float32))
        if number <= WARM_UP_FRAMES:
            continue
        stages = dict(zip(timing.stages, timing.duration_ms, strict=True))
        row = {"pipeline": stages["total"], "conversion to RGB": stages["decode"]}
        row["beside the pipeline"] = max(arrivals["instances"], arrivals["timing"]) * 1e3 - stages["total"]
        if args.images:
            row["beside the pipeline, with images"] = max(arrivals.values()) * 1e3 - stages["total"]
        for name, ms in row.items():
            rows.setdefault(name, []).append(ms)
    return rows
