"""Decoding of camera images as ROS messages carry them, without ROS: fields and bytes in, arrays out.

The one decoder of the project: bags are read with it directly, and ``ros/images.py`` is its adapter for messages. Encodings,
``step`` and ``is_bigendian`` mean what sensor_msgs/Image and sensor_msgs/image_encodings.hpp say.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ros2_ood_seg.errors import InputError

Buffer = Any
"""Anything with the buffer protocol: bytes, an array, the ``array.array`` of an rclpy message."""

_PNG_PALETTE = 3
_BMP_OR_TIFF = (b"BM", b"II*\0", b"MM\0*")
_SPREAD = "a label image has {} bit a pixel, which are read spread over 0 to 255: save labels with 8 bit"
_TAIL_BYTES = 65_536
"""Among so many last bytes of a file is its end marker, whatever a camera appends."""
MAX_SIDE_PX = 16_384
"""No camera is larger: a message that claims more is damaged."""


@dataclass(frozen=True)
class _Layout:
    """How an encoding lies in memory.

    Args:
        dtype: Type of one channel of one pixel.
        channels: Interleaved channels per pixel.
        conversion: OpenCV's colour conversion to RGB, None when it is RGB.
        half_rows: Half rows of data per image row: 2 for interleaved formats, 3 with a half-height chroma plane below.
        multiple_of: What width and height must be multiples of, (width, height).
    """

    dtype: type[np.uint8] | type[np.uint16]
    channels: int
    conversion: int | None
    half_rows: int = 2
    multiple_of: tuple[int, int] = (1, 1)


_LAYOUTS: dict[str, _Layout] = {
    "rgb8": _Layout(np.uint8, 3, None),
    "bgr8": _Layout(np.uint8, 3, cv2.COLOR_BGR2RGB),
    "8UC3": _Layout(np.uint8, 3, cv2.COLOR_BGR2RGB),
    "rgba8": _Layout(np.uint8, 4, cv2.COLOR_RGBA2RGB),
    "bgra8": _Layout(np.uint8, 4, cv2.COLOR_BGRA2RGB),
    "mono8": _Layout(np.uint8, 1, cv2.COLOR_GRAY2RGB),
    "8UC4": _Layout(np.uint8, 4, cv2.COLOR_BGRA2RGB),
    "8UC1": _Layout(np.uint8, 1, cv2.COLOR_GRAY2RGB),
    "16UC1": _Layout(np.uint16, 1, cv2.COLOR_GRAY2RGB),
    "rgb16": _Layout(np.uint16, 3, None),
    "bgr16": _Layout(np.uint16, 3, cv2.COLOR_BGR2RGB),
    "rgba16": _Layout(np.uint16, 4, cv2.COLOR_RGBA2RGB),
    "bgra16": _Layout(np.uint16, 4, cv2.COLOR_BGRA2RGB),
    "mono16": _Layout(np.uint16, 1, cv2.COLOR_GRAY2RGB),
    "uyvy": _Layout(np.uint8, 2, cv2.COLOR_YUV2RGB_UYVY, multiple_of=(2, 1)),
    "yuv422": _Layout(np.uint8, 2, cv2.COLOR_YUV2RGB_UYVY, multiple_of=(2, 1)),
    "yuyv": _Layout(np.uint8, 2, cv2.COLOR_YUV2RGB_YUYV, multiple_of=(2, 1)),
    "yuv422_yuy2": _Layout(np.uint8, 2, cv2.COLOR_YUV2RGB_YUYV, multiple_of=(2, 1)),
    "nv12": _Layout(np.uint8, 1, cv2.COLOR_YUV2RGB_NV12, half_rows=3, multiple_of=(2, 2)),
    "nv21": _Layout(np.uint8, 1, cv2.COLOR_YUV2RGB_NV21, half_rows=3, multiple_of=(2, 2)),
}
# OpenCV names the pattern of the second row and column, ROS that of the first.
_BAYER = {"rggb": cv2.COLOR_BayerBG2RGB, "bggr": cv2.COLOR_BayerRG2RGB, "gbrg": cv2.COLOR_BayerGR2RGB, "grbg": cv2.COLOR_BayerGB2RGB}
for _pattern, _code in _BAYER.items():
    _LAYOUTS[f"bayer_{_pattern}8"] = _Layout(np.uint8, 1, _code, multiple_of=(2, 2))
    _LAYOUTS[f"bayer_{_pattern}16"] = _Layout(np.uint16, 1, _code, multiple_of=(2, 2))

COLOR_ENCODINGS: tuple[str, ...] = tuple(_LAYOUTS)
"""Encodings that :func:`decode_image` takes."""

_LABEL_TYPES: dict[str, type[np.generic]] = {
    "mono8": np.uint8,
    "8UC1": np.uint8,
    "mono16": np.uint16,
    "16UC1": np.uint16,
    "32SC1": np.int32,
}
LABEL_ENCODINGS: tuple[str, ...] = tuple(_LABEL_TYPES)
"""Encodings that :func:`decode_labels` takes."""

_FLOAT_TYPES: dict[str, type[np.generic]] = {"32FC1": np.float32, "64FC1": np.float64}
FLOAT_ENCODINGS: tuple[str, ...] = tuple(_FLOAT_TYPES)
"""Encodings that :func:`decode_scores` takes."""


def decode_image(encoding: str, height: int, width: int, step: int, is_bigendian: bool | int, data: Buffer) -> NDArray[np.uint8]:
    """Turns the fields of a raw image message into an RGB image.

    Args:
        encoding: One of :data:`COLOR_ENCODINGS`; 16-bit channels are scaled to 8 bit (65535 becomes 255), alpha is dropped,
            YUV is BT.601 with limited range, ``8UC3`` and ``8UC4`` are taken as BGR(A).
        height: Rows, px.
        width: Columns, px.
        step: Bytes from one row to the next, at least the row itself; what lies beyond it is skipped.
        is_bigendian: Byte order of 16-bit channels.
        data: The bytes, ``step`` times the rows (half as many again for nv12 and nv21).

    Returns:
        (H, W, 3) uint8 RGB, contiguous, memory of its own.

    Raises:
        InputError: Unknown encoding, a size of zero or beyond :data:`MAX_SIDE_PX`, an odd size where chroma or Bayer cells
            need an even one, a step shorter than a row, or another number of bytes than step and height say.
    """
    layout = _LAYOUTS.get(encoding)
    if layout is None:
        raise InputError(f"image encoding '{encoding}' is not known: use one of {', '.join(COLOR_ENCODINGS)}")
    if width % layout.multiple_of[0] or height % layout.multiple_of[1]:
        raise InputError(f"an image in '{encoding}' needs even sides, got {width}x{height} px")
    rows = height * layout.half_rows // 2
    pixels = _view(encoding, height, width, step, is_bigendian, data, layout.dtype, layout.channels, rows)
    # OpenCV misreads 16-bit rows of odd step, so it only gets dense ones; without it, the message's memory is not ours to keep.
    pixels = pixels.copy() if layout.conversion is None else cv2.cvtColor(np.ascontiguousarray(pixels), layout.conversion)
    if pixels.dtype != np.uint8:
        pixels = cv2.convertScaleAbs(pixels, alpha=255.0 / 65535.0)
    return pixels


def decode_labels(encoding: str, height: int, width: int, step: int, is_bigendian: bool | int, data: Buffer) -> NDArray[np.int32]:
    """Turns the fields of a raw label image message into whole numbers, one per pixel.

    Args:
        encoding: One of :data:`LABEL_ENCODINGS`.
        height: Rows, px.
        width: Columns, px.
        step: Bytes from one row to the next.
        is_bigendian: Byte order of wider numbers.
        data: The bytes, ``step * height``.

    Returns:
        (H, W) int32, contiguous.

    Raises:
        InputError: As :func:`decode_image`.
    """
    dtype = _LABEL_TYPES.get(encoding)
    if dtype is None:
        raise InputError(f"label image encoding '{encoding}' is not known: use one of {', '.join(LABEL_ENCODINGS)}")
    return _view(encoding, height, width, step, is_bigendian, data, dtype, 1, height).astype(np.int32)


def decode_scores(encoding: str, height: int, width: int, step: int, is_bigendian: bool | int, data: Buffer) -> NDArray[np.float32]:
    """Turns the fields of a raw floating point image message into scores.

    Args:
        encoding: One of :data:`FLOAT_ENCODINGS`.
        height: Rows, px.
        width: Columns, px.
        step: Bytes from one row to the next.
        is_bigendian: Byte order of the numbers.
        data: The bytes, ``step * height``.

    Returns:
        (H, W) float32, contiguous, all finite.

    Raises:
        InputError: As :func:`decode_image`, or a value that is NaN or infinite.
    """
    dtype = _FLOAT_TYPES.get(encoding)
    if dtype is None:
        raise InputError(f"score map encoding '{encoding}' is not known: use one of {', '.join(FLOAT_ENCODINGS)}")
    scores = _view(encoding, height, width, step, is_bigendian, data, dtype, 1, height).astype(np.float32)
    if not np.isfinite(scores).all():
        raise InputError(
            f"a score map must be finite, {np.count_nonzero(~np.isfinite(scores))} of {scores.size} values are NaN or infinite"
        )
    return scores


def decode_compressed(data: Buffer, image_format: str = "") -> NDArray[np.uint8]:
    """Decodes a compressed image (JPEG, PNG, WebP, BMP, TIFF ...) to RGB.

    Args:
        data: The file's bytes.
        image_format: ``format`` of sensor_msgs/CompressedImage: ``<encoding>; <codec> compressed <encoding of the file>``. The bytes tell
            their own format, but not that a grey picture is the mosaic of a Bayer camera, nor that image_transport wrote the rgb pixels of
            a TIFF as if they were bgr.

    Returns:
        (H, W, 3) uint8 RGB, contiguous.

    Raises:
        InputError: Empty, truncated or undecodable bytes, or a depth image.
    """
    encoding, _, compressed = image_format.partition(";")
    if encoding.strip().startswith("bayer_") and "mono" not in compressed:
        mosaic = _decode_file(data, image_format, cv2.IMREAD_UNCHANGED)
        if mosaic.ndim == 2:
            bits = 8 * mosaic.dtype.itemsize
            pattern = encoding.strip().rstrip("0123456789")
            height, width = mosaic.shape
            return decode_image(f"{pattern}{bits}", height, width, mosaic.strides[0], sys.byteorder == "big", mosaic.tobytes())
    image = _decode_file(data, image_format, cv2.IMREAD_COLOR)
    if encoding.strip().startswith("rgb") and compressed.strip() == "tiff compressed":
        # image_transport converts for JPEG and PNG only: OpenCV wrote red as blue.
        return np.asarray(image, dtype=np.uint8)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """An image file as (H, W, 3) uint8 RGB, whatever its depth and channels.

    Orientation tags are not applied: label files have none, and have to fit.

    Raises:
        InputError: Missing, truncated or no image.
    """
    try:
        bgr = _decode_file(path.read_bytes(), "", cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"'{path}' cannot be read as an image: {error}") from error
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def write_rgb(path: Path, image: NDArray[np.uint8]) -> None:
    """Writes (H, W, 3) uint8 RGB in the format of the path's ending.

    Raises:
        OSError: The file cannot be written; OpenCV's own function would say nothing.
    """
    _, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    path.write_bytes(encoded.tobytes())


def check_image_file(path: Path) -> None:
    """Looks at both ends of an image file, which is quick, to find what is missing, empty or cut short before hours of work.

    Raises:
        InputError: It is one of these.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            tail = file.read()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
    if not head or _is_cut(head, tail):
        raise InputError(f"'{path}' is {'cut short: it has no end marker' if head else 'empty'}")


def _is_cut(head: bytes, tail: bytes) -> bool:
    """Whether a JPEG or PNG with this beginning and end lacks its end marker."""
    return any(head.startswith(magic) and end not in tail for magic, end in ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND")))


def decode_numbers(data: Buffer, image_format: str = "") -> NDArray[Any]:
    """An image file as the numbers it holds: those of a palette are its indices, not its colours.

    Args:
        data: The file's bytes.
        image_format: As for :func:`decode_compressed`.

    Returns:
        (H, W) or (H, W, C), uint8 or uint16.

    Raises:
        InputError: As :func:`decode_compressed`, or grey of fewer than 8 bit, which would be spread over 0 to 255, or a GIF.
    """
    head = bytes(memoryview(data)[:26])
    if head.startswith(b"GIF8"):
        raise InputError("a label image is a GIF, in which programs number the labels anew: save labels as PNG, from where they come from")
    image = _decode_file(data, image_format, cv2.IMREAD_UNCHANGED)
    if head.startswith(b"\x89PNG") and head[25] != _PNG_PALETTE:
        if head[24] < 8:
            raise InputError(_SPREAD.format(head[24]))
        return image
    if not head.startswith((b"\x89PNG", *_BMP_OR_TIFF)):
        return image
    # Comes with torchvision; OpenCV gives the colours of a palette only.
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as file:
            if file.mode == "1":
                raise InputError(_SPREAD.format(1))
            return np.asarray(file) if file.mode == "P" else image
    # OpenCV reads some TIFF files that Pillow does not.
    except UnidentifiedImageError:
        return image


def decode_compressed_labels(data: Buffer, image_format: str = "") -> NDArray[np.int32]:
    """Decodes a losslessly compressed label image of 8 or 16 bit.

    Args:
        data: The file's bytes.
        image_format: As for :func:`decode_compressed`.

    Returns:
        (H, W) int32, contiguous.

    Raises:
        InputError: As :func:`decode_compressed`, or an image with colours, or a lossy JPEG.
    """
    if bytes(memoryview(data)[:2]) == b"\xff\xd8":
        raise InputError("a label image must be lossless (PNG), got JPEG")
    image = decode_numbers(data, image_format)
    if image.ndim != 2:
        raise InputError(f"a label image must have one channel, got {image.shape[2]}")
    return image.astype(np.int32)


def _view(
    encoding: str,
    height: int,
    width: int,
    step: int,
    is_bigendian: bool | int,
    data: Buffer,
    dtype: type[np.generic],
    channels: int,
    rows: int,
) -> NDArray[Any]:
    """A (rows, W[, C]) view of the bytes in native byte order, copied only where the order differs."""
    if not 0 < height <= MAX_SIDE_PX or not 0 < width <= MAX_SIDE_PX:
        raise InputError(f"an image must be 1 to {MAX_SIDE_PX} px wide and high, got {width}x{height} px")
    itemsize = np.dtype(dtype).itemsize
    row_bytes = width * channels * itemsize
    if step < row_bytes:
        raise InputError(f"step {step} is too small: a row of {width} px in '{encoding}' takes {row_bytes} bytes")
    found = memoryview(data).nbytes
    if found != step * rows:
        raise InputError(f"image data has {found} bytes, {width}x{height} px in '{encoding}' with step {step} need {step * rows}")
    shape: tuple[int, ...] = (rows, width) if channels == 1 else (rows, width, channels)
    strides = (step, channels * itemsize, itemsize)[: len(shape)]
    order = np.dtype(dtype).newbyteorder(">" if is_bigendian else "<")
    pixels: NDArray[Any] = np.ndarray(shape, order, memoryview(data).cast("B"), strides=strides)
    return pixels.astype(dtype, copy=False)


def _decode_file(data: Buffer, image_format: str, flags: int) -> NDArray[Any]:
    kind = f"compressed image (format '{image_format}')" if image_format else "compressed image"
    if "compressedDepth" in image_format:
        raise InputError(f"{kind} is a depth image: only colour images are taken")
    raw = np.frombuffer(data, np.uint8)
    if raw.size == 0:
        raise InputError(f"{kind} is empty")
    # OpenCV fills what is missing of a cut JPEG or PNG with grey and reports nothing.
    if _is_cut(raw[:4].tobytes(), raw[-_TAIL_BYTES:].tobytes()):
        raise InputError(f"{kind} of {raw.size} bytes is cut short: it has no end marker")
    try:
        image = cv2.imdecode(raw, flags)
    except cv2.error as error:
        raise InputError(f"{kind} of {raw.size} bytes cannot be decoded: {' '.join(str(error).split())}") from error
    if image is None:
        raise InputError(f"{kind} of {raw.size} bytes cannot be decoded")
    return np.asarray(image)
