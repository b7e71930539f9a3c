"""When new anomaly tracks appear in a drive, and the stretches of time around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_messages import NS_PER_S
from ros2_ood_seg.types import Instances


@dataclass(frozen=True)
class EventRule:
    """Which tracks are worth a clip, and how long it is.

    Args:
        before_s: Seconds before a track appears.
        after_s: Seconds after it appeared.
        min_score: Least score that it reaches, in [0, 1].
        min_frames: Least number of frames that it is seen in.

    Raises:
        InputError: A value out of range.
    """

    before_s: float = 3.0
    after_s: float = 5.0
    min_score: float = 0.5
    min_frames: int = 3

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("--clip-before", self.before_s, 0.0, 600.0),
            ("--clip-after", self.after_s, 0.0, 600.0),
            ("--clip-min-score", self.min_score, 0.0, 1.0),
            ("--clip-min-frames", self.min_frames, 1, 100_000),
        ):
            if not low <= value <= high:
                raise InputError(f"{name} is {value:g}, allowed: {low:g} to {high:g}")


@dataclass
class Track:
    """One object over time, as far as it was seen.

    Args:
        track_id: Of the tracker, unique in a drive.
        first_ns: When the first frame with it was recorded, ns.
        frames: In how many frames it was seen.
        best_score: Its highest score, in [0, 1].
        best_ns: When the frame of that score was recorded, ns.
        best_box_xyxy: Its box there, px.
    """

    track_id: int
    first_ns: int
    frames: int
    best_score: float
    best_ns: int
    best_box_xyxy: tuple[float, float, float, float]

    def summary(self, start_ns: int) -> dict[str, Any]:
        """Plain data; ``start_ns`` is when the drive started."""
        return {
            "track_id": self.track_id,
            "first_s": (self.first_ns - start_ns) / NS_PER_S,
            "frames": self.frames,
            "best_score": self.best_score,
            "best_s": (self.best_ns - start_ns) / NS_PER_S,
            "best_box_xyxy": list(self.best_box_xyxy),
        }


@dataclass(frozen=True)
class Event:
    """A stretch of a drive in which tracks appear.

    Args:
        start_ns: First moment, ns.
        stop_ns: Last moment, ns.
        tracks: By time of appearance.
    """

    start_ns: int
    stop_ns: int
    tracks: tuple[Track, ...]


class TrackLog:
    """Remembers the tracks of a drive, a few numbers each."""

    def __init__(self) -> None:
        self.tracks: dict[int, Track] = {}

    def add(self, time_ns: int, instances: Instances) -> None:
        """Takes a frame.

        Args:
            time_ns: When it was recorded, ns.
            instances: Found in it; those without a track are left out.
        """
        columns = (instances.track_ids, instances.scores, instances.boxes_xyxy)
        for track_id, score, box in zip(*(column.tolist() for column in columns), strict=True):
            if not track_id:
                continue
            track = self.tracks.setdefault(track_id, Track(track_id, time_ns, 0, -1.0, time_ns, tuple(box)))
            track.frames += 1
            if score > track.best_score:
                track.best_score, track.best_ns, track.best_box_xyxy = score, time_ns, tuple(box)

    def events(self, rule: EventRule) -> list[Event]:
        """The stretches around the tracks that fit the rule; those that overlap are one."""
        chosen = (t for t in self.tracks.values() if t.frames >= rule.min_frames and t.best_score >= rule.min_score)
        return merge_events(
            Event(track.first_ns - round(rule.before_s * NS_PER_S), track.first_ns + round(rule.after_s * NS_PER_S), (track,))
            for track in chosen
        )


def merge_events(events: Iterable[Event]) -> list[Event]:
    """Events by time; those that overlap or touch become one that covers them."""
    merged: list[Event] = []
    for event in sorted(events, key=lambda e: (e.start_ns, e.stop_ns)):
        before = merged[-1] if merged else None
        if before is None or event.start_ns > before.stop_ns:
            merged.append(event)
            continue
        tracks = tuple(sorted((*before.tracks, *event.tracks), key=lambda track: track.first_ns))
        merged[-1] = Event(before.start_ns, max(before.stop_ns, event.stop_ns), tracks)
    return merged
