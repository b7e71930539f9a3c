"""Replays a recording through the running node: node and bag player as processes of their own, in a DDS domain of their own."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import rclpy
import yaml
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from tqdm import tqdm

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.errors import InputError, ProcessError
from ros2_ood_seg.evaluation.bag_messages import COMPRESSED_IMAGE, header_stamp_ns
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.bags import BagReader
from ros2_ood_seg.evaluation.replayed import PlayReport, Recording
from ros2_ood_seg.evaluation.results_bag import NODE
from ros2_ood_seg.ros.recorder import Recorder
from ros2_ood_seg.ros.transport import make_room_for_images

_OUTPUTS = ("instances", "boxes", "timing")
_START_S = 120.0
_LOOKED_AT = 50
_GRACE_S = 5.0


@contextlib.contextmanager
def replay(
    bag: Path,
    topic: str,
    config: PipelineConfig,
    folder: Path,
    *,
    rate: float | None = 1.0,
    maps: bool = False,
    most: int = 0,
    max_seconds: float = math.inf,
) -> Iterator[Recording]:
    """Plays a recording to a node and records its answers.

    Args:
        bag: Recording.
        topic: Full name of its camera topic.
        config: The node's settings.
        folder: For logs and answers; removed at the end unless something fails.
        rate: Speed, 1 is as recorded; None sends the next image when the last one is answered.
        maps: Also record the node's anomaly map.
        most: Stop after so many images, 0 for all.
        max_seconds: Stop after this time.

    Yields:
        What was recorded, as long as the context is open.

    Raises:
        InputError: The recording cannot be used.
        ProcessError: Node or player failed; the message holds the end of its output.
    """
    with BagReader(bag) as reader:
        camera = reader.image_topic(topic)
        size = _size(reader, camera.name)
    _empty(folder)
    transport = "compressed" if camera.msgtype == COMPRESSED_IMAGE else "raw"
    parameters = {
        "profile": _write_profile(folder, config),
        "image_transport": transport,
    }
    if size is not None:
        parameters |= {"warm_up.height": size[0], "warm_up.width": size[1]}
    if maps:
        # Every map counts, also those that come while the recorder writes; on a vehicle only the newest does.
        parameters[f"qos_overrides.{NODE}/anomaly_map.publisher.depth"] = 10
    if rate is None:
        # In step, every frame counts; best effort would lose large images on a busy machine.
        parameters[f"qos_overrides./image{'/compressed' if transport == 'compressed' else ''}.subscription.reliability"] = "reliable"
    executable = shutil.which("ood_seg_node")
    node = [executable] if executable else [sys.executable, "-m", "ros2_ood_seg.ros.node"]
    node += ["--ros-args", *(word for name, value in parameters.items() for word in ("-p", f"{name}:={value}"))]
    player = [sys.executable, "-m", "ros2_ood_seg.ros.bag_player", str(bag), "--topic", topic, "--report", str(folder / "played.json")]
    player += ["--lockstep"] if rate is None else ["--rate", str(rate)]
    player += ["--max-seconds", str(max_seconds), "--max-frames", str(most), "--wait-for-subscribers", str(_START_S)]
    outputs = (*_OUTPUTS, "anomaly_map") if maps else _OUTPUTS
    total = min(most, camera.count) if most else camera.count
    with own_domain() as environment, BagWriter(folder / "answers.mcap") as answers:
        _record(node, player, outputs, answers, folder, environment, total)
    if rate is None:
        mode = "lockstep: the next frame is sent when the last one is answered"
    else:
        mode = f"{rate:g} times the recorded speed: the newest frame counts"
    yield Recording(folder / "answers.mcap", PlayReport.load(folder / "played.json"), mode)
    shutil.rmtree(folder, ignore_errors=True)


def _size(bag: BagReader, topic: str) -> tuple[int, int] | None:
    """Height and width of the first image that can be decoded, px; None when none of the first ones can.

    Raises:
        InputError: There are no images, or their stamps, by which answers are told apart, are not their own.
    """
    size, stamps_ns = None, []
    for raw in itertools.islice(bag.iter_raw([topic]), _LOOKED_AT):
        stamps_ns.append(header_stamp_ns(raw.data))
        with contextlib.suppress(InputError):
            size = size or bag.image(raw).rgb().shape[:2]
    if not stamps_ns:
        raise InputError(f"bag '{bag.path}': topic '{topic}' holds no messages")
    # A frame that was recorded twice is no harm.
    if 2 * len(set(stamps_ns)) < len(stamps_ns):
        raise InputError(
            f"bag '{bag.path}': the first {len(stamps_ns)} images of '{topic}' have {len(set(stamps_ns))} stamps; "
            "a replay tells answers apart by them: leave --realtime out"
        )
    return size


def _record(
    node: Sequence[str],
    player: Sequence[str],
    outputs: tuple[str, ...],
    answers: BagWriter,
    folder: Path,
    environment: dict[str, str],
    total: int,
) -> None:
    """Runs node and player until the recording is over, and records meanwhile."""
    context = rclpy.Context()
    rclpy.init(args=[], context=context, domain_id=int(environment["ROS_DOMAIN_ID"]), signal_handler_options=SignalHandlerOptions.NO)
    recorder = Recorder(outputs, answers, context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(recorder)
    node_log, player_log = folder / "node.log", folder / "player.log"
    try:
        with process(node, node_log, environment) as running:

            def spin_once() -> None:
                executor.spin_once(timeout_sec=0.1)
                if running.poll() is not None:
                    raise ProcessError(f"the node ended with code {running.returncode}:\n{_tail(node_log)}")

            end = time.monotonic() + _START_S
            # What the node publishes before it knows the recorder gets lost.
            while not recorder.is_connected:
                spin_once()
                if time.monotonic() > end:
                    raise ProcessError(f"the node is not ready after {_START_S:g} s:\n{_tail(node_log)}")
            with process(player, player_log, environment) as playing, tqdm(total=total, desc="replay", unit="frame") as bar:
                while playing.poll() is None:
                    spin_once()
                    if recorder.counts["instances"] > bar.n:
                        bar.update(recorder.counts["instances"] - bar.n)
                # With a report, the player has come as far as the recording goes, and reading it again will tell what is wrong with it.
                if playing.returncode and not (folder / "played.json").is_file():
                    raise ProcessError(f"the bag player failed:\n{_tail(player_log)}\nthe node said:\n{_tail(node_log)}")
                end = time.monotonic() + _GRACE_S
                while time.monotonic() < end and len(set(recorder.counts.values())) > 1:
                    executor.spin_once(timeout_sec=0.1)
    finally:
        executor.remove_node(recorder)
        recorder.destroy_node()
        rclpy.shutdown(context=context)


def _write_profile(folder: Path, config: PipelineConfig) -> Path:
    """The settings as a file of the profile's name, which is how the node's messages will call it."""
    path = folder / f"{config.profile}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(exclude={"profile"})), encoding="utf-8")
    return path


def _empty(folder: Path) -> None:
    """Makes the folder, or removes what a failed replay left in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            # A bag that was being written when the process was killed is a folder.
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise InputError(f"folder '{folder}' is needed for the replay and cannot be made or emptied: {error.strerror}") from error


@contextlib.contextmanager
def own_domain() -> Iterator[dict[str, str]]:
    """Makes this process, and children with the yielded environment, talk on this machine only, in a DDS domain that nobody uses."""
    make_room_for_images()
    own = {"ROS_DOMAIN_ID": str(free_domain()), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "RCUTILS_COLORIZED_OUTPUT": "0"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield dict(os.environ)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_domain() -> int:
    """A DDS domain (1 to 100) whose first port nobody uses on this machine.

    Raises:
        ProcessError: There is none.
    """
    for offset in range(100):
        domain = 1 + (os.getpid() + offset) % 100
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", 7400 + 250 * domain + 10))
            except OSError:
                continue
        return domain
    raise ProcessError("all DDS domains are in use")


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Path, environment: dict[str, str] | None = None, patience_s: float = 5.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command with its output in a file, and ends it in any case."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
    try:
        yield child
    finally:
        for step in (signal.SIGINT, signal.SIGKILL):
            if child.poll() is None:
                child.send_signal(step)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(patience_s)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
