"""The demo: a bag player and the node as processes of their own, and what the node found as pictures, a bag and a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.config import load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation import component
from ros2_ood_seg.evaluation.bag_evaluation import BagEvaluation, BagJob, BagRun, find_bags
from ros2_ood_seg.evaluation.bag_writer import DRIVE_IMAGE, DRIVE_INSTANCE, DRIVE_LABEL, write_drive
from ros2_ood_seg.evaluation.bags import BagReader
from ros2_ood_seg.evaluation.datasets import COMPONENT_RULE
from ros2_ood_seg.evaluation.evaluate import Options
from ros2_ood_seg.evaluation.replayed import Recording, anomaly_map, iter_answers
from ros2_ood_seg.ros.entry import run_command
from ros2_ood_seg.ros.replay import replay
from ros2_ood_seg.synthetic import SyntheticDrive
from ros2_ood_seg.visualization import draw_overlay, heat_map, side_by_side

SEED, HEIGHT, WIDTH, FRAMES, FPS = 7, 540, 960, 20, 3.0
STALE_AFTER_S = 0.3
_BEST = 4
_SHEET_COLUMNS, _SHEET_ROWS = 4, 4


@dataclass(frozen=True)
class Sample:
    """What is played.

    Args:
        bag: Recording.
        topic: Full name of its image topic.
        labels: Topics of anomaly labels and of instance labels, empty when there are none.
    """

    bag: Path
    topic: str
    labels: tuple[str, ...]


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
        return Sample(bag, camera.name, tuple(labels))


def write_pictures(folder: Path, run: BagRun, recording: Recording) -> list[Path]:
    """Writes the frames that show most, a sheet of the whole drive, and camera, map and instances side by side.

    Returns:
        The pictures, the sheet last.
    """
    for old in folder.glob("overlay_*.png"):
        old.unlink()
    with BagReader(run.path) as bag:
        answers = ((a.image.stamp_ns, a.instances) for a in iter_answers(bag, run.topic, (), recording, None))
        frames = [(stamp_ns, float((found.scores * found.area_px.float().sqrt()).sum())) for stamp_ns, found in answers]
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
    with BagReader(run.path) as bag:
        for number, answer in enumerate(iter_answers(bag, run.topic, (), recording, None)):
            stamp_ns = answer.image.stamp_ns
            if stamp_ns not in sheet and stamp_ns not in best:
                continue
            overlay = draw_overlay(answer.rgb, answer.instances)
            if stamp_ns in sheet:
                tiles.append(overlay)
                titles.append(f"frame {number}: {len(answer.instances)} found")
            if stamp_ns in best:
                written.append(_write_png(folder / f"overlay_{number:04d}.png", overlay))
            refined = anomaly_map(recording, stamp_ns) if stamp_ns == top else None
            if refined is not None:
                low, high = float(np.quantile(refined, 0.5)), max(float(refined.max()), 1e-6)
                heat = heat_map(refined, min(low, high - 1e-6), high)
                panels = side_by_side([answer.rgb, heat, overlay], ["camera", "anomaly map", "instances"], panel_width=640)
                written.append(_write_png(folder / "overlay_panels.png", panels))
    written.append(_write_png(folder / "overlay_sheet.png", side_by_side(tiles, titles, columns=_SHEET_COLUMNS, panel_width=480)))
    return written


def _write_png(path: Path, rgb: NDArray[np.uint8]) -> Path:
    path.write_bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes())
    return path


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
        ProcessError: Node or player failed.
    """
    config = load_profile(args.profile, {"runtime.weights_dir": args.weights_dir} if args.weights_dir else None)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output folder '{args.output}' cannot be made: {error.strerror}") from error
    sample = find_sample(args)
    output = args.output / "report.json"
    (drive,) = find_bags([sample.bag], output, sample.topic, sample.labels, "results.mcap")
    # Built before the node: a profile that cannot run is told at once, not from the node's log.
    evaluation = BagEvaluation(BagJob(config, output, Options(minimum=component.TRACKS["obstacle"]), (drive,)))
    print(f"playing {sample.topic} of {sample.bag} to the node, profile '{args.profile}'", flush=True)
    folder = args.output / "replay"
    with replay(
        sample.bag, sample.topic, config, folder, rate=args.rate or None, maps=bool(sample.labels), max_seconds=args.max_seconds
    ) as recording:
        evaluation.add(drive, evaluation.replayed(drive, recording, STALE_AFTER_S))
        write_pictures(args.output, drive, recording)
    rule = f"topic {sample.labels[1]}" if len(sample.labels) > 1 else COMPONENT_RULE
    report = evaluation.report([drive], sample.bag.stem, rule)
    print(summary(report, drive.instances, args.output))


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
    if not options.max_seconds > 0.0:
        parser.error(f"--max-seconds is {options.max_seconds:g}, it must be above 0")
    if options.instance_topic and not options.label_topic:
        parser.error("--instance-topic needs --label-topic")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; see :func:`~ros2_ood_seg.ros.entry.run_command` for what it returns."""
    options = parse_arguments(arguments)
    return run_command("demo", lambda: run(options))
