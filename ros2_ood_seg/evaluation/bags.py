"""Reading and writing rosbag2 recordings (MCAP and sqlite3) without ROS.

Evaluation reads bags directly rather than from a live topic, so that every frame is scored.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rosbags.interfaces import Connection
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from ros2_ood_seg import rle
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import decode_compressed, decode_compressed_labels, decode_image, decode_labels
from ros2_ood_seg.synthetic import SyntheticDrive
from ros2_ood_seg.types import Instances, boxes_from_masks

RAW_IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
INSTANCE_ARRAY = "ros2_ood_seg/msg/AnomalyInstanceArray"
_IMAGE_TYPES = (RAW_IMAGE, COMPRESSED_IMAGE)
_MAX_WAITING = 200
_NS_PER_S = 1_000_000_000


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
    """

    topic: str
    stamp_ns: int
    frame_id: str
    time_ns: int
    message: Any

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


@lru_cache(maxsize=1)
def typestore() -> Typestore:
    """The message types of ROS 2 Jazzy and of this package; image messages are the same in every ROS 2."""
    store = get_typestore(Stores.ROS2_JAZZY)
    types = {}
    for path in sorted(_definitions_dir().glob("*.msg")):
        types.update(get_types_from_msg(path.read_text(encoding="utf-8"), f"ros2_ood_seg/msg/{path.stem}"))
    store.register(types)
    return store


def _definitions_dir() -> Path:
    """Folder of this package's ``.msg`` files: beside the installed module, else at the top of the source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "interfaces"
    return installed if installed.is_dir() else package.parent / "msg"


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

    def image_topic(self, topic: str | None = None) -> Topic:
        """The image topic that a name means.

        Args:
            topic: Its name; the leading slash and a trailing ``/compressed`` may be left out. None takes the only camera there is.

        Raises:
            InputError: No such topic, it holds no images, or there are several cameras and none was named; lists what there is.
        """
        images = {t.name: t for t in self.topics if t.msgtype in _IMAGE_TYPES}
        if topic:
            name = "/" + topic.strip("/")
            for candidate in (name, f"{name}/compressed"):
                if candidate in images:
                    return images[candidate]
            other = [t for t in self.topics if t.name == name]
            reason = f"topic '{name}' holds {other[0].msgtype}, no images" if other else f"has no topic '{name}'"
            raise InputError(f"bag '{self.path}': {reason}; its topics: {self._listed(self.topics)}")
        # A camera recorded raw and compressed is one camera.
        cameras = [t for t in images.values() if t.count and t.name.removesuffix("/compressed") not in images.keys() - {t.name}]
        if not cameras:
            raise InputError(f"bag '{self.path}' has no images; its topics: {self._listed(self.topics)}")
        if len(cameras) > 1:
            raise InputError(f"bag '{self.path}' has several image topics, choose one: {self._listed(cameras)}")
        return cameras[0]

    def iter_raw(self, topics: Iterable[str] = ()) -> Iterator[RawMessage]:
        """Messages by time of recording.

        Args:
            topics: Full names; none means all.

        Raises:
            InputError: The file is damaged; what came before has been given.
        """
        names = set(topics)
        connections = [c for c in self._reader.connections if not names or c.topic in names]
        with self._readable():
            for connection, time_ns, data in self._reader.messages(connections) if connections else ():
                yield RawMessage(connection.topic, connection.msgtype, time_ns, bytes(data))

    def iter_images(self, topic: str | None = None) -> Iterator[BagImage]:
        """Images of one topic by time of recording; see :meth:`image_topic` for the name.

        Raises:
            InputError: See :meth:`image_topic` and :meth:`iter_raw`.
        """
        for raw in self.iter_raw([self.image_topic(topic).name]):
            yield self.image(raw)

    def iter_labelled(self, image_topic: str | None, *label_topics: str) -> Iterator[tuple[BagImage, ...]]:
        """Images with their labels, matched by exactly equal stamps; images without a label are left out.

        Args:
            image_topic: See :meth:`image_topic`.
            *label_topics: One topic per kind of label.

        Yields:
            The image and its labels, in the order of the arguments.

        Raises:
            InputError: See :meth:`image_topic`; or no image has all its labels.
        """
        names = [self.image_topic(name).name for name in (image_topic, *label_topics)]
        waiting: OrderedDict[int, dict[str, BagImage]] = OrderedDict()
        matched = 0
        for raw in self.iter_raw(names):
            image = self.image(raw)
            group = waiting.setdefault(image.stamp_ns, {})
            group[raw.topic] = image
            if len(group) == len(names):
                matched += 1
                del waiting[image.stamp_ns]
                yield tuple(group[name] for name in names)
            elif len(waiting) > _MAX_WAITING:
                waiting.popitem(last=False)
        if not matched:
            raise InputError(f"bag '{self.path}': no image of '{names[0]}' has the same stamp as a label of {', '.join(names[1:])}")

    def image(self, raw: RawMessage) -> BagImage:
        """A raw message of an image topic as an image.

        Raises:
            InputError: The bytes are no image message.
        """
        message = self.message(raw)
        stamp = message.header.stamp
        return BagImage(raw.topic, stamp.sec * _NS_PER_S + stamp.nanosec, message.header.frame_id, raw.time_ns, message)

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


class BagWriter:
    """Writes a rosbag2 recording; use it as a context manager. Log times are the stamps.

    Args:
        path: A folder to make; or, ending in ``.mcap``, a single file.
        storage: Format of the file inside the folder.

    Raises:
        InputError: The path exists, or its folder cannot be written.
    """

    def __init__(self, path: str | Path, storage: Literal["mcap", "sqlite3"] = "mcap") -> None:
        self.path = Path(path)
        if self.path.exists():
            raise InputError(f"bag '{path}' exists already")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # rosbag2 writers make folders; a single file is taken out of one when it is complete.
            self._folder = Path(tempfile.mkdtemp(prefix=".bag-", dir=self.path.parent))
        except OSError as error:
            raise InputError(f"bag '{path}' cannot be written: {error}") from error
        plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
        self._writer = Writer(self._folder / self.path.stem, version=9, storage_plugin=plugin)
        self._connections: dict[str, Connection] = {}

    def __enter__(self) -> BagWriter:
        self._writer.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._writer.close()
            written = self._folder / self.path.stem
            if kind is None and self.path.suffix == ".mcap":
                next(written.glob("*.mcap")).replace(self.path)
            elif kind is None:
                written.replace(self.path)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def write_raw(self, topic: str, msgtype: str, time_ns: int, data: bytes) -> None:
        """Writes CDR bytes of a type that ROS or this package defines."""
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, msgtype, typestore=typestore())
        self._writer.write(self._connections[topic], time_ns, data)

    def write(self, topic: str, message: Any, time_ns: int) -> None:
        """Writes a message made with the types of :func:`typestore`."""
        self.write_raw(topic, message.__msgtype__, time_ns, bytes(typestore().serialize_cdr(message, message.__msgtype__)))

    def write_image(self, topic: str, image: NDArray[Any], stamp_ns: int, frame_id: str = "") -> None:
        """Writes a raw image.

        Args:
            topic: Full name.
            image: (H, W, 3) uint8 RGB (``rgb8``), or (H, W) labels, uint8 (``mono8``) or uint16 (``mono16``).
            stamp_ns: Header stamp and log time, ns.
            frame_id: Of the header.

        Raises:
            InputError: Another shape or type.
        """
        kinds = {(3, "uint8"): "rgb8", (2, "uint8"): "mono8", (2, "uint16"): "mono16"}
        encoding = kinds.get((image.ndim, image.dtype.name))
        if encoding is None or (image.ndim == 3 and image.shape[2] != 3):
            raise InputError(f"a raw image must be (H, W, 3) uint8, or (H, W) uint8 or uint16; got {image.shape} {image.dtype}")
        data = np.ascontiguousarray(image).astype(image.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
        height, width = image.shape[:2]
        cls = typestore().types[RAW_IMAGE]
        self.write(topic, cls(make_header(stamp_ns, frame_id), height, width, encoding, 0, data.size // height, data), stamp_ns)

    def write_jpeg(self, topic: str, image_rgb: NDArray[np.uint8], stamp_ns: int, frame_id: str = "", quality: int = 90) -> None:
        """Writes a JPEG image; by convention the topic ends in ``/compressed``."""
        bgr = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
        data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].reshape(-1)
        cls = typestore().types[COMPRESSED_IMAGE]
        self.write(topic, cls(make_header(stamp_ns, frame_id), "rgb8; jpeg compressed bgr8", data), stamp_ns)


DRIVE_IMAGE, DRIVE_LABEL, DRIVE_INSTANCE = "/camera/image", "/camera/anomaly_label", "/camera/instance_label"


def write_drive(path: str | Path, drive: SyntheticDrive) -> None:
    """Writes a synthetic drive as a bag: raw images, labels (0 normal, 1 anomaly, 255 ignore) and instance labels.

    Args:
        path: See :class:`BagWriter`.
        drive: Its frames.

    Raises:
        InputError: See :class:`BagWriter`.
    """
    with BagWriter(path) as bag:
        for frame in drive:
            for topic, pixels in ((DRIVE_LABEL, frame.anomaly), (DRIVE_INSTANCE, frame.instances), (DRIVE_IMAGE, frame.image)):
                bag.write_image(topic, pixels, frame.stamp_ns, "camera_optical")


def is_bag(path: Path) -> bool:
    """Whether a path looks like a rosbag2 recording."""
    return (path / "metadata.yaml").is_file() if path.is_dir() else path.suffix in (".mcap", ".db3")


def make_header(stamp_ns: int, frame_id: str) -> Any:
    """A std_msgs/Header for :meth:`BagWriter.write`."""
    types = typestore().types
    stamp = types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, _NS_PER_S))
    return types["std_msgs/msg/Header"](stamp, frame_id)


def instances_from_message(message: Any, shape_hw: tuple[int, int]) -> Instances:
    """Instances of a ros2_ood_seg/AnomalyInstanceArray, on the CPU.

    Args:
        message: As :meth:`BagReader.message` or rclpy gives it.
        shape_hw: Size of its image, px.

    Raises:
        InputError: A mask of another size, or a run-length code that does not fit its size.
    """
    masks = torch.zeros((len(message.instances), *shape_hw), dtype=torch.bool)
    for mask, instance in zip(masks, message.instances, strict=True):
        code = instance.mask
        if (code.height, code.width) != shape_hw:
            raise InputError(f"instance {instance.id} has a mask of {code.width}x{code.height} px, its image {shape_hw[1]}x{shape_hw[0]}")
        mask.copy_(torch.from_numpy(rle.decode(code.counts, code.height, code.width)))

    def column(name: str) -> torch.Tensor:
        return torch.tensor([float(getattr(i, name)) for i in message.instances], dtype=torch.float32)

    boxes, area = boxes_from_masks(masks)
    scores = column("score")
    found = Instances(masks, boxes, scores, column("raw_score"), column("mask_quality"), area, column("track_id").long())
    return found.select(torch.argsort(scores, descending=True, stable=True))
