"""Reading rosbag2 recordings (MCAP and sqlite3) without ROS.

Evaluation reads bags directly rather than from a live topic, so that every frame is scored.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import MessageDefinitionFormat
from rosbags.rosbag2 import Reader

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_messages import COMPRESSED_IMAGE, RAW_IMAGE, header_stamp_ns, stamp_ns, typestore
from ros2_ood_seg.image_encodings import decode_compressed, decode_compressed_labels, decode_image, decode_labels

_IMAGE_TYPES = (RAW_IMAGE, COMPRESSED_IMAGE)
T = TypeVar("T")


@dataclass(frozen=True)
class Topic:
    """A topic of a bag.

    Args:
        name: Full name.
        msgtype: ``package/msg/Type``.
        count: Messages recorded.
    """

    name: str
    msgtype: str
    count: int

    def __str__(self) -> str:
        return f"{self.name} [{self.msgtype}, {self.count} messages]"


@dataclass(frozen=True)
class RawMessage:
    """A message as it was recorded.

    Args:
        topic: Full name.
        msgtype: ``package/msg/Type``.
        time_ns: When it was recorded, ns.
        data: CDR bytes.
    """

    topic: str
    msgtype: str
    time_ns: int
    data: bytes


@dataclass(frozen=True)
class BagImage:
    """An image message, decoded when asked.

    Args:
        topic: Where it was recorded.
        stamp_ns: ``header.stamp``, ns.
        frame_id: ``header.frame_id``.
        time_ns: When it was recorded, ns.
        message: sensor_msgs Image or CompressedImage.
        data: The message as it was recorded, CDR bytes.
    """

    topic: str
    stamp_ns: int
    frame_id: str
    time_ns: int
    message: Any
    data: bytes

    def rgb(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB.

        Raises:
            InputError: The message holds no usable colour image.
        """
        m = self.message
        if m.__msgtype__ == COMPRESSED_IMAGE:
            return decode_compressed(m.data, m.format)
        return decode_image(m.encoding, m.height, m.width, m.step, m.is_bigendian, m.data)

    def labels(self) -> NDArray[np.int32]:
        """(H, W) int32, the whole number of each pixel.

        Raises:
            InputError: The message holds no usable label image.
        """
        m = self.message
        if m.__msgtype__ == COMPRESSED_IMAGE:
            return decode_compressed_labels(m.data, m.format)
        return decode_labels(m.encoding, m.height, m.width, m.step, m.is_bigendian, m.data)


class BagReader:
    """Reads a rosbag2 recording; use it as a context manager.

    Args:
        path: Bag folder, or a single ``.mcap`` or ``.db3`` file.

    Raises:
        InputError: There is no such bag, or it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"bag '{path}' does not exist")
        if not is_bag(self.path):
            raise InputError(f"'{path}' is not a rosbag2 recording: use a folder with metadata.yaml, or a .mcap or .db3 file")
        with self._readable():
            self._reader = Reader(self.path)

    def __enter__(self) -> BagReader:
        with self._readable():
            self._reader.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.close()

    @property
    def topics(self) -> tuple[Topic, ...]:
        """All topics by name."""
        counts: dict[tuple[str, str], int] = {}
        for connection in self._reader.connections:
            key = (connection.topic, connection.msgtype)
            counts[key] = counts.get(key, 0) + connection.msgcount
        return tuple(Topic(name, msgtype, count) for (name, msgtype), count in sorted(counts.items()))

    def image_topic(self, topic: str | None = None, besides: Iterable[str] = ()) -> Topic:
        """The image topic that a name means.

        Args:
            topic: Its name; the leading slash and a trailing ``/compressed`` may be left out. None takes the only camera there is.
            besides: Full names of topics that are no cameras, labels for example.

        Raises:
            InputError: No such topic, it holds no images, or there are several cameras and none was named; lists what there is.
        """
        images = {t.name: t for t in self.topics if t.msgtype in _IMAGE_TYPES}
        if topic:
            name = "/" + topic.strip("/")
            candidates = [images[candidate] for candidate in (name, f"{name}/compressed") if candidate in images]
            if candidates:
                # A topic that was advertised and never used is recorded, too.
                return next((candidate for candidate in candidates if candidate.count), candidates[0])
            other = [t for t in self.topics if t.name == name]
            reason = f"topic '{name}' holds {other[0].msgtype}, no images" if other else f"has no topic '{name}'"
            raise InputError(f"bag '{self.path}': {reason}; its topics: {self._listed(self.topics)}")
        # A camera recorded raw and compressed is one camera.
        others, filled = set(besides), {t.name for t in images.values() if t.count}
        cameras = [images[name] for name in images if name in filled - others and name.removesuffix("/compressed") not in filled - {name}]
        if not cameras:
            raise InputError(f"bag '{self.path}' has no images; its topics: {self._listed(self.topics)}")
        if len(cameras) > 1:
            raise InputError(f"bag '{self.path}' has several image topics, choose one: {self._listed(cameras)}")
        return cameras[0]

    @property
    def definitions(self) -> dict[str, str]:
        """Message definitions that the bag itself holds (``.msg`` text with those of all nested types), by ``package/msg/Type``."""
        texts = ((c.msgtype, c.msgdef) for c in self._reader.connections)
        return {msgtype: text.data for msgtype, text in texts if text.format == MessageDefinitionFormat.MSG}

    @property
    def start_ns(self) -> int:
        """When its first message was recorded, ns."""
        return int(self._reader.start_time)

    @property
    def end_ns(self) -> int:
        """When its last message was recorded, ns."""
        return int(self._reader.end_time) - 1

    def iter_raw(self, topics: Iterable[str] = (), start_ns: int | None = None, stop_ns: int | None = None) -> Iterator[RawMessage]:
        """Messages by time of recording.

        Args:
            topics: Full names; none means all.
            start_ns: Only those recorded at this time or later, ns.
            stop_ns: Only those recorded before this time, ns.

        Raises:
            InputError: The file is damaged; what came before has been given.
        """
        names = set(topics)
        connections = [c for c in self._reader.connections if not names or c.topic in names]
        with self._readable():
            for connection, time_ns, data in self._reader.messages(connections, start_ns, stop_ns) if connections else ():
                yield RawMessage(connection.topic, connection.msgtype, time_ns, bytes(data))

    def iter_images(self, topic: str | None = None, start_ns: int | None = None, stop_ns: int | None = None) -> Iterator[BagImage]:
        """Images of one topic by time of recording; see :meth:`image_topic` for the name and :meth:`iter_raw` for the times.

        Raises:
            InputError: See :meth:`image_topic` and :meth:`iter_raw`.
        """
        for raw in self.iter_raw([self.image_topic(topic).name], start_ns, stop_ns):
            yield self.image(raw)

    def stamps_ns(self, topic: str) -> list[int]:
        """The stamps of a topic's messages by time of recording, ns, as far as the file can be read."""
        stamps: list[int] = []
        with suppress(InputError):
            # Extended one by one: what came before an error stays.
            stamps.extend(header_stamp_ns(raw.data) for raw in self.iter_raw([topic]))
        return stamps

    def iter_frames(self, image_topic: str | None, *label_topics: str) -> Iterator[tuple[BagImage, tuple[BagImage, ...]]]:
        """All images, each with its labels where it has them, matched by exactly equal stamps.

        Every topic is read on its own, so labels may have been recorded at any time, in the order of their stamps.

        Args:
            image_topic: See :meth:`image_topic`.
            *label_topics: One topic per kind of label.

        Yields:
            The image, and either one label of every kind in the order of the arguments or none.

        Raises:
            InputError: See :meth:`image_topic` and :meth:`iter_raw`.
        """
        camera, *names = (self.image_topic(name).name for name in (image_topic, *label_topics))
        with ExitStack() as readers:
            labels_of = [readers.enter_context(BagReader(self.path)) for _ in names]
            streams = [StampedStream(bag.iter_images(name), bag.stamps_ns(name)) for bag, name in zip(labels_of, names, strict=True)]
            for image in self.iter_images(camera):
                labels = [stream.at(image.stamp_ns) for stream in streams]
                yield image, () if None in labels else tuple(label for label in labels if label is not None)

    def iter_labelled(self, image_topic: str | None, *label_topics: str) -> Iterator[tuple[BagImage, ...]]:
        """The images that have labels, with these; see :meth:`iter_frames`.

        Yields:
            The image and its labels, in the order of the arguments.

        Raises:
            InputError: See :meth:`iter_frames`; or no image has all its labels.
        """
        matched = False
        for image, labels in self.iter_frames(image_topic, *label_topics):
            if labels:
                matched = True
                yield image, *labels
        if not matched:
            raise self.unmatched(image_topic, *label_topics)

    def unmatched(self, image_topic: str | None, *label_topics: str) -> InputError:
        """The error that no image has all its labels."""
        camera, *names = (self.image_topic(name).name for name in (image_topic, *label_topics))
        return InputError(f"bag '{self.path}': no image of '{camera}' has the same stamp as a label of {', '.join(names)}")

    def image(self, raw: RawMessage) -> BagImage:
        """A raw message of an image topic as an image.

        Raises:
            InputError: The bytes are no image message.
        """
        message = self.message(raw)
        return BagImage(raw.topic, stamp_ns(message.header), message.header.frame_id, raw.time_ns, message, raw.data)

    def message(self, raw: RawMessage) -> Any:
        """Deserialises a message of a type that ROS or this package defines.

        Raises:
            InputError: The bytes are not such a message.
        """
        with self._readable():
            return typestore().deserialize_cdr(raw.data, raw.msgtype)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        # The parsers of damaged files raise whatever they stumble over: struct, sqlite3, zstd, YAML and decoding errors.
        except Exception as error:
            raise InputError(f"bag '{self.path}' cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error

    @staticmethod
    def _listed(topics: Iterable[Topic]) -> str:
        return ", ".join(str(t) for t in topics) or "none"


class StampedStream(Generic[T]):
    """Finds items of a stream by stamp, for somebody who asks nearly in the order of the stream.

    It is read no further than to the item that is asked for, so that one wrong stamp costs one item.

    Args:
        items: Each at most once, few of them swapped with respect to the questions.
        stamps_ns: The stamps of all items in their order, ns; several may be equal.
    """

    KEPT = 20

    def __init__(self, items: Iterator[T], stamps_ns: Iterable[int]) -> None:
        self._items = items
        self._numbers: dict[int, deque[int]] = {}
        for number, stamp in enumerate(stamps_ns):
            self._numbers.setdefault(stamp, deque()).append(number)
        self._passed: OrderedDict[int, T] = OrderedDict()
        self._read = 0

    def at(self, stamp_ns: int) -> T | None:
        """The item of exactly this stamp, the next of several, once; None when there is none."""
        numbers = self._numbers.get(stamp_ns)
        if not numbers:
            return None
        number = numbers.popleft()
        while self._read <= number and (item := next(self._items, None)) is not None:
            self._passed[self._read] = item
            self._read += 1
            if len(self._passed) > self.KEPT:
                self._passed.popitem(last=False)
        return self._passed.pop(number, None)


def is_bag(path: Path) -> bool:
    """Whether a path looks like a rosbag2 recording."""
    return (path / "metadata.yaml").is_file() if path.is_dir() else path.suffix in (".mcap", ".db3")
