"""What a running node made of a replayed recording: how late, how much it dropped, and its answers frame by frame."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ros2_ood_seg.evaluation.bag_messages import instances_from_message
from ros2_ood_seg.evaluation.bags import BagReader, StampedStream
from ros2_ood_seg.evaluation.results_bag import NODE, Answer
from ros2_ood_seg.image_encodings import decode_scores
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.types import FrameResult, Instances, Prompts

MAX_LAG_S = 10.0
"""A camera that seems to deliver later than this has another clock than the recorder."""


@dataclass(frozen=True)
class PlayedFrame:
    """One image that was published.

    Args:
        stamp_ns: Header stamp, ns.
        recorded_ns: When it was recorded, ns.
        sent_s: When it was published, s of the player's clock.
        answered_s: When its instances came back, s of the same clock; None when they did not.
    """

    stamp_ns: int
    recorded_ns: int
    sent_s: float
    answered_s: float | None = None

    @property
    def latency_ms(self) -> float | None:
        """From publishing to the instances, through two processes."""
        return None if self.answered_s is None else (self.answered_s - self.sent_s) * 1e3


@dataclass(frozen=True)
class PlayReport:
    """What became of a recording.

    Args:
        recorded: Images in the recording.
        complete: It was played to its end.
        frames: Published images in order.
    """

    recorded: int
    complete: bool
    frames: tuple[PlayedFrame, ...]

    @property
    def answered(self) -> int:
        """Images whose instances came back."""
        return sum(frame.answered_s is not None for frame in self.frames)

    @property
    def duration_s(self) -> float:
        """From the first image to the last answer, or to the last image when there was none."""
        if not self.frames:
            return 0.0
        answers = [frame.answered_s for frame in self.frames if frame.answered_s is not None]
        return max(answers, default=self.frames[-1].sent_s) - self.frames[0].sent_s

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> PlayReport:
        """Reads what :meth:`save` wrote."""
        tree = json.loads(path.read_text(encoding="utf-8"))
        return cls(tree["recorded"], tree["complete"], tuple(PlayedFrame(**frame) for frame in tree["frames"]))


@dataclass(frozen=True)
class Recording:
    """A replay that is over.

    Args:
        answers: MCAP file of the node's messages; log times are the stamps of the images they answer.
        played: What the player says.
        mode: How it was played, for people.
    """

    answers: Path
    played: PlayReport
    mode: str


def percentiles(values: Sequence[float], points: Sequence[int] = (50, 95)) -> dict[str, float] | None:
    """``{"p50": …}``, None without values."""
    return {f"p{point}": float(np.percentile(values, point)) for point in points} if values else None


def stale_share(frames: Sequence[PlayedFrame], after_s: float) -> float | None:
    """Share of the time in which the newest instances at hand were of an image published longer ago than ``after_s``.

    Time counts from the first image to the last event; until the first answer, the age is that of the first image.

    Args:
        frames: Published images in order.
        after_s: What counts as stale, s.

    Returns:
        In [0, 1]; None when no time passed.
    """
    if not frames:
        return None
    answers = sorted((f.answered_s, f.sent_s) for f in frames if f.answered_s is not None)
    start = frames[0].sent_s
    end = max(frames[-1].sent_s, answers[-1][0] if answers else start)
    if end <= start:
        return None
    stale, since, newest = 0.0, start, start
    for arrived, sent in (*answers, (end, end)):
        stale += max(0.0, arrived - max(since, newest + after_s))
        since, newest = arrived, max(newest, sent)
    return stale / (end - start)


def node_figures(recording: Recording, stale_after_s: float) -> dict[str, Any]:
    """How late the node was, and what became of the frames.

    Args:
        recording: The replay.
        stale_after_s: Instances of an image older than this are stale, s.

    Returns:
        Plain data. ``latency_ms`` runs from publishing an image to receiving its instances in another process; ``age_ms`` adds how
        late the camera delivered the image when it was recorded, and is None where the recording's clocks do not tell.

    Raises:
        InputError: The node's messages cannot be read.
    """
    played = recording.played
    counts = _last_counts(recording.answers)
    latency = [f.latency_ms for f in played.frames if f.latency_ms is not None]
    lag_s = np.array([(f.recorded_ns - f.stamp_ns) / 1e9 for f in played.frames])
    one_clock = lag_s.size > 0 and bool(np.all((lag_s >= 0.0) & (lag_s < MAX_LAG_S)))
    age = [f.latency_ms + lag * 1e3 for f, lag in zip(played.frames, lag_s, strict=True) if f.latency_ms is not None] if one_clock else []
    points = (50, 90, 95, 99)
    first_s = played.frames[0].sent_s if played.frames else 0.0
    return {
        "mode": recording.mode,
        "frames_recorded": played.recorded,
        "frames_played": len(played.frames),
        "frames_answered": played.answered,
        "frames_replaced": counts and counts["replaced"],
        "frames_rejected": counts and counts["rejected"],
        "frames_lost": counts and max(0, len(played.frames) - counts["received"]),
        "drop_rate": 1.0 - played.answered / len(played.frames) if played.frames else None,
        "played_to_the_end": played.complete,
        "fps": played.answered / played.duration_s if played.duration_s > 0.0 else None,
        "latency_ms": percentiles(latency, points),
        "age_ms": percentiles(age, points),
        "stale": {"after_s": stale_after_s, "rate": stale_share(played.frames, stale_after_s)},
        "timeline": {
            "sent_s": [round(f.sent_s - first_s, 4) for f in played.frames],
            "latency_ms": [None if f.latency_ms is None else round(f.latency_ms, 2) for f in played.frames],
        },
    }


def _last_counts(answers: Path) -> dict[str, int] | None:
    """The node's counts as of the last frame it answered; what it refused after that is not among them."""
    names = ("received", "answered", "replaced", "rejected")
    with BagReader(answers) as bag:
        messages = (bag.message(raw) for raw in bag.iter_raw([f"{NODE}/timing"]))
        counts = [{name: int(getattr(message, name)) for name in names} for message in messages]
    # Answers lie in the order of their stamps, which need not be that of the recording.
    return max(counts, key=lambda count: count["received"], default=None)


def iter_answers(
    bag: BagReader, topic: str, label_topics: Sequence[str], recording: Recording, pipeline: Pipeline | None
) -> Iterator[Answer]:
    """The frames that the node answered, in the order of the recording.

    Args:
        bag: The recording, open.
        topic: Full name of its camera topic.
        label_topics: Anomaly labels and instance labels.
        recording: The node's answers.
        pipeline: The node's settings, for the scorer's own map, which the node does not publish: it is computed again from the same
            frame and weights. None, or a frame without labels, gives no maps.

    Raises:
        InputError: A bag is damaged.
    """
    with BagReader(recording.answers) as answers:
        groups = (list(group) for _, group in groupby(answers.iter_raw(), key=lambda raw: raw.time_ns))
        stamps_ns = [stamp for stamp, _ in groupby(raw.time_ns for raw in answers.iter_raw())]
        stream = StampedStream(groups, stamps_ns)
        for image, labels in bag.iter_frames(topic, *label_topics):
            found = {raw.topic.removeprefix(f"{NODE}/"): raw for raw in stream.at(image.stamp_ns) or ()}
            if "instances" not in found:
                continue
            rgb = image.rgb()
            instances = instances_from_message(answers.message(found["instances"]), rgb.shape[:2])
            timing = answers.message(found["timing"]) if "timing" in found else None
            timings = {} if timing is None else dict(zip(timing.stages, map(float, timing.duration_ms), strict=True))
            result = None
            if pipeline is not None and labels and "anomaly_map" in found:
                result = _result(pipeline, rgb, instances, _scores(answers.message(found["anomaly_map"])), timings)
            messages = tuple(found[name] for name in ("instances", "boxes", "timing") if name in found)
            yield Answer(image, rgb, labels, instances, timings, messages, result)


def anomaly_map(recording: Recording, stamp_ns: int) -> NDArray[np.float32] | None:
    """(H, W) float32, the node's anomaly map of the image with this stamp; None when it was not recorded.

    Raises:
        InputError: The node's messages cannot be read.
    """
    with BagReader(recording.answers) as answers:
        raw = next(answers.iter_raw([f"{NODE}/anomaly_map"], stamp_ns, stamp_ns + 1), None)
        return None if raw is None else _scores(answers.message(raw))


def _scores(message: Any) -> NDArray[np.float32]:
    return decode_scores(message.encoding, message.height, message.width, message.step, message.is_bigendian, message.data)


def _result(
    pipeline: Pipeline, rgb: NDArray[np.uint8], instances: Instances, refined: NDArray[np.float32], timings_ms: dict[str, float]
) -> FrameResult:
    with torch.inference_mode():
        pixels = torch.from_numpy(rgb).to(pipeline.runtime.device)
        score_map = pipeline.scorer(pixels, None)
        ignore = pipeline.ignore_for(*score_map.shape_hw)
        prompts = Prompts.empty(pixels.device) if pipeline.box_prompts is None else pipeline.box_prompts(score_map, ignore)
    return FrameResult(instances, score_map, prompts, torch.from_numpy(refined), timings_ms, pipeline.config.profile)
