from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pycocotools import mask as coco

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.rle import decode, encode

MASKS = arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20)))


@settings(max_examples=80)
@given(MASKS)
def test_coco_reads_our_runs(mask: NDArray[np.bool_]) -> None:
    height, width = mask.shape
    counts = encode(torch.from_numpy(mask))
    compressed = coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    np.testing.assert_array_equal(coco.decode(compressed).astype(bool), mask)
    # The same runs as COCO's own encoder finds.
    assert compressed["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


@settings(max_examples=80)
@given(MASKS)
def test_decoding_undoes_encoding(mask: NDArray[np.bool_]) -> None:
    counts = encode(mask)
    assert counts.dtype == np.uint32
    assert counts.sum() == mask.size
    np.testing.assert_array_equal(decode(counts, *mask.shape), mask)


def test_the_first_run_is_background() -> None:
    mask = np.zeros((2, 3), dtype=bool)
    mask[0, 0] = mask[1, 2] = True
    assert encode(mask).tolist() == [0, 1, 4, 1]


def test_an_image_without_pixels() -> None:
    assert encode(np.zeros((0, 5), dtype=bool)).size == 0
    assert decode([], 0, 5).shape == (0, 5)


@pytest.mark.parametrize("counts", [[3, 2], [7], [-1, 7], []])
def test_runs_of_another_size_are_refused(counts: list[int]) -> None:
    with pytest.raises(InputError, match="2x3 px needs 6"):
        decode(counts, 2, 3)
