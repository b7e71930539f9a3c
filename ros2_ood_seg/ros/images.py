"""sensor_msgs images to arrays and back, without cv_bridge in the hot path."""

from __future__ import annotations

import sys
from array import array
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import COLOR_ENCODINGS, decode_compressed, decode_image, decode_scores
from ros2_ood_seg.ros import compat


def image_to_rgb(message: Image | CompressedImage) -> NDArray[np.uint8]:
    """Converts an image message.

    Args:
        message: Any of :data:`ros2_ood_seg.image_encodings.COLOR_ENCODINGS` with any row padding, others where cv_bridge is
            installed; or a JPEG, PNG or whatever else OpenCV reads.

    Returns:
        (H, W, 3) uint8 RGB, contiguous.

    Raises:
        InputError: Unknown encoding, no pixels, or ``step`` and ``data`` that do not fit the size.
    """
    if isinstance(message, CompressedImage):
        return decode_compressed(message.data, message.format)
    if message.encoding not in COLOR_ENCODINGS and compat.CvBridge is not None:
        return _through_cv_bridge(message)
    return decode_image(message.encoding, message.height, message.width, message.step, message.is_bigendian, message.data)


def image_to_scores(message: Image) -> NDArray[np.float32]:
    """Reads a score map of encoding ``32FC1`` or ``64FC1``.

    Returns:
        (H, W) float32, finite.

    Raises:
        InputError: Another encoding, a value that is not finite, or ``step`` and ``data`` that do not fit the size.
    """
    return decode_scores(message.encoding, message.height, message.width, message.step, message.is_bigendian, message.data)


def array_to_image(pixels: NDArray[Any], encoding: str, header: Header) -> Image:
    """Wraps pixels into a message, with a single copy.

    Args:
        pixels: (H, W) or (H, W, C) of the type that ``encoding`` says, in the machine's byte order.
        encoding: ``rgb8``, ``mono8``, ``mono16``, ``32FC1`` ...
        header: Used as it is.
    """
    pixels = np.ascontiguousarray(pixels)
    message = Image(header=header, height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, step=pixels.strides[0])
    message.is_bigendian = int(sys.byteorder == "big")
    message.data = _bytes(pixels)
    return message


def rgb_to_compressed(pixels: NDArray[np.uint8], quality: int, header: Header) -> CompressedImage:
    """Compresses (H, W, 3) uint8 RGB to JPEG of ``quality`` 1 to 100."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return CompressedImage(header=header, format="rgb8; jpeg compressed bgr8", data=_bytes(encoded))


def _bytes(pixels: NDArray[Any]) -> array[int]:
    # rclpy takes an array('B') as it is; bytes or an ndarray it would copy element by element.
    data = array("B")
    data.frombytes(memoryview(pixels).cast("B"))
    return data


def _through_cv_bridge(message: Image) -> NDArray[np.uint8]:
    try:
        return np.ascontiguousarray(compat.CvBridge().imgmsg_to_cv2(message, desired_encoding="rgb8"))
    # cv_bridge lets errors of several kinds through: its own, OpenCV's and NumPy's.
    except Exception as error:
        raise InputError(
            f"image encoding '{message.encoding}' cannot be converted, use one of {', '.join(COLOR_ENCODINGS)}: {error}"
        ) from error
