from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from ros2_ood_seg.cli import main
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.submission import write_oodis, write_smiyc

SHAPE = (48, 64)
CHEAP = ("--set", "scorer.name=external", "--set", "runtime.device=cpu", "--set", "prompts.points.method=none", "--profile", "compact_s2m")
CHEAP = (*CHEAP, "--set", "prompts.boxes.method=components", "--set", "segmenter.name=grabcut")


@pytest.fixture
def anomaly_track(tmp_path: Path) -> Path:
    """A test split without labels, one validation image, and score maps of which one is silent."""
    root = tmp_path / "dataset_AnomalyTrack"
    (root / "images").mkdir(parents=True)
    (tmp_path / "maps").mkdir()
    for k, name in enumerate(("cow0001", "dog0002", "validation0000")):
        image = np.full((*SHAPE, 3), 110, np.uint8)
        scores = np.zeros(SHAPE, np.float32)
        if k != 1:
            image[20:34, 20:36] = (20, 60, 230)
            scores[20:34, 20:36] = 0.9
        cv2.imwrite(str(root / "images" / f"{name}.jpg"), image)
        np.save(tmp_path / "maps" / f"{name}.npy", scores)
    return root


def submit(benchmark: str, root: Path, *more: str) -> int:
    places = ("--root", str(root), "--output", str(root.parent / "out"), "--external", str(root.parent / "maps"))
    return main(["submission", benchmark, "--dataset", "road_anomaly_21", *places, *CHEAP, *more])


def test_smiyc_files_are_what_the_benchmark_reads(anomaly_track: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h5py = pytest.importorskip("h5py")
    assert submit("smiyc", anomaly_track, "--method", "Ours", "--map", "score") == 0
    folder = anomaly_track.parent / "out" / "anomaly_p" / "Ours" / "AnomalyTrack-all"
    assert sorted(path.name for path in folder.iterdir()) == ["cow0001.hdf5", "dog0002.hdf5", "validation0000.hdf5"]
    with h5py.File(folder / "cow0001.hdf5") as file:
        assert list(file) == ["value"]
        assert (file["value"].dtype, file["value"].shape, file["value"].compression) == (np.float16, SHAPE, "gzip")
        np.testing.assert_array_equal(file["value"][:], np.load(anomaly_track.parent / "maps" / "cow0001.npy").astype(np.float16))
    assert submit("smiyc", anomaly_track, "--method", "Ours") == 2
    assert "exists: name another --output" in capsys.readouterr().err
    (folder / "dog0002.hdf5").unlink()
    before = (folder / "cow0001.hdf5").stat().st_mtime_ns
    assert submit("smiyc", anomaly_track, "--method", "Ours", "--resume") == 0
    assert (folder / "dog0002.hdf5").is_file()
    assert (folder / "cow0001.hdf5").stat().st_mtime_ns == before


def test_oodis_files_are_what_the_benchmark_verifies(anomaly_track: Path) -> None:
    assert submit("oodis", anomaly_track) == 0
    folder = anomaly_track.parent / "out" / "roadanomaly"
    texts = sorted(folder.glob("*.txt"))
    assert [path.name for path in texts] == ["cow0001_instanceIds_pred.txt", "dog0002_instanceIds_pred.txt"]
    named = set()
    for text in texts:
        for line in text.read_text().splitlines():
            png, kind, score = line.split(" ")
            assert re.fullmatch(r".*_instanceIds_\d+_1\.png", png)
            assert kind == "1"
            assert 0.0 <= float(score) <= 1.0
            mask = cv2.imread(str(folder / png), cv2.IMREAD_UNCHANGED)
            assert mask.shape == SHAPE
            assert mask.any() == text.name.startswith("cow")
            named.add(png)
    assert named == {path.name for path in folder.glob("*.png")}


def test_writing_an_image_again_leaves_no_mask_of_before(tmp_path: Path) -> None:
    file = tmp_path / "a_1_instanceIds_pred.txt"
    other = tmp_path / "a_10_instanceIds_pred.txt"
    masks = np.ones((3, *SHAPE), bool)
    write_oodis(other, masks[:1], np.ones(1, np.float32))
    write_oodis(file, masks, np.array([0.9, 0.5, 0.1], np.float32))
    write_oodis(file, masks[:1], np.array([0.25], np.float32))
    assert file.read_text() == "a_1_instanceIds_0_1.png 1 0.25\n"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a_10_instanceIds_0_1.png", "a_1_instanceIds_0_1.png"]


def test_lost_and_found_has_its_own_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "laf" / "leftImg8bit" / split / "04_Weg").mkdir(parents=True)
        image = np.zeros((*SHAPE, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "laf" / "leftImg8bit" / split / "04_Weg" / f"04_Weg_{split}_000000_000030_leftImg8bit.png"), image)
        np.save(tmp_path / f"04_Weg_{split}_000000_000030.npy", np.zeros(SHAPE, np.float32))
    common = (
        "--dataset",
        "lost_and_found",
        "--root",
        str(tmp_path / "laf"),
        "--output",
        str(tmp_path / "out"),
        "--external",
        str(tmp_path),
    )
    assert main(["submission", "oodis", *common, *CHEAP]) == 0
    assert (tmp_path / "out" / "fishyscapes" / "04_Weg_test_000000_000030_gtCoarse_instanceIds_pred.txt").is_file()
    assert main(["submission", "smiyc", *common, *CHEAP]) == 0
    written = {str(path.relative_to(tmp_path / "out" / "anomaly_p" / "compact_s2m")) for path in (tmp_path / "out").rglob("*.hdf5")}
    assert written == {f"LostAndFound-{split}/04_Weg_{split}_000000_000030.hdf5" for split in ("train", "test")}


def test_scores_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    scores = np.zeros(SHAPE, np.float32)
    scores[3, 4] = -1e6
    with pytest.raises(InputError, match=r"65504.*--map calibrated"):
        write_smiyc(tmp_path / "a.hdf5", scores)
    assert not (tmp_path / "a.hdf5").exists()


def test_pictures_that_cannot_be_used_are_named(anomaly_track: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cv2.imwrite(str(anomaly_track / "images" / "dog0002.jpg"), np.zeros((8, 200), np.uint8))
    assert submit("oodis", anomaly_track) == 2
    assert f"'{anomaly_track / 'images' / 'dog0002.jpg'}': image is 200x8 px" in capsys.readouterr().err


def test_bad_arguments_end_with_2_and_one_line(anomaly_track: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (anomaly_track.parent / "val" / "images").mkdir(parents=True)
    cv2.imwrite(str(anomaly_track.parent / "val" / "images" / "validation0001.png"), np.zeros((*SHAPE, 3), np.uint8))
    for root, message in ((anomaly_track / "images", "is not a folder"), (anomaly_track.parent / "val", "validation images only")):
        assert submit("oodis", root) == 2
        assert message in capsys.readouterr().err
    assert submit("oodis", anomaly_track, "--max-images", "-1") == 2
    assert "--max-images is -1" in capsys.readouterr().err
    for flag, value in (("--map", "score"), ("--method", "mine")):
        assert submit("oodis", anomaly_track, flag, value) == 2
        assert f"{flag} is of smiyc, oodis takes instances" in capsys.readouterr().err
