"""``ood-seg segment``: runs a profile over images, folders, videos and bags."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ros2_ood_seg.config import load_profile, parse_overrides
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bags import BagReader, is_bag
from ros2_ood_seg.evaluation.datasets import check_external, read_map
from ros2_ood_seg.evaluation.measure import Maps, instances_json
from ros2_ood_seg.image_encodings import decode_compressed
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.types import FrameResult, label_image
from ros2_ood_seg.visualization import draw_overlay

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})

Skip = Callable[[str], None]


@dataclass(frozen=True)
class Frame:
    """One picture of an input.

    Args:
        name: Stem of its results, unique within its input.
        source: File or bag it comes from.
        image: (H, W, 3) uint8 RGB.
        stamp_ns: Time within a video, header stamp within a bag, None for an image.
    """

    name: str
    source: str
    image: NDArray[np.uint8]
    stamp_ns: int | None = None


@dataclass(frozen=True)
class Source:
    """One input of the command line.

    Args:
        path: Image, folder, video or bag.
        count: Frames in it, 0 when unknown.
        is_sequence: Its frames follow one another in time, so tracks carry over.
        frames: Reads them; calls its argument with a reason for each one that cannot be read.
    """

    path: Path
    count: int
    is_sequence: bool
    frames: Callable[[Skip], Iterator[Frame]]


def open_source(path: Path, topic: str | None = None) -> Source:
    """Finds out what an input is.

    Args:
        path: Image, folder of images, video, or bag (folder, ``.mcap``, ``.db3``).
        topic: Image topic of bags.

    Raises:
        InputError: It does not exist, is of no known kind, or holds no images.
    """
    if not path.exists():
        raise InputError(f"input '{path}' does not exist")
    if is_bag(path):
        return _open_bag(path, topic)
    if path.is_dir():
        images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise InputError(f"folder '{path}' holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) and is no bag")
        return Source(path, len(images), False, lambda skip: _read_images(images, skip))
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return _open_video(path)
    if suffix in IMAGE_SUFFIXES:
        return Source(path, 1, False, lambda skip: _read_images([path], skip))
    known = sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES | {".mcap", ".db3"})
    raise InputError(f"input '{path}' is of no known kind: use a folder, a bag or a file with one of {', '.join(known)}")


def _read_images(paths: Iterable[Path], skip: Skip) -> Iterator[Frame]:
    for path in paths:
        try:
            image = decode_compressed(path.read_bytes())
        except (InputError, OSError) as error:
            skip(f"{path}: {error}")
            continue
        yield Frame(path.stem, str(path), image)


def _open_video(path: Path) -> Source:
    capture = cv2.VideoCapture(str(path))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    fps = capture.get(cv2.CAP_PROP_FPS) or 25.0
    opened = capture.isOpened()
    capture.release()
    if not opened:
        raise InputError(f"video '{path}' cannot be read")

    def frames(skip: Skip) -> Iterator[Frame]:
        capture = cv2.VideoCapture(str(path))
        number = 0
        try:
            while True:
                found, bgr = capture.read()
                if not found:
                    break
                image = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)
                yield Frame(f"{path.stem}_{number:06d}", str(path), image, round(number / fps * 1e9))
                number += 1
        finally:
            capture.release()
        if not number:
            skip(f"{path}: the video holds no readable frame")
        # Some containers only estimate how many frames they hold.
        elif number < 0.95 * count - 1:
            skip(f"{path}: the video breaks off after {number} of {count} frames")

    return Source(path, max(0, count), True, frames)


def _open_bag(path: Path, topic: str | None) -> Source:
    with BagReader(path) as bag:
        camera = bag.image_topic(topic)

    def frames(skip: Skip) -> Iterator[Frame]:
        with BagReader(path) as bag:
            images = bag.iter_images(camera.name)
            while True:
                try:
                    message = next(images, None)
                except InputError as error:
                    skip(str(error))
                    return
                if message is None:
                    return
                try:
                    image = message.rgb()
                except InputError as error:
                    skip(f"{path} at {message.stamp_ns}: {error}")
                    continue
                yield Frame(f"{path.stem}_{message.stamp_ns}", f"{path} {camera.name}", image, message.stamp_ns)

    return Source(path, camera.count, True, frames)


class ResultWriter:
    """Writes the results of frames into a folder.

    Args:
        folder: Made when missing.
        overlay_format: ``jpg``, ``png`` or ``none``.
        scores: Also write ``score_<stem>.npy`` and ``refined_<stem>.npy``, (H, W) float32.
        masks: Also write ``mask_<stem>.png``, 16 bit, 0 background, k the k-th instance.

    Raises:
        InputError: The folder cannot be made.
    """

    def __init__(self, folder: Path, overlay_format: str = "jpg", scores: bool = False, masks: bool = False) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output folder '{folder}' cannot be made: {error.strerror}") from error
        self.folder, self.overlay_format, self.scores, self.masks = folder, overlay_format, scores, masks
        self._names: dict[str, int] = {}

    def write(self, frame: Frame, result: FrameResult) -> None:
        """Writes one frame: ``overlay_<stem>``, ``<stem>.json`` and what else was asked for."""
        stem = self._unique(frame.name)
        maps = Maps.from_result(result, refined_is_confidence=True, has_boxes=False)
        record: dict[str, Any] = {"image": frame.source, "stamp_ns": frame.stamp_ns, **instances_json(maps, result.profile)}
        record["timings_ms"] = {stage: round(ms, 3) for stage, ms in result.timings_ms.items()}
        (self.folder / f"{stem}.json").write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
        if self.overlay_format != "none":
            overlay = draw_overlay(frame.image, result.instances)
            self._picture(f"overlay_{stem}.{self.overlay_format}", cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR))
        if self.scores:
            np.save(self.folder / f"score_{stem}.npy", maps.score)
            np.save(self.folder / f"refined_{stem}.npy", maps.refined)
        if self.masks:
            labels = label_image(result.instances.masks, result.instances.boxes_xyxy).cpu().numpy()
            self._picture(f"mask_{stem}.png", labels.astype(np.uint16))

    def _unique(self, name: str) -> str:
        """The name, or with a number when an earlier frame of this run had it."""
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else self._unique(f"{name}_{self._names[name]}")

    def _picture(self, name: str, pixels: NDArray[Any]) -> None:
        path = self.folder / name
        # Encoding in memory keeps an unwritable folder apart from an unencodable picture, which imwrite would not.
        path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "segment",
        help="find anomalies in images, folders, videos and bags",
        description="Writes overlay_<stem>.jpg and <stem>.json (COCO run-length masks, boxes, scores) for every frame. "
        "Pictures are turned as their orientation tags say, other than in evaluations.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image, folder of images, video, or rosbag2 recording")
    parser.add_argument("--profile", default="compact", help="bundled profile or path of a YAML file (default: %(default)s)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--topic", help="image topic of a bag with several cameras")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of videos and bags, take every N-th frame")
    parser.add_argument("--max-frames", type=int, default=0, metavar="N", help="stop after N frames of each input (default: all)")
    parser.add_argument("--overlay-format", choices=("jpg", "png", "none"), default="jpg", help="(default: %(default)s)")
    parser.add_argument("--save-scores", action="store_true", help="also write score and refined maps as .npy")
    parser.add_argument("--save-masks", action="store_true", help="also write 16-bit label images, k = k-th instance")
    parser.add_argument("--external", type=Path, metavar="DIR", help="score maps <stem>.npy for the scorer 'external'")
    parser.add_argument("--weights-dir", metavar="DIR", help="folder of further weights")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; see ood-seg settings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 when at least one frame could be read.

    Raises:
        InputError: Nothing could be read, or a setting cannot be used.
    """
    if args.every < 1:
        raise InputError(f"--every is {args.every}, it must be 1 or more")
    if args.max_frames < 0:
        raise InputError(f"--max-frames is {args.max_frames}, it must be 1 or more, or 0 for all")
    if args.topic and not any(map(is_bag, args.inputs)):
        raise InputError(f"--topic '{args.topic}' is of recordings, and none of the inputs is one")
    for path in args.inputs:
        folder = path.parent if path.suffix.lower() in IMAGE_SUFFIXES else path
        if not is_bag(path) and folder.resolve() == args.output.resolve():
            raise InputError(f"--output '{args.output}' is the folder of the pictures: files beside them would be replaced; name another")
    overrides = parse_overrides(args.set)
    if args.weights_dir:
        overrides["runtime.weights_dir"] = args.weights_dir
    config = load_profile(args.profile, overrides)
    check_external(args.external, config.scorer.name)
    pipeline = Pipeline.from_config(config)
    writer = ResultWriter(args.output, args.overlay_format, args.save_scores, args.save_masks)
    frames, instances, total_ms = 0, 0, 0.0
    skipped: list[str] = []

    def skip(reason: str) -> None:
        skipped.append(reason)
        tqdm.write(f"skipped {reason}", file=sys.stderr)

    def answer(frame: Frame) -> FrameResult:
        return pipeline.run(frame.image, read_map(args.external / f"{frame.name}.npy") if args.external else None)

    for path in args.inputs:
        try:
            source = open_source(path, args.topic)
        except InputError as error:
            skip(str(error))
            continue
        for frame, result in _run_source(source, answer, pipeline.reset, args.every, args.max_frames, skip):
            writer.write(frame, result)
            frames += 1
            instances += len(result.instances)
            total_ms += result.timings_ms["total"]
    if not frames:
        raise InputError(f"none of the {len(args.inputs)} inputs could be read")
    unread = f", {len(skipped)} skipped" if skipped else ""
    print(f"{frames} frames{unread}: {instances} instances, {total_ms / frames:.0f} ms per frame; results in {args.output}")
    return 0


def _run_source(
    source: Source, answer: Callable[[Frame], FrameResult], reset: Callable[[], None], every: int, most: int, skip: Skip
) -> Iterator[tuple[Frame, FrameResult]]:
    step = every if source.is_sequence else 1
    total = math.ceil(source.count / step)
    reset()
    done = 0
    with tqdm(total=min(total, most) if most else total or None, desc=source.path.name, unit="frame", disable=total == 1) as bar:
        for frame in itertools.islice(source.frames(skip), 0, None, step):
            if not source.is_sequence:
                reset()
            try:
                result = answer(frame)
            except InputError as error:
                skip(f"{frame.source}: {error}")
                continue
            yield frame, result
            bar.update()
            done += 1
            if done == most:
                return
