"""What was found in a drive, as a bag that Foxglove and RViz open: source frames, overlays and messages on one time axis."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.evaluation.bag_messages import (
    COMPRESSED_IMAGE,
    INSTANCE_ARRAY,
    boxes_message,
    instances_message,
    timing_message,
    typestore,
)
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.evaluation.bags import BagImage, BagReader, RawMessage
from ros2_ood_seg.types import FrameResult, Instances
from ros2_ood_seg.visualization import draw_overlay

NODE = "/ood_segmenter"
INSTANCES_TOPIC = f"{NODE}/instances"
OVERLAY_TOPIC = f"{NODE}/overlay"


@dataclass(frozen=True)
class Answer:
    """One frame of a recording and what was found in it.

    Args:
        image: As recorded.
        rgb: (H, W, 3) uint8 RGB, the same decoded.
        labels: Anomaly labels and instance labels, as many as were asked for; none when the frame has none.
        instances: On the CPU.
        timings_ms: Stages of the pipeline.
        messages: Outputs under the node's topics; their log times do not count.
        result: With all maps; None when nobody measures the frame.
    """

    image: BagImage
    rgb: NDArray[np.uint8]
    labels: tuple[BagImage, ...]
    instances: Instances
    timings_ms: dict[str, float]
    messages: tuple[RawMessage, ...]
    result: FrameResult | None


def result_messages(result: FrameResult, image: BagImage, answered: int) -> tuple[RawMessage, ...]:
    """A result as the node's small messages, serialised.

    Args:
        result: Of one frame.
        image: The frame; its header goes with every message.
        answered: Frames so far, this one included.
    """
    header = image.message.header
    instances = instances_message(result, header)
    boxes = boxes_message(instances)
    timing = timing_message(result.timings_ms, result.profile, answered, header)
    outputs: dict[str, Any] = {"instances": instances, "boxes": boxes, "timing": timing}
    return tuple(
        RawMessage(f"{NODE}/{name}", message.__msgtype__, image.time_ns, bytes(typestore().serialize_cdr(message, message.__msgtype__)))
        for name, message in outputs.items()
    )


class ResultsBag:
    """Writes answers as one MCAP file; use it as a context manager. Log times are those of the source images.

    Compressed source images are copied byte for byte, raw ones become JPEG under ``<topic>/compressed``: everything can be seen in this
    one file, and it does not grow as the recording did. What was written before an error stays.

    Args:
        path: File to write; an older one is replaced.
        pictures: Also source frames and overlays; otherwise messages only.
        overlap: Draw and encode in the background, while the caller works on the next frame.

    Raises:
        InputError: The file cannot be written, from all methods when the disk is full.
    """

    def __init__(self, path: Path, pictures: bool = True, overlap: bool = False) -> None:
        self._bag = BagWriter(path, replace=True, keep_unfinished=True)
        self._pictures = pictures
        self._overlap = overlap
        self._worker = ThreadPoolExecutor(1, "results")
        self._writing: Future[None] | None = None

    def __enter__(self) -> ResultsBag:
        self._bag.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._wait()
        finally:
            self._worker.shutdown()
            self._bag.__exit__(kind, error, trace)

    def add(self, answer: Answer) -> None:
        """Writes a frame."""
        self._wait()
        self._writing = self._worker.submit(self._write, answer)
        if not self._overlap:
            self._wait()

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, answer: Answer) -> None:
        image = answer.image
        if self._pictures:
            if image.message.__msgtype__ == COMPRESSED_IMAGE:
                self._bag.write_raw(image.topic, COMPRESSED_IMAGE, image.time_ns, image.data)
            else:
                self._bag.write_jpeg(f"{image.topic}/compressed", answer.rgb, image.stamp_ns, image.frame_id, time_ns=image.time_ns)
        for message in answer.messages:
            self._bag.write_raw(message.topic, message.msgtype, image.time_ns, message.data)
        if self._pictures:
            overlay = draw_overlay(answer.rgb, answer.instances)
            self._bag.write_jpeg(f"{OVERLAY_TOPIC}/compressed", overlay, image.stamp_ns, image.frame_id, 80, image.time_ns)


def iter_instances(results: BagReader, start_ns: int | None = None, stop_ns: int | None = None) -> Iterator[tuple[int, Any]]:
    """Log time (ns) and AnomalyInstanceArray of the frames in a results bag.

    Args:
        results: Open.
        start_ns: Only those at this time or later, ns.
        stop_ns: Only those before this time, ns.

    Raises:
        InputError: The file is damaged.
    """
    for raw in results.iter_raw([INSTANCES_TOPIC], start_ns, stop_ns):
        if raw.msgtype == INSTANCE_ARRAY:
            yield raw.time_ns, results.message(raw)
