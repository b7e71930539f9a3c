"""The demo: a bag player and the node as processes of their own, and what the node found as pictures, a bag and a report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
import torch
from numpy.typing import NDArray

from ros2_ood_seg.config import load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation import component
from ros2_ood_seg.evaluation.bag_messages import COMPRESSED_IMAGE, instances_from_message
from ros2_ood_seg.evaluation.bag_writer import DRIVE_IMAGE, DRIVE_INSTANCE, DRIVE_LABEL, BagWriter, write_drive
from ros2_ood_seg.evaluation.bags import BagReader
from ros2_ood_seg.evaluation.datasets import labelled_image
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.ros.images import image_to_scores
from ros2_ood_seg.ros.recorder import Recorder
from ros2_ood_seg.ros.transport import make_room_for_images
from ros2_ood_seg.synthetic import SyntheticDrive
from ros2_ood_seg.types import FrameResult, Instances, Prompts
from ros2_ood_seg.visualization import draw_overlay, heat_map, side_by_side

SEED, HEIGHT, WIDTH, FRAMES, FPS = 7, 540, 960, 20, 3.0
_NODE_OUTPUTS = ("instances", "boxes", "timing", "overlay/compressed")
_BEST = 4
_SHEET_COLUMNS, _SHEET_ROWS = 4, 4
_GRACE_S = 5.0


class DemoError(Exception):
    """The demo could not go on for a reason that lies in the machine or the node, not in the input."""


@dataclass(frozen=True)
class Sample:
    """What is played.

    Args:
        bag: Recording.
        topic: Full name of its image topic.
        compressed: The topic holds compressed images.
        labels: Topics of anomaly labels and of instance labels, empty when there are none.
        shape_hw: Size of the images, px.
    """

    bag: Path
    topic: str
    compressed: bool
    labels: tuple[str, ...]
    shape_hw: tuple[int, int]


@dataclass(frozen=True)
class Sighting:
    """One answered frame.

    Args:
        stamp_ns: Of its image.
        image: (H, W, 3) uint8 RGB.
        instances: What the node found.
        refined: (H, W) float32, the node's anomaly map, None when it was not recorded.
    """

    stamp_ns: int
    image: NDArray[np.uint8]
    instances: Instances
    refined: NDArray[np.float32] | None


def find_sample(args: argparse.Namespace) -> Sample:
    """The recording of the command line, or a generated drive (kept for the next time).

    Raises:
        InputError: No such bag or topic, or no usable image in it.
    """
    bag, topic = args.bag, args.topic
    if bag is None:
        name = f"drive_seed{args.seed}_{WIDTH}x{HEIGHT}_{args.frames}"
        bag, topic = args.output.parent / "sample" / name, DRIVE_IMAGE
        if not bag.exists():
            print(f"generating a drive of {args.frames} frames: {bag}", flush=True)
            write_drive(bag, SyntheticDrive(args.seed, HEIGHT, WIDTH, args.frames, FPS, lighting="day", surroundings="urban"))
    with BagReader(bag) as reader:
        camera = reader.image_topic(topic)
        names = {t.name for t in reader.topics}
        home = camera.name.removesuffix("/compressed").rsplit("/", 1)[0]
        beside = [f"{home}/{name.rsplit('/', 1)[1]}" for name in (DRIVE_LABEL, DRIVE_INSTANCE)]
        asked = [args.label_topic, args.instance_topic]
        labels = [reader.image_topic(name).name for name in asked if name] or [name for name in beside if name in names]
        first = next(reader.iter_images(camera.name), None)
        if first is None:
            raise InputError(f"bag '{bag}': topic '{camera.name}' holds no messages")
        return Sample(bag, camera.name, camera.msgtype == COMPRESSED_IMAGE, tuple(labels), first.rgb().shape[:2])


def free_domain() -> int:
    """A DDS domain (1 to 100) whose first port nobody uses on this machine.

    Raises:
        DemoError: There is none.
    """
    for offset in range(100):
        domain = 1 + (os.getpid() + offset) % 100
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", 7400 + 250 * domain + 10))
            except OSError:
                continue
        return domain
    raise DemoError("all DDS domains are in use")


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, patience_s: float = 5.0) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command with its output in a file, and ends it in any case."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield child
    finally:
        for step in (signal.SIGINT, signal.SIGKILL):
            if child.poll() is None:
                child.send_signal(step)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(patience_s)


def play(sample: Sample, args: argparse.Namespace, recorder: Recorder) -> dict[str, Any]:
    """Lets the node answer the recording while the recorder listens.

    Returns:
        The player's report.

    Raises:
        DemoError: Node or player ended early; the message holds the end of its output.
    """
    played = args.output / "played.json"
    node_log, player_log = args.output / "node.log", args.output / "player.log"
    executable = shutil.which("ood_seg_node")
    node = [executable] if executable else [sys.executable, "-m", "ros2_ood_seg.ros.node"]
    height, width = sample.shape_hw
    parameters = {
        "profile": args.profile,
        "image_transport": "compressed" if sample.compressed else "raw",
        "warm_up.height": height,
        "warm_up.width": width,
        # On a busy machine best effort loses large images, and the demo shows what the node can do, not what the kernel drops.
        f"qos_overrides./image{'/compressed' if sample.compressed else ''}.subscription.reliability": "reliable",
        **{f"qos_overrides./ood_segmenter/{name}.publisher.reliability": "reliable" for name in ("overlay/compressed", "anomaly_map")},
    }
    if args.weights_dir:
        parameters["weights_dir"] = args.weights_dir
    node += ["--ros-args"] + [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    player = [sys.executable, "-m", "ros2_ood_seg.ros.bag_player", str(sample.bag), "--topic", sample.topic, "--report", str(played)]
    player += ["--max-seconds", str(args.max_seconds), "--wait-for-subscribers", "120"]
    player += ["--rate", str(args.rate)] if args.rate else ["--lockstep"]
    with process(node, node_log) as node_process, process(player, player_log) as player_process:
        while player_process.poll() is None:
            rclpy.spin_once(recorder, timeout_sec=0.1)
            if node_process.poll() is not None:
                raise DemoError(f"the node ended with code {node_process.returncode}:\n{_tail(node_log)}")
        if player_process.returncode:
            raise DemoError(f"the bag player failed:\n{_tail(player_log)}\nthe node said:\n{_tail(node_log)}")
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end and len({len(found) for found in recorder.messages.values()}) > 1:
            rclpy.spin_once(recorder, timeout_sec=0.1)
    report: dict[str, Any] = json.loads(played.read_text(encoding="utf-8"))
    played.unlink()
    return report


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def sightings(sample: Sample, recorder: Recorder) -> Iterator[Sighting]:
    """The answered frames, in the order of the recording."""
    with BagReader(sample.bag) as bag:
        for image in bag.iter_images(sample.topic):
            message = recorder.message("instances", image.stamp_ns)
            if message is None:
                continue
            rgb = image.rgb()
            refined = recorder.message("anomaly_map", image.stamp_ns) if "anomaly_map" in recorder.messages else None
            yield Sighting(
                image.stamp_ns,
                rgb,
                instances_from_message(message, rgb.shape[:2]),
                None if refined is None else image_to_scores(refined),
            )


def write_results(path: Path, sample: Sample, recorder: Recorder) -> None:
    """Writes source frames and the node's answers, byte for byte, as one MCAP file on a common time axis."""
    path.unlink(missing_ok=True)
    with BagWriter(path) as bag:
        for frame in sightings(sample, recorder):
            bag.write_jpeg(f"{sample.topic.removesuffix('/compressed')}/compressed", frame.image, frame.stamp_ns, "camera_optical")
            for output in _NODE_OUTPUTS:
                raw = recorder.messages[output].get(frame.stamp_ns)
                if raw is not None:
                    bag.write_raw(raw.topic, raw.msgtype, raw.time_ns, raw.data)


def write_pictures(folder: Path, sample: Sample, recorder: Recorder) -> list[Path]:
    """Writes the frames that show most, a sheet of the whole drive, and camera, map and instances side by side.

    Returns:
        The pictures, the sheet last.
    """
    for old in folder.glob("overlay_*.png"):
        old.unlink()
    frames = [(f.stamp_ns, float((f.instances.scores * f.instances.area_px.float().sqrt()).sum())) for f in sightings(sample, recorder)]
    if not frames:
        return []
    every = max(1, len(frames) // (_SHEET_COLUMNS * _SHEET_ROWS))
    sheet = {stamp for stamp, _ in frames[::every][: _SHEET_COLUMNS * _SHEET_ROWS]}
    # The best of each quarter of the drive, so that they do not all show the same object.
    quarters = np.array_split(np.arange(len(frames)), min(_BEST, len(frames)))
    best = [frames[max(part, key=lambda k: frames[k][1])][0] for part in quarters]
    top = max(best, key=dict(frames).__getitem__)
    tiles: list[NDArray[np.uint8]] = []
    titles: list[str] = []
    written: list[Path] = []
    for number, frame in enumerate(sightings(sample, recorder)):
        if frame.stamp_ns not in sheet and frame.stamp_ns not in best:
            continue
        overlay = draw_overlay(frame.image, frame.instances)
        if frame.stamp_ns in sheet:
            tiles.append(overlay)
            titles.append(f"frame {number}: {len(frame.instances)} found")
        if frame.stamp_ns in best:
            written.append(_write_png(folder / f"overlay_{number:04d}.png", overlay))
        if frame.stamp_ns == top and frame.refined is not None:
            low, high = float(np.quantile(frame.refined, 0.5)), max(float(frame.refined.max()), 1e-6)
            heat = heat_map(frame.refined, min(low, high - 1e-6), high)
            panels = side_by_side([frame.image, heat, overlay], ["camera", "anomaly map", "instances"], panel_width=640)
            written.append(_write_png(folder / "overlay_panels.png", panels))
    written.append(_write_png(folder / "overlay_sheet.png", side_by_side(tiles, titles, columns=_SHEET_COLUMNS, panel_width=480)))
    return written


def _write_png(path: Path, rgb: NDArray[np.uint8]) -> Path:
    path.write_bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes())
    return path


def build_report(sample: Sample, recorder: Recorder, pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    """Measures the node's answers against the labels of the recording; without labels all measures are None.

    The node publishes its final map; the scorer's own map is computed again here, from the same frames and weights.
    """
    timings = _stage_times(recorder)
    name = sample.bag.stem
    if not sample.labels:
        report = {"dataset": name, "profile": pipeline.config.profile, "images": len(recorder.messages["instances"])}
        empty = {
            "pixel": ("ap", "fpr95"),
            "refined": ("ap", "fpr95"),
            "baseline": ("iou_best", "threshold", "auiou", "mean_f1"),
            "s2m": ("iou", "iou_best", "auiou", "mean_f1"),
            "s2m_code": ("iou", "iou_best", "auiou", "mean_f1"),
            "component": ("siou", "ppv", "f1"),
            "instance": ("ap", "ap50"),
        }
        return {**report, **{group: dict.fromkeys(keys) for group, keys in empty.items()}, "timings_ms": _percentiles(timings.values())}
    options = Options(minimum=component.TRACKS["obstacle"])
    height, width = sample.shape_hw
    evaluation = Evaluation(pipeline, folder / "parts", options, {"started": time.time()}, len(timings) * height * width)
    labels = _labels(sample)
    for frame in sightings(sample, recorder):
        if frame.stamp_ns not in labels or frame.refined is None:
            continue
        with torch.inference_mode():
            pixels = torch.from_numpy(frame.image).to(pipeline.runtime.device)
            score_map = pipeline.scorer(pixels, None)
            prompts = Prompts.empty(pixels.device) if pipeline.box_prompts is None else pipeline.box_prompts(score_map, None)
        found = FrameResult(
            frame.instances, score_map, prompts, torch.from_numpy(frame.refined), timings.get(frame.stamp_ns, {}), pipeline.config.profile
        )
        evaluation.add_result(labelled_image(str(frame.stamp_ns), frame.image, *labels[frame.stamp_ns]), found)
    report, _ = evaluation.report(name, f"topic {sample.labels[1]}" if len(sample.labels) > 1 else "components of the label")
    evaluation.finish()
    return report


def _labels(sample: Sample) -> dict[int, tuple[NDArray[np.int32], ...]]:
    with BagReader(sample.bag) as bag:
        rows = bag.iter_labelled(sample.topic, *sample.labels)
        return {image.stamp_ns: tuple(label.labels() for label in labels) for image, *labels in rows}


def _stage_times(recorder: Recorder) -> dict[int, dict[str, float]]:
    """Milliseconds per stage of each frame, as the node measured them."""
    messages = {stamp: recorder.message("timing", stamp) for stamp in recorder.messages["timing"]}
    return {stamp: dict(zip(m.stages, (float(ms) for ms in m.duration_ms), strict=True)) for stamp, m in messages.items()}


def _percentiles(frames: Any) -> dict[str, dict[str, float]]:
    stages: dict[str, list[float]] = {}
    for frame in frames:
        for stage, ms in frame.items():
            stages.setdefault(stage, []).append(ms)
    return {stage: {"p50": float(np.percentile(ms, 50)), "p95": float(np.percentile(ms, 95))} for stage, ms in stages.items()}


def node_figures(played: dict[str, Any], recorder: Recorder, in_step: bool) -> dict[str, Any]:
    """How fast the node was, and what became of the frames."""
    timings = _stage_times(recorder)
    last = recorder.message("timing", max(timings)) if timings else None
    latency = _percentiles([{"latency": ms} for ms in played["latency_ms"]]).get("latency")
    return {
        "mode": "lockstep: the next frame is sent when the last one is answered" if in_step else "as recorded: the newest frame counts",
        "frames_recorded": played["frames"],
        "frames_played": played["played"],
        "frames_answered": played["answered"],
        "frames_replaced": None if last is None else int(last.replaced),
        "frames_rejected": None if last is None else int(last.rejected),
        "played_to_the_end": played["complete"],
        "fps": played["answered"] / played["duration_s"] if played["duration_s"] > 0.0 else None,
        "latency_ms": latency,
    }


def summary(report: dict[str, Any], instances: int, output: Path) -> str:
    """The last lines: what was found, how fast, where to look."""
    node = report["node"]
    lines = [f"found: {instances} instances in {node['frames_answered']} of {node['frames_played']} frames of {report['dataset']}"]
    if report["pixel"]["ap"] is not None:
        seen, truth = (sum(image[key] for image in report["per_image"]) for key in ("found", "truth_instances"))
        lines.append(
            f"right: {seen} of {truth} labelled objects hit (IoU > 0.5); pixel AP {report['pixel']['ap']:.3f} of the scorer, "
            f"{report['refined']['ap']:.3f} refined; instance AP50 {report['instance']['ap50'] or 0.0:.3f}"
        )
    if node["latency_ms"]:
        stage = report["timings_ms"].get("total", {}).get("p50", float("nan"))
        lines.append(
            f"speed: {node['fps']:.1f} frames/s; image out to instances in {node['latency_ms']['p50']:.0f} ms "
            f"(p95 {node['latency_ms']['p95']:.0f}), of which the pipeline {stage:.0f} ms; {node['frames_replaced']} frames replaced"
        )
    if not node["played_to_the_end"]:
        lines.append(f"time was up: {node['frames_played']} of {node['frames_recorded']} frames were played (MAX_SECONDS)")
    lines.append(f"look at: {output}/overlay_sheet.png, {output}/overlay_*.png, {output}/results.mcap (Foxglove), {output}/report.json")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Runs the demo.

    Raises:
        InputError: Bag, topic or profile cannot be used.
        DemoError: Node or player failed.
    """
    config = load_profile(args.profile, {"runtime.weights_dir": args.weights_dir} if args.weights_dir else None)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output folder '{args.output}' cannot be made: {error.strerror}") from error
    sample = find_sample(args)
    # Built here first: a profile that cannot run is told at once, not from the node's log.
    pipeline = Pipeline.from_config(config)
    os.environ.update(ROS_DOMAIN_ID=str(free_domain()), ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST", RCUTILS_COLORIZED_OUTPUT="0")
    make_room_for_images()
    rclpy.init(args=[])
    recorder = Recorder((*_NODE_OUTPUTS, "anomaly_map") if sample.labels else _NODE_OUTPUTS)
    try:
        print(f"playing {sample.topic} of {sample.bag} to the node, profile '{args.profile}'", flush=True)
        played = play(sample, args, recorder)
        instances = sum(len(recorder.message("instances", stamp).instances) for stamp in recorder.messages["instances"])
        write_results(args.output / "results.mcap", sample, recorder)
        write_pictures(args.output, sample, recorder)
        report = build_report(sample, recorder, pipeline, args.output) | {"node": node_figures(played, recorder, not args.rate)}
    finally:
        recorder.destroy_node()
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(summary(report, instances, args.output))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo", description="Plays a recording to the node and shows what it finds.")
    parser.add_argument("--bag", type=Path, help="rosbag2 recording; without it a synthetic drive is generated")
    parser.add_argument("--topic", help="image topic of the bag, when it has several")
    parser.add_argument("--label-topic", help="labels in the bag: 0 normal, 1 anomaly, 255 ignore")
    parser.add_argument("--instance-topic", help="instance labels in the bag: 0 none, k = instance")
    parser.add_argument("--profile", default="compact", help="(default: %(default)s)")
    parser.add_argument("--weights-dir", default="", help="folder of further weights")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.0, help="play at this speed and let the node drop frames (default: frame by frame)")
    parser.add_argument("--max-seconds", type=float, default=120.0, help="stop playing after this time (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=FRAMES, help="length of the generated drive (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the generated drive (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.rate < 0.0:
        parser.error(f"--rate is {options.rate:g}, it must be 0 or more")
    if options.instance_topic and not options.label_topic:
        parser.error("--instance-topic needs --label-topic")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Returns:
        0 on success, 1 when node or player failed, 2 when the input cannot be used, 130 after an interrupt.
    """
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options)
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        with contextlib.suppress(Exception):
            rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
