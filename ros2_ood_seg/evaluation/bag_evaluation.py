"""Recorded drives, measured one after the other or by several processes: frames, results bag, clips, report."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_messages import COMPRESSED_IMAGE
from ros2_ood_seg.evaluation.bags import BagReader
from ros2_ood_seg.evaluation.clips import ClipFolder, Drive
from ros2_ood_seg.evaluation.counts import counts_path
from ros2_ood_seg.evaluation.datasets import COMPONENT_RULE, labelled_image, read_map
from ros2_ood_seg.evaluation.drive_page import drive_html, unmeasured_report
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options
from ros2_ood_seg.evaluation.events import EventRule, Track, TrackLog
from ros2_ood_seg.evaluation.replayed import Recording, iter_answers, node_figures
from ros2_ood_seg.evaluation.results_bag import INSTANCES_TOPIC, NODE, Answer, ResultsBag, result_messages
from ros2_ood_seg.pipeline import Pipeline


@dataclass
class BagRun:
    """One recording and what became of it.

    Args:
        name: Unique among the recordings of a run.
        path: Recording.
        topic: Full name of its camera topic.
        label_topics: Full names of anomaly and instance labels.
        results: Results bag.
        recorded: Images on the topic.
        frames: Frames with an answer.
        labelled: ... that were measured.
        rejected: Frames that could not be used.
        instances: Found in all frames together.
        problem: First reason why a frame or the rest of the recording could not be used.
        bad_labels: Frames whose labels could not be used.
        label_problem: First reason for that.
        broken: The recording could not be read to its end.
        log: Tracks.
        node: Figures of the running node, realtime only.
        clips: Entries of the clips' index.
        timings_ms: Stages of all frames.
        measured: Names under which the labelled frames were measured.
    """

    name: str
    path: Path
    topic: str
    label_topics: tuple[str, ...]
    results: Path
    recorded: int
    frames: int = 0
    labelled: int = 0
    rejected: int = 0
    instances: int = 0
    problem: str | None = None
    bad_labels: int = 0
    label_problem: str | None = None
    broken: bool = False
    log: TrackLog = field(default_factory=TrackLog)
    node: dict[str, Any] | None = None
    clips: list[dict[str, Any]] = field(default_factory=list)
    timings_ms: dict[str, array[float]] = field(default_factory=dict)
    measured: list[str] = field(default_factory=list)

    def reject(self, reason: str) -> None:
        """Counts a frame that cannot be used."""
        self.rejected += 1
        self.problem = self.problem or reason

    def unlabelled(self, reason: str) -> None:
        """A frame that was counted has labels that cannot be used."""
        self.labelled -= 1
        self.bad_labels += 1
        self.label_problem = self.label_problem or reason

    def count(self, answer: Answer) -> None:
        """Counts a frame that was answered."""
        self.frames += 1
        self.labelled += answer.result is not None and bool(answer.labels)
        self.instances += len(answer.instances)
        self.log.add(answer.image.time_ns, answer.instances)
        for stage, ms in answer.timings_ms.items():
            self.timings_ms.setdefault(stage, array("d")).append(ms)

    def summary(self) -> dict[str, Any]:
        """Plain data for the report."""
        names = ("name", "topic", "recorded", "frames", "labelled", "rejected", "instances", "problem", "node", "clips")
        return {
            "path": str(self.path),
            "results": str(self.results),
            "tracks": len(self.log.tracks),
            **{name: getattr(self, name) for name in names},
        }

    def to_plain(self) -> dict[str, Any]:
        """Everything as plain data, for :meth:`from_plain`."""
        return {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "path": str(self.path),
            "results": str(self.results),
            "log": [asdict(track) for track in self.log.tracks.values()],
            "timings_ms": {stage: list(values) for stage, values in self.timings_ms.items()},
        }

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> BagRun:
        """The recording that :meth:`to_plain` was asked for."""
        log = TrackLog()
        for track in data["log"]:
            log.tracks[track["track_id"]] = Track(**{**track, "best_box_xyxy": tuple(track["best_box_xyxy"])})
        return cls(
            **{
                **data,
                "path": Path(data["path"]),
                "results": Path(data["results"]),
                "label_topics": tuple(data["label_topics"]),
                "log": log,
                "timings_ms": {stage: array("d", values) for stage, values in data["timings_ms"].items()},
            }
        )


def find_bags(
    paths: Sequence[Path], output: Path, image_topic: str | None, label_topics: Sequence[str], results_name: str = ""
) -> list[BagRun]:
    """Opens every recording once, so that nothing runs when one of them cannot be used.

    Args:
        paths: Recordings.
        output: Report; the results bags lie beside it.
        image_topic: Camera, None for the only one.
        label_topics: Anomaly and instance labels.
        results_name: Of the only recording's results bag; empty for that of the report.

    Raises:
        InputError: A bag or topic that is not there or is empty, or a results bag that would replace a recording.
    """
    runs: list[BagRun] = []
    for path in paths:
        with BagReader(path) as bag:
            labels = tuple(bag.image_topic(name).name for name in label_topics)
            topic = bag.image_topic(image_topic, besides=labels)
        if not topic.count:
            raise InputError(f"bag '{path}': topic '{topic.name}' holds no messages")
        name = path.resolve().name if path.is_dir() else path.stem
        while any(run.name == name for run in runs):
            name += "_"
        results = output.with_name((results_name or f"{output.stem}.mcap") if len(paths) == 1 else f"{output.stem}.{name}.mcap")
        if any(results.resolve() == recording.resolve() for recording in paths) or _is_recording(results):
            raise InputError(f"--output '{output}': the results bag '{results}' would replace a recording; choose another name")
        runs.append(BagRun(name, path, topic.name, labels, results, topic.count))
    return runs


def _is_recording(path: Path) -> bool:
    """Whether a file is there that is no results bag: one that cannot be read, or holds more than one camera and what the node says.

    One without any message is what an evaluation leaves that was stopped before its first answer.
    """
    if not path.exists():
        return False
    try:
        with BagReader(path) as bag:
            topics = [topic for topic in bag.topics if topic.count]
    except InputError:
        return True
    others = [topic for topic in topics if not topic.name.startswith(f"{NODE}/")]
    is_results = any(topic.name == INSTANCES_TOPIC for topic in topics) and len(others) <= 1
    return bool(topics) and not (is_results and all(topic.msgtype == COMPRESSED_IMAGE for topic in others))


@dataclass(frozen=True)
class BagJob:
    """The evaluation of recordings as one value, which other processes can take a part of.

    Args:
        config: What is evaluated.
        output: Report; results bags, curves and page lie beside it.
        options: How frames are measured.
        runs: All recordings, as :func:`find_bags` found them.
        external: Folder of score maps ``<stamp in ns>.npy`` for the scorer ``external``, or None.
        most: Stop after so many frames of a recording, 0 for all.
        clips: Folder of event clips, None for none.
        rule: Which tracks are events.
        all_topics: Clips hold every topic.
        pictures: Results bags hold source frames and overlays.
        replayed: How the recordings are replayed through the node, as text; empty when they are not.
    """

    config: PipelineConfig
    output: Path
    options: Options
    runs: tuple[BagRun, ...]
    external: Path | None = None
    most: int = 0
    clips: Path | None = None
    rule: EventRule = field(default_factory=EventRule)
    all_topics: bool = False
    pictures: bool = True
    replayed: str = ""

    @property
    def work(self) -> Path:
        """Folder of what is finished."""
        return self.output.with_suffix(".parts")

    def frames(self, run: BagRun) -> int:
        """How many frames of a recording are wanted, at most."""
        return min(self.most, run.recorded) if self.most else run.recorded

    def fingerprint(self) -> dict[str, Any]:
        """What finished recordings depend on beside the pipeline's settings, code and weights; plain data."""
        results = {run.results.resolve() for run in self.runs}
        how = (self.external, self.most, self.clips, self.all_topics, self.pictures, self.replayed)
        return {
            "recordings": [[run.name, run.topic, *run.label_topics, *_file_stamps(run.path, results)] for run in self.runs],
            "how": [str(value) for value in how],
            "maps": [] if self.external is None else [_stamp(path) for path in sorted(self.external.glob("*.npy"))],
            "rule": vars(self.rule),
        }

    def pixels(self) -> int:
        """Of all frames together when all are as large as the first; 0 when nothing is labelled or readable."""
        first = next((run for run in self.runs if run.label_topics), None)
        if first is None:
            return 0
        try:
            with BagReader(first.path) as bag:
                pixels: int = next(bag.iter_images(first.topic)).rgb()[..., 0].size
        except (InputError, StopIteration):
            return 0
        return sum(map(self.frames, self.runs)) * pixels

    def worker(self) -> Callable[[Sequence[BagRun]], int]:
        """What a process needs that takes some of the recordings: it evaluates them and returns their number of frames.

        Raises:
            InputError: Another process has not opened this job, or settings, weights or folders cannot be used.
        """
        evaluation = BagEvaluation(self, join=True)

        def run_part(runs: Sequence[BagRun]) -> int:
            for run in runs:
                if evaluation.finished(run) is None:
                    evaluation.add(run, evaluation.offline(run))
            return sum(map(self.frames, runs))

        return run_part


class BagEvaluation:
    """Evaluates recordings; what an interrupted run of the same job has finished is not done again.

    Args:
        job: What and how.
        join: Another process has opened the job, and makes the report.

    Raises:
        InputError: The profile cannot run, a folder cannot be used, clips are wanted without tracks, or would replace a recording.
    """

    def __init__(self, job: BagJob, join: bool = False) -> None:
        if job.clips is not None and not job.config.tracking.enabled:
            raise InputError("clips begin where a track begins: they need tracking.enabled=true")
        self.job = job
        self.pipeline = Pipeline.from_config(job.config)
        self._evaluation = Evaluation(self.pipeline, job.work, job.options, job.fingerprint(), job.pixels(), join)
        self._join = join
        self._clips = None
        self._indexed: list[dict[str, Any]] = []
        if job.clips is not None:
            self._clips = ClipFolder(job.clips, join=True)
            if not join:
                done = [self.finished(run) for run in job.runs]
                self._indexed = [clip for run in done if run is not None for clip in run.clips]
                self._clips = ClipFolder(job.clips, self._indexed, drives={run.name: run.path for run in job.runs})
        self._names: set[str] = set()
        self._warm = False
        # On a CPU the work beside the pipeline would slow it down and so spoil its times.
        self._overlap = self.pipeline.runtime.device.type != "cpu"

    def finished(self, run: BagRun) -> BagRun | None:
        """What became of a recording; None when it is not finished or something of it is missing."""
        data = self._evaluation.store.group(run.name)
        done = None if data is None else BagRun.from_plain(data)
        if done is None or not done.results.is_file():
            return None
        clips_there = self._clips is None or all(map(self._clips.has, done.clips))
        return done if clips_there and all(map(self._evaluation.has, done.measured)) else None

    def offline(self, run: BagRun) -> Iterator[Answer]:
        """Every frame of a recording, as the pipeline answers it; frames that cannot be used are counted.

        Args:
            run: The recording.

        Raises:
            InputError: The recording is damaged.
        """
        self.pipeline.reset()
        with BagReader(run.path) as bag:
            for image, labels in bag.iter_frames(run.topic, *run.label_topics):
                external = self.job.external
                try:
                    score_map = None if external is None else read_map(external / f"{image.stamp_ns}.npy")
                    rgb = image.rgb()
                    if not self._warm:
                        self.pipeline.warm_up(*rgb.shape[:2])
                        self._warm = True
                    result = self.pipeline.run(rgb, score_map)
                except InputError as error:
                    run.reject(f"frame {image.stamp_ns}: {error}")
                    continue
                messages = result_messages(result, image, run.frames + 1)
                yield Answer(image, rgb, labels, result.instances.to("cpu"), dict(result.timings_ms), messages, result if labels else None)

    def replayed(self, run: BagRun, recording: Recording, stale_after_s: float) -> Iterator[Answer]:
        """The frames of a recording that the running node answered.

        Args:
            run: The recording.
            recording: The node's answers.
            stale_after_s: See :func:`~ros2_ood_seg.evaluation.replayed.node_figures`.

        Raises:
            InputError: See :func:`~ros2_ood_seg.evaluation.replayed.iter_answers`.
        """
        run.node = node_figures(recording, stale_after_s)
        run.rejected = run.node["frames_rejected"] or 0
        with BagReader(run.path) as bag:
            yield from iter_answers(bag, run.topic, run.label_topics, recording, self.pipeline)

    def add(self, run: BagRun, answers: Iterator[Answer]) -> None:
        """Takes a recording: measures its frames, and writes its results bag and clips.

        When the recording breaks off, all that came before is used, and ``run.problem`` says why.

        Args:
            run: The recording.
            answers: See :meth:`offline` and :meth:`replayed`.

        Raises:
            InputError: A file that cannot be written.
        """
        job, last_ns = self.job, 0
        with (
            ResultsBag(run.results, job.pictures, self._overlap) as results,
            tqdm(total=job.frames(run), desc=f"{self.pipeline.config.profile} on {run.name}", unit="frame") as bar,
        ):
            for answer in _until_broken(answers, run):
                run.count(answer)
                self._measure(run, answer)
                last_ns = answer.image.time_ns
                results.add(answer)
                bar.update()
                if run.frames == job.most:
                    break
        self._evaluation.wait()
        if self._clips is not None:
            drive = Drive(run.name, run.path, run.topic, run.label_topics, run.results)
            run.clips = self._clips.write(drive, run.log.events(job.rule), job.all_topics, last_ns if run.broken else None)
            self._indexed += run.clips
            if not self._join:
                self._clips.save_index(self._indexed)
        self._evaluation.store.save_group(run.name, run.to_plain())

    def _measure(self, run: BagRun, answer: Answer) -> None:
        if answer.result is None or not answer.labels:
            return
        name = f"{run.name}_{answer.image.stamp_ns}" if len(self.job.runs) > 1 else str(answer.image.stamp_ns)
        if name in self._names:
            run.unlabelled(f"label of {run.name} at {answer.image.stamp_ns}: the stamp occurs twice")
            return
        try:
            frame = labelled_image(name, answer.rgb, *(label.labels() for label in answer.labels))
        except InputError as error:
            run.unlabelled(f"label of {run.name} at {answer.image.stamp_ns}: {error}")
            return
        self._evaluation.add_result(frame, answer.result)
        run.measured.append(name)
        self._names.add(name)

    def report(self, runs: Sequence[BagRun], dataset: str, instance_rule: str = COMPONENT_RULE) -> dict[str, Any]:
        """Writes ``report.json`` and ``report.html``.

        Args:
            runs: All recordings.
            dataset: Name for the report.
            instance_rule: Where the ground-truth instances come from.

        Raises:
            InputError: No frame was answered.
        """
        frames = sum(run.frames for run in runs)
        if not frames:
            reasons = [run.problem for run in runs if run.problem]
            self._evaluation.finish()
            raise InputError(reasons[0] if reasons else f"no frame of '{dataset}' was answered")
        config, device = self.pipeline.config, str(self.pipeline.runtime.device)
        measured = [name for run in runs for name in run.measured]
        if not measured:
            stages: dict[str, list[float]] = {}
            for run in runs:
                for stage, values in run.timings_ms.items():
                    stages.setdefault(stage, []).extend(values)
            report = unmeasured_report(dataset, config, device, frames, stages)
        else:
            self._evaluation.order(measured)
            report, counts = self._evaluation.report(dataset, instance_rule)
            counts.save(counts_path(self.job.output))
        if len(runs) == 1 and runs[0].node is not None:
            report["node"] = runs[0].node
        report["drive"] = {
            "frames": frames,
            "rule": vars(self.job.rule),
            "clips": None if self._clips is None else str(self._clips.folder),
            "bags": [run.summary() for run in runs],
        }
        if self._clips is not None:
            self._clips.save_index([clip for run in runs for clip in run.clips])
        output = self.job.output
        output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        page = drive_html(report, self._evaluation.picture if measured else None)
        output.with_suffix(".html").write_text(page, encoding="utf-8")
        self._evaluation.finish()
        return report


def _until_broken(answers: Iterator[Answer], run: BagRun) -> Iterator[Answer]:
    try:
        yield from answers
    except InputError as error:
        run.problem = str(error)
        run.broken = True


def _file_stamps(path: Path, results: Collection[Path]) -> list[str]:
    """Files of a recording by size and time, to notice a change between two runs; ``results`` may lie among them."""
    # Not what an evaluation writes into the folder.
    parts = (item for pattern in ("metadata.yaml", "*.mcap*", "*.db3*") for item in path.glob(pattern) if item.is_file())
    files = [path] if path.is_file() else sorted(item for item in parts if item.resolve() not in results)
    return [_stamp(file) for file in files]


def _stamp(file: Path) -> str:
    return f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
