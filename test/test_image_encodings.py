from __future__ import annotations

import array
import contextlib
import io
import itertools

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.image_encodings import (
    COLOR_ENCODINGS,
    decode_compressed,
    decode_compressed_labels,
    decode_image,
    decode_labels,
    decode_scores,
)

sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))
paddings = st.integers(0, 9)
seeds = st.integers(0, 2**32 - 1)


def pack(rows: np.ndarray, padding: int, big_endian: bool = False) -> tuple[int, bytes]:
    """Rows of numbers as a camera driver lays them out: byte order, then rubbish up to the step."""
    ordered = rows.astype(rows.dtype.newbyteorder(">" if big_endian else "<"))
    lines = [line.tobytes() + b"\xa5" * padding for line in ordered]
    return len(lines[0]), b"".join(lines)


def random_rgb(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(sizes, paddings, seeds, st.sampled_from(["rgb", "bgr", "rgba", "bgra"]), st.booleans(), st.booleans())
@settings(deadline=None)
def test_interleaved_colors_come_back_exactly(size, padding, seed, order, wide, big_endian):
    rgb = random_rgb(seed, *size)
    channels = dict(zip("rgb", np.moveaxis(rgb, 2, 0), strict=True)) | {"a": np.full(size, 7, np.uint8)}
    stored = np.stack([channels[c] for c in order], axis=2)
    # 257 spreads 8 bit over 16 bit exactly: 255 becomes 65535.
    stored = stored.astype(np.uint16) * 257 if wide else stored
    step, data = pack(stored, padding, big_endian)
    decoded = decode_image(order + ("16" if wide else "8"), *size, step, big_endian, data)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, rgb)


@given(sizes, paddings, seeds, st.booleans(), st.booleans())
@settings(deadline=None)
def test_gray_is_scaled_and_repeated(size, padding, seed, wide, big_endian):
    dtype = np.uint16 if wide else np.uint8
    gray = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, size, dtype=dtype)
    step, data = pack(gray, padding, big_endian)
    decoded = decode_image("mono16" if wide else "mono8", *size, step, big_endian, data)
    exact = gray / 257.0 if wide else gray.astype(float)
    assert np.abs(decoded - exact[..., None]).max() <= 0.5
    assert (decoded == decoded[..., :1]).all()


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("color", [(200, 120, 40), (10, 20, 250)])
def test_bayer_cells_of_one_color_give_that_color(pattern, bits, color):
    value = dict(zip("rgb", color, strict=True))
    cell = np.array([value[c] for c in pattern]).reshape(2, 2)
    mosaic = np.tile(cell, (4, 5)) * (257 if bits == 16 else 1)
    for big_endian in (False, True):
        step, data = pack(mosaic.astype(f"u{bits // 8}"), 3, big_endian)
        decoded = decode_image(f"bayer_{pattern}{bits}", 8, 10, step, big_endian, data)
        np.testing.assert_array_equal(decoded, np.broadcast_to(np.uint8(color), (8, 10, 3)))


def bt601(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, limited range, in floating point."""
    luma = 1.164383 * (y.astype(float) - 16)
    du, dv = u.astype(float) - 128, v.astype(float) - 128
    return np.clip(np.stack([luma + 1.596027 * dv, luma - 0.391762 * du - 0.812968 * dv, luma + 2.017232 * du], axis=2), 0, 255)


@given(st.tuples(st.integers(1, 12), st.integers(1, 12)), paddings, seeds)
@settings(deadline=None)
def test_yuv_follows_bt601(half_size, padding, seed):
    height, width = 2 * half_size[0], 2 * half_size[1]
    rng = np.random.default_rng(seed)
    y = rng.integers(16, 236, (height, width), dtype=np.uint8)
    u, v = rng.integers(16, 241, (2, height, width // 2), dtype=np.uint8)
    expected = bt601(y, np.repeat(u, 2, axis=1), np.repeat(v, 2, axis=1))
    uyvy = np.stack([u, y[:, ::2], v, y[:, 1::2]], axis=2).reshape(height, -1)
    yuyv = np.stack([y[:, ::2], u, y[:, 1::2], v], axis=2).reshape(height, -1)
    for encoding, rows in (("uyvy", uyvy), ("yuv422", uyvy), ("yuyv", yuyv), ("yuv422_yuy2", yuyv)):
        step, data = pack(rows, padding)
        assert np.abs(decode_image(encoding, height, width, step, False, data) - expected).max() <= 2, encoding
    u2, v2 = u[::2], v[::2]
    expected = bt601(y, *(np.repeat(np.repeat(c, 2, axis=0), 2, axis=1) for c in (u2, v2)))
    for encoding, pair in (("nv12", (u2, v2)), ("nv21", (v2, u2))):
        chroma = np.stack(pair, axis=2).reshape(height // 2, width)
        step, data = pack(np.concatenate([y, chroma]), padding)
        assert np.abs(decode_image(encoding, height, width, step, False, data) - expected).max() <= 2, encoding


def test_result_is_not_a_view_of_the_message():
    data = array.array("B", bytes(12))
    decoded = decode_image("rgb8", 2, 2, 6, False, data)
    data[0] = 99
    assert decoded[0, 0, 0] == 0
    assert decoded.flags.writeable


def rows_of(encoding: str, height: int) -> int:
    return height * 3 // 2 if encoding.startswith("nv") else height


@given(st.sampled_from(COLOR_ENCODINGS), st.integers(0, 40), st.integers(0, 40), st.integers(0, 400), st.integers(0, 4000))
@settings(deadline=None, max_examples=300)
def test_any_fields_give_an_image_or_an_input_error(encoding, height, width, step, size):
    with contextlib.suppress(InputError):
        decoded = decode_image(encoding, height, width, step, False, bytes(size))
        assert decoded.shape == (height, width, 3)
        assert size == step * rows_of(encoding, height)


@pytest.mark.parametrize("encoding", COLOR_ENCODINGS)
def test_one_byte_less_or_more_is_refused(encoding):
    step = 4 * 4 * 2
    size = step * rows_of(encoding, 4)
    assert decode_image(encoding, 4, 4, step, False, bytes(size)).shape == (4, 4, 3)
    for wrong in (size - 1, size + 1, 0):
        with pytest.raises(InputError, match=f"has {wrong} bytes.* need {size}"):
            decode_image(encoding, 4, 4, step, False, bytes(wrong))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("jpeg2000", 2, 2, 6), "encoding 'jpeg2000' is not known: use one of rgb8, bgr8"),
        (("rgb8", 0, 2, 6), "got 2x0 px"),
        (("rgb8", 2, 40_000, 120_000), "1 to 16384 px"),
        (("rgb8", 2, 2, 5), "step 5 is too small: a row of 2 px in 'rgb8' takes 6 bytes"),
        (("rgb8", 2, 2, 2**32 - 1), "need 8589934590"),
        (("uyvy", 2, 3, 6), "even sides, got 3x2"),
        (("nv12", 3, 2, 2), "even sides, got 2x3"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(fields, message):
    with pytest.raises(InputError, match=message):
        decode_image(*fields, False, bytes(12))


@given(
    sizes,
    paddings,
    seeds,
    st.sampled_from([("mono8", "u1"), ("8UC1", "u1"), ("mono16", "u2"), ("16UC1", "u2"), ("32SC1", "i4")]),
    st.booleans(),
)
@settings(deadline=None)
def test_labels_come_back_exactly(size, padding, seed, kind, big_endian):
    encoding, dtype = kind
    info = np.iinfo(dtype)
    labels = np.random.default_rng(seed).integers(info.min, info.max, size, dtype=dtype, endpoint=True)
    step, data = pack(labels, padding, big_endian)
    decoded = decode_labels(encoding, *size, step, big_endian, data)
    np.testing.assert_array_equal(decoded, labels)
    assert decoded.dtype == np.int32


@given(sizes, paddings, seeds, st.sampled_from([("32FC1", "f4"), ("64FC1", "f8")]), st.booleans())
@settings(deadline=None)
def test_scores_come_back_exactly(size, padding, seed, kind, big_endian):
    encoding, dtype = kind
    scores = np.random.default_rng(seed).normal(size=size).astype(dtype)
    step, data = pack(scores, padding, big_endian)
    np.testing.assert_array_equal(decode_scores(encoding, *size, step, big_endian, data), scores.astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(bad):
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = bad
    with pytest.raises(InputError, match="1 of 12 values are NaN or infinite"):
        decode_scores("32FC1", 3, 4, 16, False, scores.tobytes())


def test_wrong_kind_of_encoding_is_named():
    with pytest.raises(InputError, match=r"label image encoding 'rgb8'.*mono8"):
        decode_labels("rgb8", 1, 1, 3, False, bytes(3))
    with pytest.raises(InputError, match=r"score map encoding 'mono8'.*32FC1"):
        decode_scores("mono8", 1, 1, 1, False, bytes(1))


def encode_file(image: np.ndarray, ending: str) -> bytes:
    return cv2.imencode(ending, image)[1].tobytes()


def test_compressed_images_are_rgb():
    rgb = np.zeros((16, 24, 3), np.uint8)
    rgb[:, :12] = (250, 20, 60)
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    np.testing.assert_array_equal(decode_compressed(encode_file(bgr, ".png"), "rgb8; png compressed bgr8"), rgb)
    assert np.abs(decode_compressed(array.array("B", encode_file(bgr, ".jpg")), "jpeg").astype(int) - rgb)[4:12, 2:8].max() < 12
    assert decode_compressed(encode_file(rgb[..., 0], ".png")).shape == (16, 24, 3)


@pytest.mark.parametrize("ending", [".png", ".jpg"])
@given(part=st.floats(0.0, 0.98))
@settings(deadline=None, max_examples=30)
def test_cut_files_are_refused(ending, part):
    whole = encode_file(random_rgb(0, 32, 32), ending)
    cut = whole[: int(len(whole) * part)]
    assume(len(cut) < len(whole) - 12)
    with pytest.raises(InputError):
        decode_compressed(cut)


@given(st.binary(max_size=64), st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00"]))
@settings(deadline=None)
def test_rubbish_gives_an_input_error(tail, head):
    with pytest.raises(InputError):
        decode_compressed(head + tail)


def test_depth_images_are_refused():
    with pytest.raises(InputError, match=r"16UC1; compressedDepth png.*depth image"):
        decode_compressed(encode_file(np.zeros((4, 4), np.uint16), ".png"), "16UC1; compressedDepth png")


def test_compressed_labels():
    for dtype, high in itertools.product((np.uint8, np.uint16), (2, 200)):
        labels = np.random.default_rng(1).integers(0, high, (9, 11)).astype(dtype)
        np.testing.assert_array_equal(decode_compressed_labels(encode_file(labels, ".png")), labels)
    with pytest.raises(InputError, match="lossless"):
        decode_compressed_labels(encode_file(labels.astype(np.uint8), ".jpg"))
    with pytest.raises(InputError, match="one channel, got 3"):
        decode_compressed_labels(encode_file(random_rgb(0, 4, 4), ".png"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("colours", [[0, 0, 0, 255, 255, 255], [0, 0, 0, 200, 30, 30]])
def test_labels_with_a_palette_are_its_numbers_in_every_format(kind: str, colours: list[int]) -> None:
    labels = np.random.default_rng(1).integers(0, 2, (9, 11)).astype(np.uint8)
    picture, file = Image.fromarray(labels), io.BytesIO()
    picture.putpalette(colours + [9] * (768 - len(colours)))
    picture.save(file, kind)
    np.testing.assert_array_equal(decode_compressed_labels(file.getvalue()), labels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_grey_labels_are_their_numbers_and_those_of_one_bit_are_refused(kind: str) -> None:
    labels = np.random.default_rng(1).integers(0, 2, (9, 11)).astype(np.uint8)
    whole, bits = io.BytesIO(), io.BytesIO()
    Image.fromarray(labels).save(whole, kind)
    np.testing.assert_array_equal(decode_compressed_labels(whole.getvalue()), labels)
    Image.fromarray(labels == 1).save(bits, kind)
    with pytest.raises(InputError, match="1 bit a pixel"):
        decode_compressed_labels(bits.getvalue())


def test_labels_as_gif_are_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save(file, "GIF")
    with pytest.raises(InputError, match=r"is a GIF.* save labels as PNG"):
        decode_compressed_labels(file.getvalue())


@pytest.mark.parametrize("encoding", ["bayer_rggb8", "bayer_gbrg8", "bayer_rggb16"])
@pytest.mark.parametrize("tail", ["; png compressed ", "; jpeg compressed {encoding}"])
def test_compressed_mosaics_are_those_of_the_raw_topic(encoding: str, tail: str) -> None:
    mosaic = np.random.default_rng(0).integers(0, 255, (32, 48)).astype(np.uint16 if encoding.endswith("16") else np.uint8)
    if mosaic.dtype == np.uint16:
        mosaic *= 257
    raw = decode_image(encoding, 32, 48, mosaic.strides[0], False, mosaic.tobytes())
    _, file = cv2.imencode(".png", mosaic)
    found = decode_compressed(file.tobytes(), encoding + tail.format(encoding=encoding))
    np.testing.assert_array_equal(found, raw)


@pytest.mark.parametrize("image_format", ["bayer_rggb8; jpeg compressed mono8", "mono8; png compressed ", "png"])
def test_grey_pictures_stay_grey(image_format: str) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (32, 48), np.uint8)
    _, file = cv2.imencode(".png", grey)
    np.testing.assert_array_equal(decode_compressed(file.tobytes(), image_format), np.dstack([grey] * 3))


def test_colour_pictures_of_a_bayer_camera_are_taken_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    _, file = cv2.imencode(".png", image[..., ::-1])
    np.testing.assert_array_equal(decode_compressed(file.tobytes(), "bayer_rggb8; jpeg compressed bgr8"), image)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "rgb16"])
def test_tiff_of_image_transport_keeps_its_colours(encoding: str) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    pixels = rgb if encoding.startswith("rgb") else rgb[..., ::-1]
    if encoding.endswith("a8"):
        pixels = np.dstack([pixels, np.full(rgb.shape[:2], 255, np.uint8)])
    if encoding.endswith("16"):
        pixels = pixels.astype(np.uint16) * 257
    # The pixels in the order of the raw topic, as they are, which OpenCV takes for bgr.
    _, file = cv2.imencode(".tiff", np.ascontiguousarray(pixels))
    np.testing.assert_array_equal(decode_compressed(file.tobytes(), f"{encoding}; tiff compressed "), rgb)
