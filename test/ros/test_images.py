"""The adapter between messages and the decoder; the decoder has its own tests."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

pytest.importorskip("sensor_msgs", reason="needs ROS 2 messages")

from hypothesis import given
from hypothesis import strategies as st
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.ros import compat
from ros2_ood_seg.ros.images import array_to_image, image_to_rgb, image_to_scores, rgb_to_compressed

HEADER = Header(frame_id="camera_optical")
SIDES = st.integers(1, 20)


@given(height=SIDES, width=SIDES, padding=st.integers(0, 5), seed=st.integers(0, 9))
def test_padded_bgr8_is_read(height: int, width: int, padding: int, seed: int) -> None:
    bgr = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = np.full((height, width * 3 + padding), 199, np.uint8)
    rows[:, : width * 3] = bgr.reshape(height, -1)
    message = Image(height=height, width=width, encoding="bgr8", step=rows.shape[1], data=rows.tobytes())
    np.testing.assert_array_equal(image_to_rgb(message), bgr[..., ::-1])


@pytest.mark.parametrize("big_endian", [False, True])
def test_both_byte_orders_are_read(big_endian: bool) -> None:
    order = ">" if big_endian else "<"
    scores = np.array([[0.25, -3.5, 1e9], [7.0, 0.0, -0.125]], np.float32)
    message = Image(height=2, width=3, encoding="32FC1", step=12, is_bigendian=int(big_endian), data=scores.astype(order + "f4").tobytes())
    np.testing.assert_array_equal(image_to_scores(message), scores)
    grey = np.array([[0, 65535, 257 * 100]], np.uint16)
    message = Image(height=1, width=3, encoding="mono16", step=6, is_bigendian=int(big_endian), data=grey.astype(order + "u2").tobytes())
    np.testing.assert_array_equal(image_to_rgb(message)[..., 0], [[0, 255, 100]])


@given(height=SIDES, width=SIDES, seed=st.integers(0, 9))
def test_written_images_read_back_the_same(height: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rgb = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    message = array_to_image(rgb, "rgb8", HEADER)
    assert (message.height, message.width, message.step, message.header) == (height, width, width * 3, HEADER)
    assert message.is_bigendian == (sys.byteorder == "big")
    np.testing.assert_array_equal(image_to_rgb(message), rgb)
    # Also from a view that is not contiguous.
    np.testing.assert_array_equal(image_to_rgb(array_to_image(rgb[:, ::-1], "rgb8", HEADER)), rgb[:, ::-1])
    scores = random.normal(size=(height, width)).astype(np.float32)
    np.testing.assert_array_equal(image_to_scores(array_to_image(scores, "32FC1", HEADER)), scores)
    labels = random.integers(0, 65535, (height, width), dtype=np.uint16)
    message = array_to_image(labels, "mono16", HEADER)
    np.testing.assert_array_equal(np.frombuffer(message.data, np.uint16).reshape(height, width), labels)


def test_compressed_images_are_read_and_written() -> None:
    gradient = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    rgb = np.dstack([gradient, gradient[::-1], gradient[:, ::-1]])
    png = cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(image_to_rgb(CompressedImage(format="png", data=png)), rgb)
    jpeg = rgb_to_compressed(rgb, 95, HEADER)
    assert (jpeg.format, jpeg.header) == ("rgb8; jpeg compressed bgr8", HEADER)
    assert np.abs(image_to_rgb(jpeg).astype(int) - rgb).mean() < 4


@pytest.mark.parametrize(
    "message",
    [
        Image(height=2, width=3, encoding="rgb8", step=9, data=bytes(17)),
        Image(height=2, width=3, encoding="rgb8", step=8, data=bytes(16)),
        Image(height=0, width=0, encoding="rgb8"),
        Image(height=2**32 - 1, width=2**32 - 1, encoding="rgb8", step=2**32 - 1),
        CompressedImage(format="jpeg", data=b""),
        CompressedImage(format="png", data=b"no picture"),
    ],
)
def test_damaged_images_are_refused(message: Image | CompressedImage) -> None:
    with pytest.raises(InputError):
        image_to_rgb(message)


def test_unknown_encodings_go_to_cv_bridge_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    message = Image(height=2, width=2, encoding="xyz9", step=2, data=bytes(4))
    monkeypatch.setattr(compat, "CvBridge", None)
    with pytest.raises(InputError, match=r"'xyz9' is not known: use one of rgb8"):
        image_to_rgb(message)
    white = np.full((2, 2, 3), 255, np.uint8)
    monkeypatch.setattr(
        compat, "CvBridge", lambda: SimpleNamespace(imgmsg_to_cv2=lambda _message, desired_encoding: {"rgb8": white}[desired_encoding])
    )
    np.testing.assert_array_equal(image_to_rgb(message), white)

    def fail(_message: Image, desired_encoding: str) -> None:
        raise RuntimeError("no conversion")

    monkeypatch.setattr(compat, "CvBridge", lambda: SimpleNamespace(imgmsg_to_cv2=fail))
    with pytest.raises(InputError, match=r"'xyz9' cannot be converted, use one of rgb8.*no conversion"):
        image_to_rgb(message)
    # What the decoder knows needs no cv_bridge.
    assert image_to_rgb(Image(height=1, width=2, encoding="mono8", step=2, data=bytes([5, 9])))[0, :, 0].tolist() == [5, 9]


@pytest.mark.skipif(compat.CvBridge is None, reason="cv_bridge is not installed")
def test_the_decoder_agrees_with_cv_bridge() -> None:
    random = np.random.default_rng(0)
    for encoding, channels in (("rgb8", 3), ("bgr8", 3), ("rgba8", 4), ("bgra8", 4), ("mono8", 1), ("bayer_rggb8", 1), ("uyvy", 2)):
        data = random.integers(0, 256, 8 * 8 * channels, dtype=np.uint8).tobytes()
        message = Image(height=8, width=8, encoding=encoding, step=8 * channels, data=data)
        np.testing.assert_array_equal(image_to_rgb(message), compat.CvBridge().imgmsg_to_cv2(message, "rgb8"))
