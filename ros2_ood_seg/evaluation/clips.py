"""The events of a drive as small bags and contact strips, for people who look for rare objects."""

from __future__ import annotations

import contextlib
import heapq
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_messages import NS_PER_S, instances_from_message, typestore
from ros2_ood_seg.evaluation.bag_writer import BagWriter, remove_abandoned
from ros2_ood_seg.evaluation.bags import BagReader, RawMessage
from ros2_ood_seg.evaluation.events import Event, Track
from ros2_ood_seg.evaluation.results_bag import INSTANCES_TOPIC, NODE, iter_instances
from ros2_ood_seg.visualization import draw_overlay, side_by_side

INDEX = "clips.json"
FILES = ("bag", "picture")
UNLISTED = ".unlisted"
"""Ending of hidden files that name, one a line, the files of a drive's clips until the index does."""
COLUMNS = 4
PANEL_WIDTH_PX = 480
CROP_MARGIN = 3.0
LEAST_CROP = 0.15
"""A crop is this many times as large as its box, and no smaller than this share of the image."""


@dataclass(frozen=True)
class Drive:
    """A recording and the results for it.

    Args:
        name: Prefix of the clips' files.
        bag: Recording.
        topic: Full name of its camera topic.
        label_topics: Full names.
        results: As :class:`~ros2_ood_seg.evaluation.results_bag.ResultsBag` writes it.
    """

    name: str
    bag: Path
    topic: str
    label_topics: tuple[str, ...]
    results: Path


class ClipFolder:
    """A folder of clips with an index ``clips.json``; the clips of an earlier run are removed.

    Args:
        folder: Made when missing.
        kept: Entries of the index that stay, with their files.
        join: Another process made the folder and keeps its index: nothing is removed.
        drives: The recordings that clips are made of, by the prefix of the clips' files.

    Raises:
        InputError: It cannot be made or used, or clips would replace a recording.
    """

    def __init__(
        self, folder: Path, kept: Sequence[dict[str, Any]] = (), join: bool = False, drives: Mapping[str, Path] | None = None
    ) -> None:
        self.folder = folder
        if join:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder)
            names = {str(entry[key]) for entry in kept for key in FILES}
            old = [path for path in self._listed() if path.name not in names]
            self._check(drives or {}, old)
            for path in old:
                path.unlink(missing_ok=True)
            self.save_index(kept)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--clips '{folder}' cannot be used: {error}") from error

    def write(self, drive: Drive, events: Sequence[Event], all_topics: bool = False, until_ns: int | None = None) -> list[dict[str, Any]]:
        """Writes the events of a drive: for each a bag ``<name>_<number>.mcap`` and a picture ``<name>_<number>.jpg``.

        A clip holds the camera's messages as they were recorded, its camera_info, the labels, and the results. An error or an interrupt
        leaves none of these clips.

        Args:
            drive: What was recorded and found.
            events: By time.
            all_topics: Clips hold every topic of the recording whose type is known or defined in it.
            until_ns: Where the recording breaks off, ns; None when it does not.

        Returns:
            Entries for :meth:`save_index`.

        Raises:
            InputError: A bag cannot be read or written.
        """
        written = []
        # A process that is killed leaves clips that no index lists: with this, the next one knows whose they are.
        names = self.folder / f".{drive.name}{UNLISTED}"
        with BagReader(drive.bag) as bag, BagReader(drive.results) as results, contextlib.ExitStack() as unlisted:
            unlisted.callback(names.unlink, missing_ok=True)
            for number, whole in enumerate(events, start=1):
                stop_ns = min(whole.stop_ns, bag.end_ns if until_ns is None else until_ns)
                event = replace(whole, start_ns=max(whole.start_ns, bag.start_ns), stop_ns=stop_ns)
                stem = f"{drive.name}_{number:04d}"
                files = [f"{stem}.mcap", f"{stem}.jpg"]
                for name in files:
                    unlisted.callback((self.folder / name).unlink, missing_ok=True)
                with names.open("a", encoding="utf-8") as file:
                    file.writelines(f"{name}\n" for name in files)
                write_bag(self.folder / f"{stem}.mcap", bag, results, event, None if all_topics else _camera_topics(bag, drive))
                strip = contact_strip(bag, results, drive.topic, event)
                (self.folder / f"{stem}.jpg").write_bytes(_jpeg(strip))
                entry = {
                    "drive": drive.name,
                    "bag": f"{stem}.mcap",
                    "picture": f"{stem}.jpg",
                    "start_s": (event.start_ns - bag.start_ns) / NS_PER_S,
                    "duration_s": (event.stop_ns - event.start_ns) / NS_PER_S,
                    "tracks": [track.summary(bag.start_ns) for track in event.tracks],
                }
                written.append(entry)
            unlisted.pop_all()
        return written

    def has(self, entry: dict[str, Any]) -> bool:
        """Whether the files of a clip are there."""
        return all((self.folder / entry[key]).is_file() for key in FILES)

    def save_index(self, clips: Sequence[dict[str, Any]]) -> None:
        """Writes ``clips.json``, which lists all clips that are in the folder."""
        (self.folder / INDEX).write_text(json.dumps(list(clips), indent=1) + "\n", encoding="utf-8")
        for names in self.folder.glob(f".*{UNLISTED}"):
            names.unlink()

    def _listed(self) -> list[Path]:
        """Files of the clips in the index, and of those that a killed run had not listed yet."""
        index = self.folder / INDEX
        entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []
        names = [str(entry[key]) for entry in entries for key in FILES]
        for unlisted in self.folder.glob(f".*{UNLISTED}"):
            names += unlisted.read_text(encoding="utf-8").splitlines()
        return [self.folder / Path(name).name for name in names]

    def _check(self, drives: Mapping[str, Path], old: Collection[Path]) -> None:
        """Looks for recordings in the way, whether clips of these drives would take their name or they are clips of the run before."""
        recordings = {path.resolve() for path in drives.values()}
        gone = [path for path in old if path.resolve() in recordings]
        clip = re.compile(f"({'|'.join(map(re.escape, drives))})_[0-9]{{4,}}")
        named = [path for path in sorted(self.folder.glob("*.mcap")) if clip.fullmatch(path.stem) and path not in old]
        for path in (*gone, *(path for path in named if path.resolve() in recordings or not _is_clip(path))):
            raise InputError(f"--clips '{self.folder}': clips would replace the recording '{path}'; choose another folder")


def _is_clip(path: Path) -> bool:
    """Whether a file holds what was found in a recording, as clips do."""
    try:
        with BagReader(path) as bag:
            return any(topic.name == INSTANCES_TOPIC for topic in bag.topics)
    except InputError:
        return False


def write_bag(path: Path, bag: BagReader, results: BagReader, event: Event, topics: Iterable[str] | None) -> None:
    """Writes what was recorded and found during an event.

    Args:
        path: ``.mcap`` file, replaced.
        bag: The recording, open.
        results: The results for it, open.
        event: When.
        topics: Topics of the recording; None for all whose types are known or defined in it.

    Raises:
        InputError: A bag cannot be read or written.
    """
    definitions = bag.definitions
    known = [t.name for t in bag.topics if t.msgtype in typestore().fielddefs or t.msgtype in definitions]
    # What a node said while it was recorded gives way to the results of now.
    wanted = [name for name in known if (topics is None or name in set(topics)) and not name.startswith(f"{NODE}/")]
    # The camera's own messages are in the recording; the results bag's copies of them are for looking.
    found = [t.name for t in results.topics if t.name.startswith(f"{NODE}/") and t.name not in wanted]
    sources = ((bag, wanted), (results, found))
    spans = (_readable(reader.iter_raw(names, event.start_ns, event.stop_ns + 1)) for reader, names in sources if names)
    with BagWriter(path, replace=True) as clip:
        for raw in heapq.merge(*spans, key=lambda raw: raw.time_ns):
            _copy(raw, clip, definitions)


def _readable(messages: Iterator[RawMessage]) -> Iterator[RawMessage]:
    """What comes before the place where a recording breaks off."""
    with contextlib.suppress(InputError):
        yield from messages


def _copy(raw: RawMessage, clip: BagWriter, definitions: dict[str, str]) -> None:
    clip.write_raw(raw.topic, raw.msgtype, raw.time_ns, raw.data, definitions.get(raw.msgtype))


def _camera_topics(bag: BagReader, drive: Drive) -> list[str]:
    """The camera, its camera_info, and the labels."""
    home = drive.topic.removesuffix("/compressed").rsplit("/", 1)[0]
    asked = (drive.topic, f"{home}/camera_info", *drive.label_topics)
    return [topic.name for topic in bag.topics if topic.name in asked]


def contact_strip(bag: BagReader, results: BagReader, topic: str, event: Event) -> NDArray[np.uint8]:
    """An event in one picture: four moments from its first to its last frame, below them each track at its best, enlarged.

    Args:
        bag: The recording, open.
        results: The results for it, open.
        topic: Full name of the camera topic.
        event: With at least one track; the four with the highest scores are shown.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: A bag cannot be read, or the event has no frames.
    """
    times = [raw.time_ns for raw in results.iter_raw([f"{NODE}/instances"], event.start_ns, event.stop_ns + 1)]
    if not times:
        raise InputError(f"results bag '{results.path}' holds nothing between {event.start_ns} and {event.stop_ns} ns")
    moments = [times[k] for k in np.unique(np.linspace(0, len(times) - 1, COLUMNS).round().astype(int))]
    tracks = sorted(event.tracks, key=lambda track: -track.best_score)[:COLUMNS]
    appeared = event.tracks[0].first_ns
    panels, titles = [], []
    for time_ns in moments:
        panels.append(_shrunk(_overlay_at(bag, results, topic, time_ns)))
        titles.append(f"{(time_ns - appeared) / NS_PER_S:+.1f} s")
    panels += [np.full_like(panels[0], 255)] * (COLUMNS - len(panels))
    titles += [" "] * (COLUMNS - len(titles))
    for track in tracks:
        panels.append(_crop(_image_at(bag, topic, track.best_ns), track, panels[0].shape[1::-1]))
        titles.append(f"#{track.track_id} {track.best_score:.2f}, {track.frames} frames")
    return side_by_side(panels, titles, columns=COLUMNS)


def _image_at(bag: BagReader, topic: str, time_ns: int) -> NDArray[np.uint8]:
    image = next(bag.iter_images(topic, time_ns, time_ns + 1), None)
    if image is None:
        raise InputError(f"bag '{bag.path}' has no image on '{topic}' at {time_ns} ns")
    return image.rgb()


def _overlay_at(bag: BagReader, results: BagReader, topic: str, time_ns: int) -> NDArray[np.uint8]:
    rgb = _image_at(bag, topic, time_ns)
    _, message = next(iter_instances(results, time_ns, time_ns + 1))
    return draw_overlay(rgb, instances_from_message(message, rgb.shape[:2]))


def _shrunk(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = rgb.shape[:2]
    size = (PANEL_WIDTH_PX, max(1, round(height * PANEL_WIDTH_PX / width)))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def _crop(rgb: NDArray[np.uint8], track: Track, size_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """The surroundings of a track's best box in the shape of a panel, the box as a thin frame."""
    x_min, y_min, x_max, y_max = track.best_box_xyxy
    top, left, height, width = crop_window(track.best_box_xyxy, rgb.shape[:2])
    scale = size_wh[0] / width
    enlarged = cv2.resize(rgb[top : top + height, left : left + width], size_wh, interpolation=cv2.INTER_CUBIC)
    corners = [round((value - origin) * scale) for value, origin in ((x_min, left), (y_min, top), (x_max, left), (y_max, top))]
    cv2.rectangle(enlarged, (corners[0] - 2, corners[1] - 2), (corners[2] + 1, corners[3] + 1), (255, 255, 255), 1)
    return np.asarray(enlarged, np.uint8)


def crop_window(box_xyxy: tuple[float, float, float, float], shape_hw: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A window of the image's own proportions around a box, inside the image.

    Args:
        box_xyxy: px.
        shape_hw: Of the image, px.

    Returns:
        Top, left, height and width, px.
    """
    height, width = shape_hw[:2]
    x_min, y_min, x_max, y_max = box_xyxy
    share = min(1.0, max(LEAST_CROP, CROP_MARGIN * (x_max - x_min) / width, CROP_MARGIN * (y_max - y_min) / height))
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    top = round((y_min + y_max) / 2 - rows / 2)
    left = round((x_min + x_max) / 2 - columns / 2)
    return min(max(top, 0), height - rows), min(max(left, 0), width - columns), rows, columns


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1])
