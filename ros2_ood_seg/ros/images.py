"""sensor_msgs images to arrays and back, without copies where the layout allows it and without cv_bridge in the hot path."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.ros import compat

MAX_SIDE_PX = 16384
"""No camera is larger; a header that claims more is damaged."""

ImageU8 = NDArray[np.uint8]


@dataclass(frozen=True)
class _Encoding:
    """How the pixels of an encoding lie in memory and become RGB.

    Args:
        bytes_per_pixel: Bytes of one pixel in a row; of the first plane for planar formats.
        to_rgb: Rows of bytes (H, W*bytes_per_pixel) and whether they are big-endian, to (H, W, 3) uint8 RGB.
        rows_per_row: Rows in memory per image row: 1.5 with the half-height chroma plane of NV12.
        even_width: Pixels come in pairs.
    """

    bytes_per_pixel: int
    to_rgb: Callable[[ImageU8, bool], ImageU8]
    rows_per_row: float = 1.0
    even_width: bool = False


def _convert(code: int, channels: int) -> Callable[[ImageU8, bool], ImageU8]:
    def to_rgb(rows: ImageU8, _big_endian: bool) -> ImageU8:
        pixels = rows if channels == 1 else rows.reshape(rows.shape[0], -1, channels)
        return np.asarray(cv2.cvtColor(pixels, code))

    return to_rgb


def _as_is(rows: ImageU8, _big_endian: bool) -> ImageU8:
    return rows.reshape(rows.shape[0], -1, 3)


def _mono16(rows: ImageU8, big_endian: bool) -> ImageU8:
    high_bytes = rows[:, 0::2] if big_endian else rows[:, 1::2]
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(high_bytes), cv2.COLOR_GRAY2RGB))


_MONO8 = _Encoding(1, _convert(cv2.COLOR_GRAY2RGB, 1))
_MONO16 = _Encoding(2, _mono16)
_BGR8 = _Encoding(3, _convert(cv2.COLOR_BGR2RGB, 3))
_BGRA8 = _Encoding(4, _convert(cv2.COLOR_BGRA2RGB, 4))
_UYVY = _Encoding(2, _convert(cv2.COLOR_YUV2RGB_UYVY, 2), even_width=True)
_YUYV = _Encoding(2, _convert(cv2.COLOR_YUV2RGB_YUYV, 2), even_width=True)

ENCODINGS: dict[str, _Encoding] = {
    "rgb8": _Encoding(3, _as_is),
    "bgr8": _BGR8,
    "rgba8": _Encoding(4, _convert(cv2.COLOR_RGBA2RGB, 4)),
    "bgra8": _BGRA8,
    "mono8": _MONO8,
    "mono16": _MONO16,
    # Drivers that do not name a colour order mean OpenCV's.
    "8UC1": _MONO8,
    "8UC3": _BGR8,
    "8UC4": _BGRA8,
    "16UC1": _MONO16,
    "bayer_rggb8": _Encoding(1, _convert(cv2.COLOR_BayerRGGB2RGB, 1)),
    "bayer_bggr8": _Encoding(1, _convert(cv2.COLOR_BayerBGGR2RGB, 1)),
    "bayer_gbrg8": _Encoding(1, _convert(cv2.COLOR_BayerGBRG2RGB, 1)),
    "bayer_grbg8": _Encoding(1, _convert(cv2.COLOR_BayerGRBG2RGB, 1)),
    "uyvy": _UYVY,
    "yuv422": _UYVY,
    "yuyv": _YUYV,
    "yuv422_yuy2": _YUYV,
    "nv12": _Encoding(1, _convert(cv2.COLOR_YUV2RGB_NV12, 1), rows_per_row=1.5, even_width=True),
    "nv21": _Encoding(1, _convert(cv2.COLOR_YUV2RGB_NV21, 1), rows_per_row=1.5, even_width=True),
}
"""Encodings that need no cv_bridge. ``mono16`` and ``16UC1`` keep their most significant byte (65535 is white); ``nv12`` and
``nv21`` carry their chroma plane after the image's rows, in rows of the same ``step``."""

_SCORE_TYPES = {"32FC1": "f4", "64FC1": "f8"}


def image_to_rgb(message: Image) -> ImageU8:
    """Converts a raw image.

    Args:
        message: Any of :data:`ENCODINGS`, with any row padding; others where cv_bridge is installed.

    Returns:
        (H, W, 3) uint8 RGB, contiguous; a view of the message's data when it is unpadded ``rgb8``.

    Raises:
        InputError: Unknown encoding, no pixels, or ``step`` and ``data`` that do not fit the size.
    """
    _check_size(message.width, message.height)
    encoding = ENCODINGS.get(message.encoding)
    if encoding is None:
        return _through_cv_bridge(message)
    if encoding.even_width and message.width % 2:
        raise InputError(f"image of encoding '{message.encoding}' has an odd width, {message.width} px")
    if encoding.rows_per_row != 1 and message.height % 2:
        raise InputError(f"image of encoding '{message.encoding}' has an odd height, {message.height} px")
    rows = _rows(message, encoding.bytes_per_pixel, int(message.height * encoding.rows_per_row))
    return np.ascontiguousarray(encoding.to_rgb(rows, bool(message.is_bigendian)))


def compressed_to_rgb(message: CompressedImage) -> ImageU8:
    """Decodes a JPEG, PNG or whatever else OpenCV reads.

    Returns:
        (H, W, 3) uint8 RGB, contiguous; 16-bit pictures keep their most significant byte.

    Raises:
        InputError: The data is empty or no picture.
    """
    data = np.frombuffer(message.data, np.uint8)
    # A rotation noted in the file is ignored: masks must lie over the picture as it was sent.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    picture = cv2.imdecode(data, flags) if data.size else None
    if picture is None:
        raise InputError(f"compressed image of format '{message.format}' with {data.size} bytes cannot be decoded: send jpeg or png")
    _check_size(picture.shape[1], picture.shape[0])
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))


def image_to_scores(message: Image) -> NDArray[np.float32]:
    """Reads a score map.

    Returns:
        (H, W) float32 in the machine's byte order.

    Raises:
        InputError: The encoding is not ``32FC1`` or ``64FC1``, or ``step`` and ``data`` do not fit the size.
    """
    _check_size(message.width, message.height)
    if message.encoding not in _SCORE_TYPES:
        raise InputError(f"score map has encoding '{message.encoding}', allowed: {', '.join(_SCORE_TYPES)}")
    kind = np.dtype((">" if message.is_bigendian else "<") + _SCORE_TYPES[message.encoding])
    rows = np.ascontiguousarray(_rows(message, kind.itemsize, message.height))
    return rows.view(kind).astype(np.float32)


def array_to_image(pixels: NDArray[Any], encoding: str, header: Header) -> Image:
    """Wraps pixels into a message, with a single copy.

    Args:
        pixels: (H, W) or (H, W, C) of the type that ``encoding`` says, in the machine's byte order.
        encoding: ``rgb8``, ``mono8``, ``mono16``, ``32FC1`` ...
        header: Used as it is.
    """
    pixels = np.ascontiguousarray(pixels)
    message = Image(header=header, height=pixels.shape[0], width=pixels.shape[1], encoding=encoding)
    message.is_bigendian = int(sys.byteorder == "big")
    message.step = pixels.strides[0]
    message.data = _bytes(pixels)
    return message


def rgb_to_compressed(pixels: ImageU8, quality: int, header: Header) -> CompressedImage:
    """Compresses (H, W, 3) uint8 RGB to JPEG of ``quality`` 1 to 100."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return CompressedImage(header=header, format="rgb8; jpeg compressed bgr8", data=_bytes(encoded))


def _bytes(pixels: NDArray[Any]) -> array[int]:
    # rclpy takes an array('B') as it is; bytes or an ndarray it would copy element by element.
    data = array("B")
    data.frombytes(memoryview(pixels).cast("B"))
    return data


def _check_size(width: int, height: int) -> None:
    if not (1 <= width <= MAX_SIDE_PX and 1 <= height <= MAX_SIDE_PX):
        raise InputError(f"image is {width}x{height} px, width and height must be 1 to {MAX_SIDE_PX}")


def _rows(message: Image, bytes_per_pixel: int, rows: int) -> ImageU8:
    """The image's bytes without row padding, (rows, width*bytes_per_pixel), as a view where the layout allows it."""
    row_bytes = message.width * bytes_per_pixel
    what = f"{message.width}x{message.height} image of encoding '{message.encoding}'"
    if message.step < row_bytes:
        raise InputError(f"{what} has step {message.step}, a row needs at least {row_bytes} bytes")
    needed = message.step * rows
    if len(message.data) != needed:
        raise InputError(f"{what} with step {message.step} has {len(message.data)} bytes of data, it needs {needed}")
    return np.frombuffer(message.data, np.uint8).reshape(rows, message.step)[:, :row_bytes]


def _through_cv_bridge(message: Image) -> ImageU8:
    if compat.CvBridge is None:
        raise InputError(f"image encoding '{message.encoding}' is unknown, use one of {', '.join(ENCODINGS)}; cv_bridge would add others")
    try:
        return np.ascontiguousarray(compat.CvBridge().imgmsg_to_cv2(message, desired_encoding="rgb8"))
    # cv_bridge lets errors of several kinds through: its own, OpenCV's and NumPy's.
    except Exception as error:
        raise InputError(f"image encoding '{message.encoding}' cannot be converted, use one of {', '.join(ENCODINGS)}: {error}") from error
