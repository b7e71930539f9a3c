"""Writing rosbag2 recordings (MCAP and sqlite3) without ROS; message definitions are embedded, so that any viewer can read them."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, TypesysError, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_messages import COMPRESSED_IMAGE, RAW_IMAGE, make_header, typestore
from ros2_ood_seg.synthetic import SyntheticDrive

RESERVE_BYTES = 1 << 25
"""Of the disk that a bag holds which stays when it is unfinished: for its last messages, and for the index of some 100 GB."""

_PREFIX, _LOCK = ".bag-", "lock"

DRIVE_IMAGE, DRIVE_LABEL, DRIVE_INSTANCE = "/camera/image", "/camera/anomaly_label", "/camera/instance_label"


class BagWriter:
    """Writes a rosbag2 recording; use it as a context manager. Log times are the stamps unless said otherwise.

    Args:
        path: A folder to make; or, ending in ``.mcap``, a single file.
        storage: Format of the file inside the folder.
        replace: A single file may replace an older one, when it is complete.
        keep_unfinished: What was written before an error is closed properly and stays, also when the error is that the disk is full: room
            for the index that a reader needs is set aside. Otherwise it is removed.

    Raises:
        InputError: The path exists, or it cannot be written; from all methods when the disk is full.
    """

    def __init__(
        self, path: str | Path, storage: Literal["mcap", "sqlite3"] = "mcap", *, replace: bool = False, keep_unfinished: bool = False
    ) -> None:
        self.path = Path(path)
        if self.path.is_dir() or (self.path.exists() and not replace):
            raise InputError(f"bag '{path}' exists already")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # rosbag2 writers make folders; a single file is taken out of one when it is complete.
            remove_abandoned(self.path.parent)
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.path.parent))
            self._lock = _locked(self._folder)
        except OSError as error:
            raise InputError(f"bag '{path}' cannot be written: {error}") from error
        plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
        self._writer = Writer(self._folder / self.path.stem, version=9, storage_plugin=plugin)
        self._keep_unfinished = keep_unfinished
        self._reserve = self._folder / "reserve"
        self._connections: dict[str, Connection] = {}
        self._foreign: Typestore | None = None

    def __enter__(self) -> BagWriter:
        try:
            with self._writable():
                if self._keep_unfinished:
                    self._reserve.write_bytes(bytes(RESERVE_BYTES))
                self._writer.open()
        except InputError:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._writable():
                self._reserve.unlink(missing_ok=True)
                self._writer.close()
            written = self._folder / self.path.stem
            if kind is not None and not self._keep_unfinished:
                return
            (next(written.glob("*.mcap")) if self.path.suffix == ".mcap" else written).replace(self.path)
        finally:
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    @contextmanager
    def _writable(self, before: str = "") -> Iterator[None]:
        """Names the bag, which errors of open files do not, and what became of what was written before."""
        try:
            yield
        except OSError as error:
            raise InputError(f"bag '{self.path}' cannot be written: {error.strerror or error}{before}") from error

    def write_raw(self, topic: str, msgtype: str, time_ns: int, data: bytes, definition: str | None = None) -> None:
        """Writes a serialised message.

        Args:
            topic: Full name.
            msgtype: ``package/msg/Type``.
            time_ns: Log time, ns.
            data: CDR bytes.
            definition: ``.msg`` text with those of all nested types; not needed for types that ROS or this package defines.

        Raises:
            InputError: A type that is neither known nor defined, or a full disk.
        """
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, msgtype, typestore=self._store(msgtype, definition))
        with self._writable("; it holds what came before" if self._keep_unfinished else ""):
            self._writer.write(self._connections[topic], time_ns, data)

    def _store(self, msgtype: str, definition: str | None) -> Typestore:
        """A type store that knows the type."""
        if msgtype in typestore().fielddefs:
            return typestore()
        if definition is None:
            raise InputError(f"bag '{self.path}': nothing defines the message type '{msgtype}'")
        if self._foreign is None:
            self._foreign = get_typestore(Stores.EMPTY)
        try:
            parsed = get_types_from_msg(definition, msgtype)
            self._foreign.register({name: fields for name, fields in parsed.items() if name not in self._foreign.fielddefs})
        except TypesysError as error:
            raise InputError(f"bag '{self.path}': the definition of '{msgtype}' cannot be read: {error}") from error
        return self._foreign

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

    def write_jpeg(
        self, topic: str, image_rgb: NDArray[np.uint8], stamp_ns: int, frame_id: str = "", quality: int = 90, time_ns: int | None = None
    ) -> None:
        """Writes a JPEG image; by convention the topic ends in ``/compressed``.

        Args:
            topic: Full name.
            image_rgb: (H, W, 3) uint8 RGB.
            stamp_ns: Header stamp, ns.
            frame_id: Of the header.
            quality: Of the JPEG, 1 to 100.
            time_ns: Log time, ns; None for the stamp.
        """
        bgr = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
        data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].reshape(-1)
        cls = typestore().types[COMPRESSED_IMAGE]
        message = cls(make_header(stamp_ns, frame_id), "rgb8; jpeg compressed bgr8", data)
        self.write(topic, message, stamp_ns if time_ns is None else time_ns)


def remove_abandoned(folder: Path) -> None:
    """Removes what bags left in a folder whose process was killed while it wrote them; those that are being written stay."""
    for path in folder.glob(f"{_PREFIX}*/{_LOCK}"):
        # It is locked, somebody else's, or has just gone.
        with suppress(OSError), path.open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)


def _locked(folder: Path) -> IO[bytes]:
    """A file in a new folder that is locked until it is closed, at the latest when the process ends."""
    lock = (folder / "new").open("xb")
    # Where files cannot be locked, the folder is never taken for abandoned.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It has its name only when it is locked.
        (folder / "new").rename(folder / _LOCK)
    return lock


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
