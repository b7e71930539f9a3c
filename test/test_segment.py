from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from ros2_ood_seg import rle
from ros2_ood_seg.cli import main
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_writer import BagWriter
from ros2_ood_seg.segment import open_source

HEIGHT, WIDTH = 96, 160
BOX = (40, 30, 90, 70)
PROFILE = """
scorer: {name: external}
prompts: {boxes: {method: components}}
segmenter: {name: grabcut}
fusion: {name: s2m}
"""


def scene(shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(RGB, scores) of a red box on grey."""
    image = np.full((HEIGHT, WIDTH, 3), 120, np.uint8) + np.random.default_rng(0).integers(0, 8, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    scores = np.full((HEIGHT, WIDTH), 0.05, np.float32)
    window = (slice(BOX[1], BOX[3]), slice(BOX[0] + shift, BOX[2] + shift))
    image[window] = (200, 30, 30)
    scores[window] = 0.9
    return image, scores


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "profile.yaml").write_text(PROFILE)
    (tmp_path / "maps").mkdir()
    return tmp_path


def put(work: Path, name: str, folder: str = "images") -> Path:
    image, scores = scene()
    (work / folder).mkdir(exist_ok=True)
    cv2.imwrite(str(work / folder / f"{name}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    np.save(work / "maps" / f"{name}.npy", scores)
    return work / folder / f"{name}.png"


def segment(work: Path, *arguments: str | Path) -> int:
    fixed = ["--profile", work / "profile.yaml", "--external", work / "maps", "--output", work / "out"]
    return main(["segment", *map(str, [*arguments, *fixed])])


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def assert_found(record: dict, shift: int = 0) -> None:
    (found,) = record["instances"]
    box = (BOX[0] + shift, BOX[1], BOX[2] + shift, BOX[3])
    np.testing.assert_allclose(found["box_xyxy"], box, atol=2)
    height, width = found["segmentation"]["size"]
    mask = rle.decode(found["segmentation"]["counts"], height, width)
    assert mask[box[1] + 3 : box[3] - 3, box[0] + 3 : box[2] - 3].all()
    assert 0.5 < found["score"] <= 1.0


def test_images_and_folders(work, capsys):
    single = put(work, "lone", "other")
    for name in ("b", "a"):
        put(work, name)
    assert segment(work, work / "images", single, "--save-scores", "--save-masks") == 0
    kinds = ("{}.json", "mask_{}.png", "overlay_{}.jpg", "refined_{}.npy", "score_{}.npy")
    assert names(work / "out") == sorted(kind.format(name) for kind in kinds for name in ("a", "b", "lone"))
    record = json.loads((work / "out" / "a.json").read_text())
    assert_found(record)
    assert record["profile"] == "profile"
    assert record["image"].endswith("images/a.png")
    assert set(record["timings_ms"]) >= {"score", "segment", "total"}
    np.testing.assert_array_equal(np.load(work / "out" / "score_a.npy"), scene()[1])
    mask = cv2.imread(str(work / "out" / "mask_a.png"), cv2.IMREAD_UNCHANGED)
    assert (mask.dtype, mask[50, 60], mask[5, 5]) == (np.uint16, 1, 0)
    overlay = cv2.imread(str(work / "out" / "overlay_a.jpg"))
    assert overlay.shape == (HEIGHT, WIDTH, 3)
    assert "3 frames: 3 instances" in capsys.readouterr().out


def test_unreadable_files_are_named_counted_and_skipped(work, capsys):
    put(work, "good")
    (work / "images" / "cut.png").write_bytes((work / "images" / "good.png").read_bytes()[:300])
    (work / "images" / "text.jpg").write_text("no picture")
    assert segment(work, work / "images", work / "missing.png") == 0
    captured = capsys.readouterr()
    assert "1 frames, 3 skipped: 1 instances" in captured.out
    for name in ("cut.png: compressed image", "text.jpg: compressed image", "missing.png' does not exist"):
        assert name in captured.err


def test_nothing_readable_is_exit_code_2_without_traceback(work, capsys):
    assert segment(work, work / "missing.png") == 2
    assert "none of the 1 inputs could be read" in capsys.readouterr().err
    assert segment(work, work / "missing.png", "--every", "0") == 2
    assert segment(work, work / "missing.png", "--set", "no.such=1") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "scorer 'external' needs score maps: name their folder with --external"),
        (("--external", "{work}/nowhere"), "--external '{work}/nowhere' is not a folder"),
        (("--external", "{work}/maps", "--set", "scorer.name=compact"), "add --set scorer.name=external"),
    ],
)
def test_maps_and_a_scorer_that_do_not_belong_together_are_told_once(work, capsys, arguments, message):
    for name in "ab":
        put(work, name)
    fixed = ["segment", str(work / "images"), "--profile", str(work / "profile.yaml"), "--output", str(work / "out")]
    assert main([*fixed, *(argument.format(work=work) for argument in arguments)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message.format(work=work) in error
    assert not (work / "out").exists()


def test_equal_stems_do_not_overwrite_each_other(work):
    first, second = put(work, "a", "x"), put(work, "a", "y")
    assert segment(work, first, second, "--overlay-format", "none") == 0
    assert names(work / "out") == ["a.json", "a_2.json"]


def test_a_frame_that_the_pipeline_refuses_is_skipped(work, capsys):
    put(work, "good")
    cv2.imwrite(str(work / "images" / "tiny.png"), np.zeros((4, 4, 3), np.uint8))
    np.save(work / "maps" / "tiny.npy", np.zeros((4, 4), np.float32))
    assert segment(work, work / "images") == 0
    assert "tiny.png: image is 4x4 px" in capsys.readouterr().err


def test_video(work):
    video = cv2.VideoWriter(str(work / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (WIDTH, HEIGHT))
    for k in range(7):
        image, scores = scene(shift=4 * k)
        video.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        np.save(work / "maps" / f"film_{k:06d}.npy", scores)
    video.release()
    assert segment(work, work / "film.avi", "--every", "3", "--max-frames", "2", "--overlay-format", "png") == 0
    assert names(work / "out") == ["film_000000.json", "film_000003.json", "overlay_film_000000.png", "overlay_film_000003.png"]
    record = json.loads((work / "out" / "film_000003.json").read_text())
    assert record["stamp_ns"] == 300_000_000
    assert_found(record, shift=12)


def write_bag(path: Path, work: Path) -> Path:
    with BagWriter(path) as bag:
        for k in range(3):
            image, scores = scene(shift=4 * k)
            bag.write_image("/cam/image", image, 1000 + k)
            bag.write_image("/cam/label", (scores > 0.5).astype(np.uint8), 1000 + k)
            np.save(work / "maps" / f"drive_{1000 + k}.npy", scores)
    return path


@pytest.mark.parametrize("name", ["drive", "drive.mcap"])
def test_bag(work, name):
    bag = write_bag(work / name, work)
    assert segment(work, bag, "--topic", "/cam/image") == 0
    stems = [f"drive_{1000 + k}" for k in range(3)]
    assert names(work / "out") == sorted([f"{s}.json" for s in stems] + [f"overlay_{s}.jpg" for s in stems])
    assert_found(json.loads((work / "out" / "drive_1002.json").read_text()), shift=8)


def test_bag_with_several_image_topics_and_none_chosen(work, capsys):
    bag = write_bag(work / "drive", work)
    assert segment(work, bag) == 2
    assert "several image topics, choose one: /cam/image [sensor_msgs/msg/Image, 3 messages], /cam/label" in capsys.readouterr().err


def test_a_topic_without_a_bag_is_refused(work, capsys):
    put(work, "frame")
    assert segment(work, work / "images", "--topic", "/cam/image") == 2
    assert "--topic '/cam/image' is of recordings" in capsys.readouterr().err


def test_what_is_no_input_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.mp4").write_text("x")
    for name, message in (
        ("empty", "holds no images"),
        ("notes.txt", "no known kind"),
        ("broken.mp4", "cannot be read"),
        ("none", "not exist"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(tmp_path / name)


def test_a_video_that_breaks_off_is_named(work, capsys):
    put(work, "clip_000000")
    writer = cv2.VideoWriter(str(work / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (WIDTH, HEIGHT))
    for k in range(20):
        writer.write(scene(k)[0][..., ::-1])
        np.save(work / "maps" / f"clip_{k:06d}.npy", scene(k)[1])
    writer.release()
    assert segment(work, work / "clip.avi") == 0
    assert "20 frames:" in capsys.readouterr().out
    whole = (work / "clip.avi").read_bytes()
    (work / "clip.avi").write_bytes(whole[: len(whole) // 2])
    assert segment(work, work / "clip.avi") == 0
    printed = capsys.readouterr()
    assert "the video breaks off after" in printed.err
    assert "1 skipped" in printed.out


def test_results_do_not_go_where_the_pictures_are(work, capsys):
    picture = put(work, "a", "out")
    (work / "out" / "a.json").write_text("labels of mine")
    assert segment(work, work / "out") == 2
    assert "is the folder of the pictures" in capsys.readouterr().err
    assert (picture.with_suffix(".json")).read_text() == "labels of mine"


def test_results_do_not_go_beside_pictures_of_a_list(work, capsys):
    picture = put(work, "a", "out")
    (work / "out" / "a.json").write_text("labels of mine")
    assert segment(work, picture) == 2
    assert "is the folder of the pictures" in capsys.readouterr().err
    assert (picture.with_suffix(".json")).read_text() == "labels of mine"


def test_what_is_no_picture_may_lie_where_results_go(work, capsys):
    assert segment(work, work / "out" / "missing.mp4") == 2
    assert "is the folder of the pictures" not in capsys.readouterr().err
