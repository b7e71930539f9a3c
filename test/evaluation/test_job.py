from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from ros2_ood_seg.cli import main
from ros2_ood_seg.config import load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.datasets import Source, open_dataset
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options, pipeline_stamp
from ros2_ood_seg.evaluation.job import Job, Worker, run_on_ray

SHAPE = (48, 64)
FRAMES = 5
SETTINGS = {
    "scorer.name": "external",
    "runtime.device": "cpu",
    "prompts.points.method": "none",
    "prompts.boxes.method": "components",
    "segmenter.name": "grabcut",
    "tracking.enabled": False,
}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Five frames with an object each, and score maps that find it more or less."""
    root = tmp_path / "data"
    for folder in ("images", "labels", "maps"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(FRAMES):
        image, label = np.full((*SHAPE, 3), 110, np.uint8), np.zeros(SHAPE, np.uint8)
        x, y = int(rng.integers(8, 40)), int(rng.integers(8, 28))
        label[y : y + 12, x : x + 14] = 1
        image[label == 1] = (20, 60, 230)
        scores = (0.7 * (label == 1) + rng.uniform(0, 0.25, SHAPE)).astype(np.float32)
        cv2.imwrite(str(root / "images" / f"{k}.png"), image)
        cv2.imwrite(str(root / "labels" / f"{k}.png"), label)
        np.save(root / "maps" / f"{k}.npy", scores)
    return Job(open_dataset("folder", root), load_profile("compact_s2m", SETTINGS), tmp_path / "parts", Options(), root / "maps")


def figures(job: Job, evaluation: Evaluation) -> dict[str, Any]:
    """What may not depend on who evaluated the frames."""
    evaluation.order(source.name for source in job.dataset.sources)
    report, _ = evaluation.report("set")
    return {key: value for key, value in report.items() if key not in ("timings_ms", "outside_ms", "outside_share", "per_image")}


@pytest.fixture
def expected(job: Job, tmp_path: Path) -> dict[str, Any]:
    alone = dataclasses.replace(job, work=tmp_path / "alone")
    evaluation = alone.open()
    alone.run(evaluation, alone.dataset.sources, lambda count: None)
    return figures(alone, evaluation)


def test_parts_of_two_workers_give_the_report_of_one_process(job: Job, expected: dict[str, Any]) -> None:
    evaluation = job.open()
    workers = [Worker(job), Worker(job)]
    sources = job.dataset.sources
    assert [workers[0].run(sources[3:]), workers[1].run(sources[:2]), workers[0].run(sources[2:3])] == [2, 2, 1]
    assert figures(job, evaluation) == expected
    assert expected["images"] == FRAMES
    assert 0.0 < expected["refined"]["ap"] <= 1.0


def test_a_part_is_taken_up_where_its_worker_died(job: Job, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = job.open()
    added: list[str] = []
    whole = Evaluation.add

    def dying(self: Evaluation, frame: Any, *more: Any) -> Any:
        if len(added) == 2:
            raise MemoryError
        added.append(frame.name)
        return whole(self, frame, *more)

    monkeypatch.setattr(Evaluation, "add", dying)
    with pytest.raises(MemoryError):
        Worker(job).run(job.dataset.sources)
    monkeypatch.setattr(Evaluation, "add", lambda self, frame, *more: (added.append(frame.name), whole(self, frame, *more))[1])
    Worker(job).run(job.dataset.sources)
    # A frame is measured while the next one is read: the one before the death may not have been finished.
    assert added in (["0", "1", "2", "3", "4"], ["0", "1", "1", "2", "3", "4"])
    assert figures(job, evaluation) == expected


def test_a_worker_with_other_settings_is_refused(job: Job) -> None:
    job.open()
    other = dataclasses.replace(job, external=job.external and job.external.parent)
    with pytest.raises(InputError, match="other code, weights, settings or data"):
        Worker(other).run(job.dataset.sources)


@dataclasses.dataclass(frozen=True)
class Killed(Job):
    """The first process that gets to the third frame is killed, as by a lack of memory."""

    def run(self, evaluation: Evaluation, sources: Sequence[Source], done: Callable[[int], object]) -> None:
        sentinel = self.work.parent / "killed"
        if not sentinel.exists():
            super().run(evaluation, sources[:2], done)
            sentinel.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        super().run(evaluation, sources, done)


def test_ray_gives_the_same_report_although_a_worker_is_killed(job: Job, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ros2_ood_seg[ray]")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # Workers start as fresh interpreters.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    killed = Killed(**vars(job))
    evaluation = killed.open()
    done: list[int] = []
    run_on_ray(killed, killed.parts(job.dataset.sources), 1, None, done.append)
    assert (job.work.parent / "killed").is_file()
    assert sum(done) == FRAMES
    assert figures(job, evaluation) == expected


class Counting:
    """A job whose parts are numbers of frames."""

    def __init__(self, work: Path, device: str = "cpu") -> None:
        self.config, self.work = load_profile("compact_s2m", {**SETTINGS, "runtime.device": device}), work

    def worker(self) -> Callable[[int], int]:
        return lambda part: part


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("ros2_ood_seg.runtime.cuda_error", lambda device: "")


@dataclasses.dataclass
class SmallRay:
    """Stands in for Ray: parts are done at once, by workers that it counts."""

    resources: dict[str, float]
    workers: list[Worker] = dataclasses.field(default_factory=list)

    def remote(self, **options: Any) -> Callable[[type[Worker]], Any]:
        def make(kind: type[Worker], *arguments: Any) -> Worker:
            self.workers.append(kind(*arguments))
            return self.workers[-1]

        return lambda kind: SimpleNamespace(remote=lambda *arguments: make(kind, *arguments))

    def put_into(self, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = SimpleNamespace(map_unordered=lambda run, parts: [self.workers[0].run(part) for part in parts])
        monkeypatch.setattr(ray, "init", lambda **options: None)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(ray, "cluster_resources", lambda: self.resources)
        monkeypatch.setattr(ray, "remote", self.remote)
        monkeypatch.setattr(ray.util, "ActorPool", lambda actors: pool)


@pytest.mark.parametrize(
    ("device", "resources", "workers", "warning"),
    [
        ("cpu", {"CPU": 8.0}, 3, ""),
        ("cpu", {"CPU": 2.0, "GPU": 1.0}, 2, "Ray has room for 2 of 3 workers, each with a CPU"),
        ("cuda", {"CPU": 8.0, "GPU": 1.0}, 1, "Ray has room for 1 of 3 workers, each with a CPU and a GPU"),
        ("cuda:0", {"CPU": 2.0, "GPU": 4.0}, 2, "Ray has room for 2 of 3 workers, each with a CPU and a GPU"),
    ],
)
def test_no_more_workers_start_than_there_is_room_for(
    device: str,
    resources: dict[str, float],
    workers: int,
    warning: str,
    two_gpus: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray = SmallRay(resources)
    ray.put_into(pytest.importorskip("ray", reason="Ray is not installed: pip install ros2_ood_seg[ray]"), monkeypatch)
    done: list[int] = []
    run_on_ray(Counting(tmp_path, device), [1, 2, 3], 3, None, done.append)
    assert done == [1, 2, 3]
    assert len(ray.workers) == workers
    assert [record.message for record in caplog.records] == ([warning] if warning else [])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", r"^Ray at 'this machine' has no GPU for a worker$"),
        ("cuda:1", r"^runtime.device is 'cuda:1' but each of the workers has a GPU of its own: use 'cuda'$"),
    ],
)
def test_workers_that_could_not_run_are_refused(
    device: str, message: str, two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallRay({"CPU": 8.0}).put_into(pytest.importorskip("ray", reason="Ray is not installed: pip install ros2_ood_seg[ray]"), monkeypatch)
    with pytest.raises(InputError, match=message):
        run_on_ray(Counting(tmp_path, device), [1], 1, None, lambda count: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", "-1"), "--workers is -1"),
        (("--ray", "auto"), "--ray goes with --workers"),
        (("--workers", "2"), "--workers needs Ray: pip install"),
    ],
)
def test_bad_arguments_end_with_2_and_one_line(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    common = ["evaluate", "--root", str(job.dataset.root), "--external", str(job.external), "--output", str(tmp_path / "r.json"), *settings]
    assert main([*common, "--profile", "compact_s2m", *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_frames_whose_files_changed_are_measured_again_and_no_others(job: Job) -> None:
    job.run(job.open(), job.dataset.sources, lambda _: None)
    assert all(job.open().has(str(k)) for k in range(FRAMES))
    path = job.dataset.sources[2].image
    cv2.imwrite(str(path), np.full((*SHAPE, 3), 90, np.uint8))
    os.utime(path, ns=(1, 1))
    np.save(job.external / "4.npy", np.zeros(SHAPE, np.float32))
    os.utime(job.external / "4.npy", ns=(1, 1))
    assert [job.open().has(str(k)) for k in range(FRAMES)] == [True, True, False, True, False]


def test_what_someone_else_put_into_the_folder_stays_and_does_no_harm(job: Job) -> None:
    job.run(job.open(), job.dataset.sources[:1], lambda _: None)
    (job.work / "notes.txt").write_text("mine")
    other = dataclasses.replace(job, options=Options(save=job.work.parent / "saved"))
    evaluation = other.open()
    assert not evaluation.has("0")
    other.run(evaluation, job.dataset.sources, lambda _: None)
    evaluation.finish()
    assert [path.name for path in job.work.iterdir()] == ["notes.txt"]


def test_a_calibration_beside_the_weights_is_part_of_what_a_result_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(b"weights")
    config = load_profile("compact_s2m", {"scorer.weights": str(weights)})
    before = pipeline_stamp(config)
    assert pipeline_stamp(config) == before
    (tmp_path / "mine.calibration.json").write_text("{}")
    calibrated = pipeline_stamp(config)
    assert calibrated != before
    monkeypatch.setenv("OOD_SEG_WEIGHTS", str(tmp_path))
    assert pipeline_stamp(config) != calibrated


def test_a_folder_that_happens_to_have_a_profiles_name_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_profile("compact_s2m")
    before = pipeline_stamp(config)
    results = tmp_path / "compact_s2m"
    results.mkdir()
    (results / "report.json").write_text("{}")
    assert pipeline_stamp(config) == before
