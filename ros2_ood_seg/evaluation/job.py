"""The evaluation of a data set as one value, and how several processes share it or another job."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.datasets import DataSet, Source, read_map
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options, load_frames, source_stamps
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.runtime import Runtime

PART_FRAMES = 8
"""Frames a worker is given at a time."""
RESTARTS = 3
"""So often may a worker die before the evaluation gives up; what is finished stays."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What to evaluate, and how.

    Args:
        dataset: Labelled frames; each is evaluated on its own.
        config: Of the pipeline.
        work: Folder of finished frames.
        options: Of the evaluation.
        external: Folder of score maps ``<stem>.npy`` for the scorer ``external``, or None.
    """

    dataset: DataSet
    config: PipelineConfig
    work: Path
    options: Options
    external: Path | None = None

    def open(self, join: bool = False) -> Evaluation:
        """Loads the pipeline and finds what is finished.

        Args:
            join: Another process has opened the job: nothing of its folder is thrown away.

        Raises:
            InputError: Settings, weights or the folder cannot be used.
        """
        fingerprint = {"dataset": [self.dataset.name, str(self.dataset.root)], "external": str(self.external or "")}
        pixels = self.dataset.pixels()
        evaluation = Evaluation(Pipeline.from_config(self.config), self.work, self.options, fingerprint, pixels, join)
        if not join:
            evaluation.store.keep(source_stamps(self.dataset, self.external))
        return evaluation

    def run(self, evaluation: Evaluation, sources: Sequence[Source], done: Callable[[int], object]) -> None:
        """Evaluates some frames in this process.

        Args:
            evaluation: Of :meth:`open`.
            sources: Which.
            done: Told the number of frames that were finished since it was last told.

        Raises:
            InputError: A frame that cannot be used; those before it are finished.
        """
        for frame, load_ms in load_frames(self.dataset, sources, evaluation.overlap):
            scores = None if self.external is None else read_map(self.external / f"{frame.name}.npy")
            evaluation.add(frame, scores, load_ms)
            done(1)
        evaluation.wait()

    def worker(self) -> Callable[[Sequence[Source]], int]:
        """See :class:`SharedJob`; a part is a sequence of sources."""
        evaluation = self.open(join=True)

        def run_part(sources: Sequence[Source]) -> int:
            self.run(evaluation, [source for source in sources if not evaluation.has(source.name)], lambda count: None)
            return len(sources)

        return run_part

    @staticmethod
    def parts(sources: Sequence[Source]) -> list[Sequence[Source]]:
        """Sources as workers are given them."""
        return [sources[k : k + PART_FRAMES] for k in range(0, len(sources), PART_FRAMES)]


class SharedJob(Protocol):
    """A job of which other processes can take parts."""

    @property
    def config(self) -> PipelineConfig:
        """Of the pipeline."""

    @property
    def work(self) -> Path:
        """Folder of what is finished, made by the process that makes the report."""

    def worker(self) -> Callable[[Any], int]:
        """What a process needs that takes parts: given one, it does what of it is not finished, and returns the part's frames.

        Raises:
            InputError: The job cannot be joined, or a part cannot be used.
        """


class Worker:
    """Does parts of a job in a process of its own; what is finished lies in the job's folder.

    Args:
        job: Whose folder and files are visible to this process under the same paths.
        folder: Current folder, which relative paths begin at.
    """

    def __init__(self, job: SharedJob, folder: Path | None = None) -> None:
        if folder is not None:
            os.chdir(folder)
        self._job = job
        self._run: Callable[[Any], int] | None = None

    def run(self, part: Any) -> int:
        """Does what is not finished of a part, which is everything unless a worker died in the middle of it.

        Returns:
            The number of frames of the part.

        Raises:
            InputError: See :meth:`SharedJob.worker`.
        """
        if self._run is None:
            self._run = self._job.worker()
        return self._run(part)


def run_on_ray(job: SharedJob, parts: Sequence[Any], workers: int, address: str | None, done: Callable[[int], object]) -> None:
    """Does the parts of a job in several processes, on this machine or on the machines of a Ray cluster.

    A worker that dies is started again and its part is given out again; what it had finished is not done twice.

    Args:
        job: Opened by the caller, who makes the report.
        parts: As the job's workers take them.
        workers: Processes, at most as many as there are CPUs; on a GPU, each has one of its own.
        address: Of a running cluster; None starts Ray on this machine.
        done: Told the number of frames that were finished since it was last told.

    Raises:
        InputError: Ray is missing, not reachable or has no GPU for a worker, a part cannot be used, or workers keep dying.
    """
    ray = _import_ray()
    if not parts:
        return
    gpus = _gpus(job)
    importlib.import_module("ray.util")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"Ray at '{address or 'this machine'}' cannot be reached: {error}") from error
    try:
        # A worker for which there is no room would wait for ever, and with it the part it is given.
        room, wanted = _room(ray.cluster_resources(), gpus), min(workers, len(parts))
        if room < 1:
            raise InputError(f"Ray at '{address or 'this machine'}' has no {'GPU' if gpus else 'CPU'} for a worker")
        if room < wanted:
            _LOG.warning("Ray has room for %d of %d workers, each with a CPU%s", room, wanted, " and a GPU" if gpus else "")
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Worker)
        pool = ray.util.ActorPool([actor.remote(job, Path.cwd()) for _ in range(min(wanted, room))])
        for count in pool.map_unordered(lambda worker, part: worker.run.remote(part), parts):
            done(count)
    except ray.exceptions.RayTaskError as error:
        raise InputError(str(error.cause)) from error
    except ray.exceptions.RayActorError as error:
        raise InputError(f"a worker died {RESTARTS + 1} times; what is finished stays in '{job.work}': {error}") from error
    finally:
        ray.shutdown()


def _gpus(job: SharedJob) -> int:
    """GPUs of a worker, which sees no others."""
    device = Runtime.from_config(job.config.runtime).device
    if device.index:
        raise InputError(f"runtime.device is '{device}' but each of the workers has a GPU of its own: use 'cuda'")
    return int(device.type == "cuda")


def _room(resources: Mapping[str, float], gpus: int) -> int:
    """How many workers can run at a time, each with a CPU and ``gpus`` GPUs."""
    cpus = int(resources.get("CPU", 0))
    return min(cpus, int(resources.get("GPU", 0)) // gpus) if gpus else cpus


def _import_ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError("--workers needs Ray: pip install 'ray>=2.9'") from error
