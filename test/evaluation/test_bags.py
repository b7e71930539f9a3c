from __future__ import annotations

import contextlib
import errno
import io
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg import rle
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_messages import instances_from_message, make_header, typestore
from ros2_ood_seg.evaluation.bag_writer import DRIVE_IMAGE, DRIVE_INSTANCE, DRIVE_LABEL, RESERVE_BYTES, BagWriter, write_drive
from ros2_ood_seg.evaluation.bags import BagReader, Topic
from ros2_ood_seg.synthetic import SyntheticDrive

STAMPS = [1_700_000_000_000_000_001 + k * 100_000_000 for k in range(4)]


def picture(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def labels(k: int) -> np.ndarray:
    return np.random.default_rng(100 + k).integers(0, 3, (12, 20)).astype(np.uint8)


def write_sample(path: Path, storage: str = "mcap") -> Path:
    with BagWriter(path, storage) as bag:
        for k, stamp in enumerate(STAMPS):
            bag.write_image("/cam/label", labels(k), stamp, "cam")
            bag.write_image("/cam/image", picture(k), stamp, "cam")
            if k != 2:
                bag.write_image("/cam/instance", labels(k).astype(np.uint16) + 300, stamp, "cam")
    return path


@pytest.fixture(scope="module", params=["mcap", "sqlite3", "file"])
def sample(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bags")
    return write_sample(folder / "sample.mcap") if request.param == "file" else write_sample(folder / "sample", request.param)


def test_images_come_back_bit_for_bit_in_order(sample):
    with BagReader(sample) as bag:
        assert (bag.start_ns, bag.end_ns) == (min(STAMPS), max(STAMPS))
        images = list(bag.iter_images("/cam/image"))
        assert [i.stamp_ns for i in images] == STAMPS
        assert [i.time_ns for i in images] == STAMPS
        assert {i.frame_id for i in images} == {"cam"}
        for k, image in enumerate(images):
            np.testing.assert_array_equal(image.rgb(), picture(k))


def test_labels_are_matched_by_stamp(sample):
    with BagReader(sample) as bag:
        rows = list(bag.iter_labelled("cam/image", "cam/label", "cam/instance"))
    assert [image.stamp_ns for image, _, _ in rows] == [STAMPS[0], STAMPS[1], STAMPS[3]]
    for (image, label, instance), k in zip(rows, (0, 1, 3), strict=True):
        np.testing.assert_array_equal(image.rgb(), picture(k))
        np.testing.assert_array_equal(label.labels(), labels(k))
        np.testing.assert_array_equal(instance.labels(), labels(k).astype(int) + 300)


def test_topics_are_listed_with_their_types(sample):
    with BagReader(sample) as bag:
        assert [(t.name, t.msgtype, t.count) for t in bag.topics] == [
            ("/cam/image", "sensor_msgs/msg/Image", 4),
            ("/cam/instance", "sensor_msgs/msg/Image", 3),
            ("/cam/label", "sensor_msgs/msg/Image", 4),
        ]
        with pytest.raises(
            InputError, match=r"no topic '/front'; its topics: /cam/image \[sensor_msgs/msg/Image, 4 messages\], /cam/instance"
        ):
            bag.image_topic("/front")
        with pytest.raises(InputError, match="several image topics, choose one: /cam/image"):
            bag.image_topic()
        assert bag.image_topic(besides=("/cam/label", "/cam/instance")).name == "/cam/image"


def test_compressed_images_and_the_base_name(tmp_path):
    smooth = np.full((32, 48, 3), (200, 40, 90), np.uint8)
    with BagWriter(tmp_path / "bag") as bag:
        bag.write_jpeg("/front/compressed", smooth, 5, "c")
    with BagReader(tmp_path / "bag") as bag:
        assert bag.image_topic().name == "/front/compressed"
        (image,) = bag.iter_images("front")
        assert np.abs(image.rgb().astype(int) - smooth).max() <= 6


def test_one_camera_recorded_raw_and_compressed_is_one_camera(tmp_path):
    with BagWriter(tmp_path / "bag") as bag:
        bag.write_jpeg("/front/compressed", picture(0), 5)
        bag.write_image("/front", picture(0), 5)
    with BagReader(tmp_path / "bag") as bag:
        assert bag.image_topic().name == "/front"


def test_compressed_png_labels(tmp_path):
    with BagWriter(tmp_path / "bag") as bag:
        message_type = typestore().types["sensor_msgs/msg/CompressedImage"]
        data = cv2.imencode(".png", labels(3))[1].reshape(-1)
        bag.write("/label/compressed", message_type(make_header(7, ""), "png", data), 7)
        bag.write_image("/image", picture(0), 7)
    with BagReader(tmp_path / "bag") as bag:
        ((_, label),) = bag.iter_labelled("/image", "/label")
    np.testing.assert_array_equal(label.labels(), labels(3))


def test_a_topic_of_another_type_or_without_matching_stamps_is_named(tmp_path):
    with BagWriter(tmp_path / "bag") as bag:
        bag.write("/status", make_header(1, "x"), 1)
        bag.write_image("/image", picture(0), 1)
        bag.write_image("/label", labels(0), 2)
    with BagReader(tmp_path / "bag") as bag:
        with pytest.raises(InputError, match="'/status' holds std_msgs/msg/Header, no images"):
            bag.image_topic("status")
        with pytest.raises(InputError, match="no image of '/image' has the same stamp as a label of /label"):
            list(bag.iter_labelled("/image", "/label"))


def test_a_bag_without_images_says_what_it_has(tmp_path):
    with BagWriter(tmp_path / "bag") as bag:
        bag.write("/status", make_header(1, "x"), 1)
    with BagReader(tmp_path / "bag") as bag, pytest.raises(InputError, match=r"no images; its topics: /status \[std_msgs/msg/Header"):
        list(bag.iter_images())


def test_what_is_no_bag_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        BagReader(tmp_path / "nothing")
    (tmp_path / "film.mp4").write_bytes(b"film")
    for path in (tmp_path, tmp_path / "film.mp4"):
        with pytest.raises(InputError, match="not a rosbag2 recording"):
            BagReader(path)


@pytest.mark.parametrize("name", ["broken.mcap", "broken.db3"])
def test_rubbish_is_an_input_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"rubbish" * 100)
    with pytest.raises(InputError, match="cannot be read"), BagReader(tmp_path / name) as bag:
        list(bag.iter_raw())


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_cut_recording_gives_an_input_error_or_its_beginning(tmp_path, part):
    whole = write_sample(tmp_path / "whole.mcap").read_bytes()
    (tmp_path / "cut.mcap").write_bytes(whole[: int(len(whole) * part)])
    seen = []
    with contextlib.suppress(InputError), BagReader(tmp_path / "cut.mcap") as bag:
        seen.extend(image.stamp_ns for image in bag.iter_images("/cam/image"))
    assert seen == STAMPS[: len(seen)]


def test_a_message_that_is_no_image_is_an_input_error(tmp_path):
    with BagWriter(tmp_path / "bag") as bag:
        bag.write_raw("/image", "sensor_msgs/msg/Image", 1, b"\x00\x01\x00\x00" + bytes(3))
    with BagReader(tmp_path / "bag") as bag, pytest.raises(InputError, match="cannot be read"):
        list(bag.iter_images("/image"))


def test_nothing_is_overwritten_and_a_failed_bag_leaves_nothing(tmp_path):
    write_sample(tmp_path / "bag")
    with pytest.raises(InputError, match="exists already"):
        BagWriter(tmp_path / "bag")
    with pytest.raises(InputError, match=r"got \(2, 2\) float64"), BagWriter(tmp_path / "new.mcap") as bag:
        bag.write_image("/image", np.zeros((2, 2)), 0)
    assert [p.name for p in tmp_path.iterdir()] == ["bag"]


class SmallDisk(io.FileIO):
    """A file on a disk with room for an unfinished bag's reserve and two chunks of messages and a half."""

    def write(self, data: Any) -> int:
        taken = sum(path.stat().st_size for path in Path(str(self.name)).parents[1].rglob("*") if path.is_file())
        left = RESERVE_BYTES + 5 * 2**19 - taken
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(memoryview(data)[:left])


@pytest.mark.parametrize("keep", [True, False])
def test_a_full_disk_is_named_and_an_unfinished_bag_that_stays_can_be_read(tmp_path, monkeypatch, keep):
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: io.BufferedWriter(SmallDisk(p, "x")) if p.suffix == ".mcap" else real(p, *a, **k))
    written = []

    def fill() -> None:
        with BagWriter(tmp_path / "full.mcap", keep_unfinished=keep) as bag:
            for k in range(9000):
                written.append(k % 251)
                bag.write_image("/cam", np.full((100, 100), written[-1], np.uint8), k)

    with pytest.raises(InputError, match=r"full\.mcap' cannot be written: No space left on device" + "; it holds what came before" * keep):
        fill()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["full.mcap"] * keep
    if keep:
        with BagReader(tmp_path / "full.mcap") as bag:
            assert [image.labels()[0, 0] for image in bag.iter_images("/cam")] == written


def test_what_a_killed_process_left_goes_and_what_another_one_writes_stays(tmp_path):
    code = "import sys; from ros2_ood_seg.evaluation.bag_writer import BagWriter\nwith BagWriter(sys.argv[1]): print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "other.mcap")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    (folder,) = tmp_path.iterdir()
    write_sample(tmp_path / "while.mcap")
    assert folder.is_dir()
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert folder.is_dir()
    write_sample(tmp_path / "after.mcap")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after.mcap", "while.mcap"]


def anomaly_message(masks: np.ndarray):
    types = typestore().types
    instances = []
    for k, mask in enumerate(masks):
        box = types["ros2_ood_seg/msg/BoundingBox"](0.0, 0.0, 1.0, 1.0, 0.5)
        code = types["ros2_ood_seg/msg/InstanceMask"](*mask.shape, rle.encode(mask))
        instances.append(
            types["ros2_ood_seg/msg/AnomalyInstance"](k + 1, 40 + k, 0.9 - 0.1 * k, 2.5, float("nan"), int(mask.sum()), box, code)
        )
    return types["ros2_ood_seg/msg/AnomalyInstanceArray"](make_header(9, "cam"), "compact", "scorer", instances)


def test_instances_survive_the_bag(tmp_path):
    masks = np.zeros((2, 6, 8), bool)
    masks[0, 1:4, 2:7] = True
    masks[1, 4:, :2] = True
    with BagWriter(tmp_path / "results.mcap") as bag:
        bag.write("/ood_segmenter/instances", anomaly_message(masks), 9)
    with BagReader(tmp_path / "results.mcap") as bag:
        (raw,) = bag.iter_raw()
        message = bag.message(raw)
    assert (message.profile, message.scorer, message.header.stamp.nanosec) == ("compact", "scorer", 9)
    found = instances_from_message(message, (6, 8))
    assert torch.equal(found.masks, torch.from_numpy(masks))
    assert found.boxes_xyxy.tolist() == [[2, 1, 7, 4], [0, 4, 2, 6]]
    assert found.track_ids.tolist() == [40, 41]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])
    with pytest.raises(InputError, match="8x6 px, its image 9x6"):
        instances_from_message(message, (6, 9))


def test_message_definitions_are_those_of_the_build():
    """The hash of a ROS 2 type covers names and types of all fields, so equal hashes mean bags that ROS reads."""
    built = Path(__file__).parents[2] / "install/ros2_ood_seg/share/ros2_ood_seg/msg"
    definitions = sorted(built.glob("*.json"))
    if not definitions:
        pytest.skip("the package is not built with colcon: no generated type hashes to compare with")
    for path in definitions:
        assert typestore().hash_rihs01(f"ros2_ood_seg/msg/{path.stem}") in path.read_text(encoding="utf-8")


def test_bags_have_the_layout_that_ros_expects(tmp_path):
    folder = write_sample(tmp_path / "bag")
    assert sorted(p.name for p in folder.iterdir()) == ["bag.mcap", "metadata.yaml"]
    head = (folder / "bag.mcap").read_bytes()[:64]
    assert head.startswith(b"\x89MCAP0\r\n")
    assert b"ros2" in head, "the profile by which Foxglove knows how to read it"


def test_a_synthetic_drive_becomes_a_labelled_bag(tmp_path):
    drive = SyntheticDrive(1, 64, 96, frames=2)
    write_drive(tmp_path / "drive", drive)
    with BagReader(tmp_path / "drive") as bag:
        rows = list(bag.iter_labelled(DRIVE_IMAGE, DRIVE_LABEL, DRIVE_INSTANCE))
    for (image, label, instance), frame in zip(rows, drive, strict=True):
        assert image.stamp_ns == frame.stamp_ns
        np.testing.assert_array_equal(image.rgb(), frame.image)
        np.testing.assert_array_equal(label.labels(), frame.anomaly)
        np.testing.assert_array_equal(instance.labels(), frame.instances)


def test_one_wrong_stamp_costs_one_label_and_stamps_may_start_over(tmp_path):
    far, kind = STAMPS[0] + 10**12, typestore().types["sensor_msgs/msg/Image"]
    for name, image_stamps, label_stamps, matched in (
        ("image ahead", [1, 2, far, *range(4, 60)], range(1, 60), 58),
        ("label ahead", range(1, 60), [1, far, *range(3, 60)], 58),
        ("again", [*range(1, 31)] * 2, [*range(1, 31)] * 2, 60),
        ("none", [0] * 30, [0] * 30, 30),
    ):
        with BagWriter(tmp_path / name) as bag:
            for k, (image, label) in enumerate(zip(image_stamps, label_stamps, strict=True)):
                for topic, stamp, pixels, encoding in (
                    ("/cam/label", label, np.full((12, 20), k), "mono8"),
                    ("/cam/image", image, np.full((12, 20, 3), k), "rgb8"),
                ):
                    message = kind(make_header(stamp, "cam"), 12, 20, encoding, 0, pixels[0].size, pixels.astype(np.uint8).ravel())
                    bag.write(topic, message, STAMPS[0] + k)
        with BagReader(tmp_path / name) as bag:
            rows = list(bag.iter_labelled("/cam/image", "/cam/label"))
        assert len(rows) == matched, name
        assert all(image.rgb()[0, 0, 0] == label.labels()[0, 0] for image, label in rows)


def test_a_raw_topic_that_was_never_used_does_not_hide_the_compressed_one(tmp_path, monkeypatch):
    with BagWriter(tmp_path / "bag") as bag:
        for stamp in STAMPS:
            bag.write_jpeg("/cam/compressed", picture(0), stamp, "cam")
    with BagReader(tmp_path / "bag") as bag:
        # As ros2 bag record notes what was advertised.
        monkeypatch.setattr(BagReader, "topics", (Topic("/cam", "sensor_msgs/msg/Image", 0), *bag.topics))
        assert bag.image_topic().name == "/cam/compressed"
        assert bag.image_topic("/cam").name == "/cam/compressed"


def test_a_message_without_a_header_costs_the_labels_from_it_on(tmp_path):
    with BagWriter(tmp_path / "drive") as bag:
        for k, stamp in enumerate(STAMPS):
            bag.write_image("/cam/image", picture(k), stamp)
            if k == 2:
                bag.write_raw("/cam/label", "sensor_msgs/msg/Image", stamp, b"")
            else:
                bag.write_image("/cam/label", labels(k), stamp)
    with BagReader(tmp_path / "drive") as bag:
        assert [len(found) for _, found in bag.iter_frames("/cam/image", "/cam/label")] == [1, 1, 0, 0]
