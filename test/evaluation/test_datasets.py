from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.datasets import LAYOUTS, labelled_image, open_dataset, read_cityscapes_ids, read_map
from ros2_ood_seg.image_encodings import decode_compressed_labels

LABEL = np.array([[0, 1, 1, 255], [0, 0, 0, 255], [1, 0, 0, 255]], np.uint8)


def put(path: Path, array: NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.asarray(array))


def image(seed: int = 0, shape: tuple[int, ...] = (3, 4, 3)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def coded(table: dict[int, int], dtype: type[np.generic] = np.uint8) -> NDArray[np.generic]:
    coded_label = np.zeros(LABEL.shape, dtype)
    for value, code in table.items():
        coded_label[value == LABEL] = code
    return coded_label


def plain(root: Path) -> None:
    put(root / "images" / "b.png", image(1))
    put(root / "images" / "a.png", image(0))
    put(root / "labels" / "a.png", LABEL)
    put(root / "labels" / "b.png", np.zeros_like(LABEL))


def smiyc(root: Path) -> None:
    put(root / "images" / "validation0000.png", image())
    put(root / "images" / "cow0001.png", image())
    put(root / "labels_masks" / "validation0000_labels_semantic.png", LABEL)


def fishyscapes(root: Path) -> None:
    put(root / "Static" / "original" / "3.png", image())
    put(root / "Static" / "labels" / "3.png", LABEL)


def fishyscapes_laf(root: Path) -> None:
    put(root / "leftImg8bit" / "train" / "04_Maurener_Weg_8" / "04_Maurener_Weg_8_000000_000030_leftImg8bit.png", image())
    put(root / "fs" / "0000_04_Maurener_Weg_8_000000_000030_labels.png", LABEL)


def road_anomaly(root: Path) -> None:
    put(root / "frames" / "cow.png", image())
    put(root / "frames" / "cow.labels" / "labels_semantic.png", coded({0: 0, 1: 2, 255: 255}))


def lost_and_found(root: Path) -> None:
    for scene, label in (("s_000000_000010", coded({0: 1, 1: 17, 255: 0})), ("s_000000_000020", np.zeros_like(LABEL))):
        put(root / "leftImg8bit" / "test" / "s" / f"{scene}_leftImg8bit.png", image())
        put(root / "gtCoarse" / "test" / "s" / f"{scene}_gtCoarse_labelIds.png", label)
        put(root / "gtCoarse" / "test" / "s" / f"{scene}_gtCoarse_instanceIds.png", coded({0: 1, 1: 17004, 255: 0}, np.uint16))


def street_hazards(root: Path) -> None:
    put(root / "images" / "test" / "t5" / "300.png", image())
    put(root / "annotations" / "test" / "t5" / "300.png", coded({0: 13, 1: 14, 255: 0}))


def oodis(root: Path) -> None:
    put(root / "images" / "04_Weg_000000_000030_leftImg8bit.png", image())
    put(root / "gt" / "04_Weg_000000_000030_gtCoarse_instanceIds.png", coded({0: 7, 1: 26003, 255: 0}, np.uint16))


@pytest.mark.parametrize(
    ("name", "make", "track"),
    [
        ("folder", plain, "anomaly"),
        ("road_anomaly_21", smiyc, "anomaly"),
        ("road_obstacle_21", smiyc, "obstacle"),
        ("fishyscapes_static", fishyscapes, "anomaly"),
        ("fishyscapes_laf", fishyscapes_laf, "anomaly"),
        ("road_anomaly", road_anomaly, "anomaly"),
        ("lost_and_found", lost_and_found, "obstacle"),
        ("street_hazards", street_hazards, "anomaly"),
        ("oodis", oodis, "obstacle"),
    ],
)
def test_every_layout_reads_the_same_frame(tmp_path: Path, name: str, make: Callable[[Path], None], track: str) -> None:
    make(tmp_path)
    dataset = open_dataset(name, tmp_path)
    frame = next(iter(dataset))
    np.testing.assert_array_equal(frame.label, LABEL)
    np.testing.assert_array_equal(frame.image, image()[..., ::-1])
    assert dataset.track == track
    assert len(dataset) == (2 if name == "folder" else 1)
    if name in ("lost_and_found", "oodis"):
        assert frame.instances is not None
        assert set(np.unique(frame.instances[LABEL == 1])) == {17004 if name == "lost_and_found" else 26003}
        assert not frame.instances[LABEL != 1].any()


def test_all_layouts_are_tested_above() -> None:
    assert set(LAYOUTS) == {
        *("folder", "road_anomaly_21", "road_obstacle_21", "fishyscapes_static", "fishyscapes_laf"),
        *("road_anomaly", "lost_and_found", "street_hazards", "oodis"),
    }


def test_folder_reads_instances_in_order_of_stems(tmp_path: Path) -> None:
    plain(tmp_path)
    ids = np.where(LABEL == 1, 300, 0).astype(np.uint16)
    put(tmp_path / "instances" / "a.png", ids)
    put(tmp_path / "instances" / "b.png", ids)
    dataset = open_dataset("folder", tmp_path)
    assert [source.name for source in dataset.sources] == ["a", "b"]
    frame = dataset.load(dataset.sources[0])
    assert frame.instances is not None
    np.testing.assert_array_equal(frame.instances, ids)
    assert "instances/" in dataset.instance_rule
    assert dataset.head(1).sources == dataset.sources[:1]


def test_the_track_of_a_folder_follows_its_name(tmp_path: Path) -> None:
    plain(tmp_path / "road_obstacle_21")
    assert open_dataset("folder", tmp_path / "road_obstacle_21").track == "obstacle"
    (tmp_path / "linked").symlink_to(tmp_path / "road_obstacle_21")
    assert open_dataset("folder", tmp_path / "linked").track == "obstacle"


def test_a_link_may_have_the_name_that_says_the_track(tmp_path: Path) -> None:
    plain(tmp_path / "v1")
    (tmp_path / "lost_and_found").symlink_to(tmp_path / "v1")
    assert open_dataset("folder", tmp_path / "v1").track == "anomaly"
    assert open_dataset("folder", tmp_path / "lost_and_found").track == "obstacle"


def test_real_folders_hold_what_their_readme_says(shared_dir: Path) -> None:
    for name, count in (("road_anomaly_21", 10), ("road_obstacle_21", 30), ("fishyscapes_static", 30)):
        dataset = open_dataset("folder", shared_dir / "data" / name)
        assert len(dataset) == count
        assert set(np.unique(dataset.load(dataset.sources[0]).label)) <= {0, 1, 255}


@pytest.mark.parametrize("name", ["road_anomaly_21", "road_obstacle_21", "fishyscapes_static", "fishyscapes_laf", "oodis"])
def test_hidden_labels_are_refused_by_name(tmp_path: Path, name: str) -> None:
    put(tmp_path / "images" / "validation0000.png", image())
    with pytest.raises(InputError, match="hidden"):
        open_dataset(name, tmp_path)


@pytest.mark.parametrize(("name", "message"), [("lost_and_found", "has no label file"), ("street_hazards", "holds no label files")])
def test_other_layouts_without_labels_are_refused(tmp_path: Path, name: str, message: str) -> None:
    put(tmp_path / "leftImg8bit" / "test" / "s" / "s_000000_000010_leftImg8bit.png", image())
    put(tmp_path / "images" / "test" / "t5" / "300.png", image())
    with pytest.raises(InputError, match=message):
        open_dataset(name, tmp_path)


def test_an_image_without_label(tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / "labels" / "b.png").unlink()
    with pytest.raises(InputError, match=r"b\.png' has no label file .*labels/b\.png"):
        open_dataset("folder", tmp_path)


def test_a_label_without_image(tmp_path: Path) -> None:
    plain(tmp_path)
    put(tmp_path / "labels" / "c.png", LABEL)
    with pytest.raises(InputError, match=r"labels/c\.png' has no image"):
        open_dataset("folder", tmp_path)


def test_pixels_of_pictures_of_several_sizes(tmp_path: Path) -> None:
    shapes = [(3, 4), (30, 40), (7, 2)]
    for name, shape in zip("abc", shapes, strict=True):
        put(tmp_path / "images" / f"{name}.png", image(shape=(*shape, 3)))
        put(tmp_path / "labels" / f"{name}.png", np.zeros(shape, np.uint8))
    assert open_dataset("folder", tmp_path).pixels() == 3 * 4 + 30 * 40 + 7 * 2
    (tmp_path / "labels" / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"labels/b\.png' cannot be read"):
        open_dataset("folder", tmp_path).pixels()


def test_two_images_of_one_stem(tmp_path: Path) -> None:
    plain(tmp_path)
    put(tmp_path / "images" / "a.bmp", image())
    with pytest.raises(InputError, match="same stem"):
        open_dataset("folder", tmp_path)


@pytest.mark.parametrize("label", [np.full((3, 4), 7, np.uint8), np.full((3, 4), 300, np.uint16)])
def test_a_label_value_outside_the_layout(tmp_path: Path, label: NDArray[np.generic]) -> None:
    plain(tmp_path)
    put(tmp_path / "labels" / "a.png", label)
    dataset = open_dataset("folder", tmp_path)
    with pytest.raises(InputError, match=rf"a\.png' holds the label value {label.flat[0]}; allowed are 0 normal, 1 anomaly, 255 ignore"):
        dataset.load(dataset.sources[0])


def test_sizes_that_differ(tmp_path: Path) -> None:
    plain(tmp_path)
    put(tmp_path / "labels" / "a.png", np.zeros((3, 5), np.uint8))
    dataset = open_dataset("folder", tmp_path)
    with pytest.raises(InputError, match=r"a\.png' is 3x5, its image .* is 3x4"):
        dataset.load(dataset.sources[0])


def test_coloured_labels(tmp_path: Path) -> None:
    plain(tmp_path)
    put(tmp_path / "labels" / "a.png", image(2))
    put(tmp_path / "labels" / "b.png", np.repeat(LABEL[..., None], 3, axis=2))
    dataset = open_dataset("folder", tmp_path)
    with pytest.raises(InputError, match="colour image"):
        dataset.load(dataset.sources[0])
    np.testing.assert_array_equal(dataset.load(dataset.sources[1]).label, LABEL)


def test_broken_files_and_folders(tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    dataset = open_dataset("folder", tmp_path)
    with pytest.raises(InputError, match=r"a\.png' cannot be read"):
        dataset.load(dataset.sources[0])
    with pytest.raises(InputError, match="is not a folder"):
        open_dataset("folder", tmp_path / "nothing")
    with pytest.raises(InputError, match="unknown data set 'kitti': use one of folder"):
        open_dataset("kitti", tmp_path)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        open_dataset("folder", tmp_path / "empty")


def test_labelled_image_checks_values_and_sizes() -> None:
    frame = labelled_image("7", image(), LABEL.astype(np.int32), np.zeros((3, 4), np.int64))
    assert frame.label.dtype == np.uint8
    assert frame.instances is not None
    with pytest.raises(InputError, match="label value 2"):
        labelled_image("7", image(), np.full((3, 4), 2))
    with pytest.raises(InputError, match="instance map is 3x5"):
        labelled_image("7", image(), LABEL, np.zeros((3, 5), np.int32))


def test_score_maps_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "map.npy"
    np.save(path, np.arange(6, dtype=np.int16).reshape(2, 3))
    assert read_map(path).dtype == np.float32
    for bad, message in ((np.zeros(3), "two-dimensional"), (np.array([[0.0, np.nan, np.inf]]), r"map\.npy' holds 2 scores that are NaN")):
        np.save(path, bad)
        with pytest.raises(InputError, match=message):
            read_map(path)


def test_damaged_score_maps_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "map.npy"
    np.save(path, np.zeros((2, 3), np.float32))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole.replace(b"(2, 3)", b"(2, 3("), whole.replace(b"(2, 3)", b"(2, '3"), b"PK" + whole[2:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"map\.npy' cannot be read"):
            read_map(path)


def test_frames_of_equal_number_in_several_folders(tmp_path: Path) -> None:
    for folder in ("t5", "t6"):
        put(tmp_path / "images" / "test" / folder / "1.png", image())
        put(tmp_path / "annotations" / "test" / folder / "1.png", np.full((3, 4), 14, np.uint8))
    assert [source.name for source in open_dataset("street_hazards", tmp_path).sources] == ["t5_1", "t6_1"]
    for folder in ("a", "b"):
        put(tmp_path / folder / "1_instanceIds.png", LABEL)
        put(tmp_path / folder / "1.png", image())
    with pytest.raises(InputError, match=r"a/1_instanceIds.png' and '.*b/1_instanceIds.png' have the same name"):
        open_dataset("oodis", tmp_path)


def test_a_set_without_any_labelled_frame(tmp_path: Path) -> None:
    put(tmp_path / "leftImg8bit" / "test" / "x" / "1_leftImg8bit.png", image())
    put(tmp_path / "gtCoarse" / "test" / "x" / "1_gtCoarse_labelIds.png", np.zeros((3, 4), np.uint8))
    with pytest.raises(InputError, match="holds no labelled frame of 'lost_and_found'"):
        open_dataset("lost_and_found", tmp_path)


def test_pictures_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    plain(tmp_path)
    put(tmp_path / "images" / "c.jpg", image(2, (300, 400, 3)))
    put(tmp_path / "labels" / "c.png", np.zeros((300, 400), np.uint8))
    whole = (tmp_path / "images" / "c.jpg").read_bytes()
    (tmp_path / "images" / "c.jpg").write_bytes(whole[: len(whole) // 2])
    dataset = open_dataset("folder", tmp_path)
    with pytest.raises(InputError, match=r"c\.jpg' cannot be read as an image: .* is cut short"):
        dataset.load(dataset.sources[2])


def test_labels_that_were_drawn_on_the_turned_picture_are_explained(tmp_path: Path) -> None:
    put(tmp_path / "labels" / "c.png", LABEL)
    put(tmp_path / "images" / "c.jpg", image())
    dataset = open_dataset("folder", tmp_path)
    tag = Image.Exif()
    tag[0x0112] = 6
    (height, width), path = LABEL.shape, tmp_path / "images" / "c.jpg"
    Image.new("RGB", (width, height)).save(path, exif=tag)
    np.testing.assert_array_equal(dataset.load(dataset.sources[0]).label, LABEL)
    Image.new("RGB", (height, width)).save(path, exif=tag)
    with pytest.raises(InputError, match="they must be equal: it fits the picture turned as its orientation tag says"):
        dataset.load(dataset.sources[0])
    Image.new("RGB", (height, width)).save(path)
    with pytest.raises(InputError, match=r"they must be equal$"):
        dataset.load(dataset.sources[0])


def test_labels_of_one_bit_are_refused(tmp_path: Path) -> None:
    plain(tmp_path)
    assert cv2.imwrite(str(tmp_path / "labels" / "b.png"), LABEL, [cv2.IMWRITE_PNG_BILEVEL, 1])
    with pytest.raises(InputError, match=r"b\.png'.* 1 bit a pixel"):
        list(open_dataset("folder", tmp_path))


@pytest.mark.parametrize("colours", [[0, 0, 0, 255, 255, 255], [0, 0, 0, 200, 30, 30]])
def test_labels_with_a_palette_are_its_numbers(tmp_path: Path, colours: list[int]) -> None:
    plain(tmp_path)
    with_palette = Image.fromarray(LABEL)
    with_palette.putpalette(colours + [9] * (768 - len(colours)))
    with_palette.save(tmp_path / "labels" / "b.png")
    dataset = open_dataset("folder", tmp_path)
    np.testing.assert_array_equal(dataset.load(dataset.sources[1]).label, LABEL)
    np.testing.assert_array_equal(decode_compressed_labels((tmp_path / "labels" / "b.png").read_bytes()), LABEL)


def test_folders_may_be_links_and_system_files_are_left_out(tmp_path: Path) -> None:
    plain(tmp_path / "set")
    (tmp_path / "set" / "images" / "._a.png").write_bytes(b"no picture")
    assert len(open_dataset("folder", tmp_path / "set")) == len(list((tmp_path / "set" / "labels").iterdir()))
    real = tmp_path / "disk" / "streets"
    put(real / "0000_00_Street_000001_000010_leftImg8bit.png", image(0))
    root = tmp_path / "fishyscapes"
    put(root / "labels" / "0000_0000_00_Street_000001_000010_labels.png", LABEL)
    (root / "leftImg8bit").symlink_to(real)
    # A link back to where it is would be followed for ever.
    (real / "again").symlink_to(root)
    assert len(open_dataset("fishyscapes_laf", root)) == 1


def test_predictions_beside_the_images_are_no_instances(tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / "instances").mkdir()
    (tmp_path / "instances" / "a.json").write_text("{}")
    assert open_dataset("folder", tmp_path).sources[0].instances is None


def test_oodis_takes_ids_of_one_channel_only(tmp_path: Path) -> None:
    oodis(tmp_path)
    path = tmp_path / "gt" / "04_Weg_000000_000030_gtCoarse_instanceIds.png"
    ids = coded({0: 7, 1: 26003, 255: 0}, np.uint16)
    put(path, np.dstack([ids, ids, ids]))
    np.testing.assert_array_equal(read_cityscapes_ids(path), LABEL)
    put(path, np.dstack([ids, ids // 2, ids]))
    with pytest.raises(InputError, match="is a colour image; Cityscapes instance ids are single-channel"):
        next(iter(open_dataset("oodis", tmp_path)))


def test_oodis_takes_images_and_no_label_maps(tmp_path: Path) -> None:
    put(tmp_path / "instances" / "0_instanceIds.png", LABEL)
    put(tmp_path / "labels" / "0.png", LABEL)
    put(tmp_path / "images" / "0.png", image(0))
    (source,) = open_dataset("oodis", tmp_path).sources
    assert source.image.parent.name == "images"
    put(tmp_path / "more" / "0.png", image(0))
    with pytest.raises(InputError, match="the same name"):
        open_dataset("oodis", tmp_path)


def test_negative_instance_ids_are_none() -> None:
    ids = np.array([[-1, 0], [3, -7]])
    found = labelled_image("a", image(0, (2, 2, 3)), np.zeros((2, 2), np.uint8), ids).instances
    assert found is not None
    assert found.tolist() == [[0, 0], [3, 0]]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"])
def test_broken_score_maps_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npy' cannot be read"):
        read_map(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.full((2, 2), 1e300))
    with pytest.raises(InputError, match="4 scores that are NaN or infinite"):
        read_map(tmp_path / "b.npy")
