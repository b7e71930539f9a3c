"""Recorded drives, measured one after the other: frames, results bag, clips, report."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bags import BagReader
from ros2_ood_seg.evaluation.clips import ClipFolder, Drive
from ros2_ood_seg.evaluation.counts import counts_path
from ros2_ood_seg.evaluation.datasets import COMPONENT_RULE, labelled_image
from ros2_ood_seg.evaluation.drive_page import drive_html, unmeasured_report
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options
from ros2_ood_seg.evaluation.events import EventRule, TrackLog
from ros2_ood_seg.evaluation.replayed import Recording, iter_answers, node_figures
from ros2_ood_seg.evaluation.results_bag import Answer, ResultsBag, result_messages
from ros2_ood_seg.pipeline import Pipeline

External = Callable[[str], "NDArray[np.float32] | None"]


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
        broken: The recording could not be read to its end.
        log: Tracks.
        node: Figures of the running node, realtime only.
        clips: Entries of the clips' index.
        timings_ms: Stages of all frames.
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
    broken: bool = False
    log: TrackLog = field(default_factory=TrackLog)
    node: dict[str, Any] | None = None
    clips: list[dict[str, Any]] = field(default_factory=list)
    timings_ms: dict[str, array[float]] = field(default_factory=dict)

    def reject(self, reason: str) -> None:
        """Counts a frame that cannot be used."""
        self.rejected += 1
        self.problem = self.problem or reason

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


def find_bags(paths: Sequence[Path], output: Path, image_topic: str | None, label_topics: Sequence[str]) -> list[BagRun]:
    """Opens every recording once, so that nothing runs when one of them cannot be used.

    Args:
        paths: Recordings.
        output: Report; the results bags lie beside it.
        image_topic: Camera, None for the only one.
        label_topics: Anomaly and instance labels.

    Raises:
        InputError: A bag or topic that is not there or is empty.
    """
    runs: list[BagRun] = []
    for path in paths:
        with BagReader(path) as bag:
            labels = tuple(bag.image_topic(name).name for name in label_topics)
            topic = bag.image_topic(image_topic, besides=labels)
        if not topic.count:
            raise InputError(f"bag '{path}': topic '{topic.name}' holds no messages")
        name = path.stem
        while any(run.name == name for run in runs):
            name += "_"
        results = output.with_suffix(".mcap") if len(paths) == 1 else output.with_name(f"{output.stem}.{name}.mcap")
        if results.resolve() == path.resolve():
            raise InputError(f"--output '{output}': the results bag '{results}' would replace the recording; choose another name")
        runs.append(BagRun(name, path, topic.name, labels, results, topic.count))
    return runs


class BagEvaluation:
    """Evaluates recordings one after the other.

    Args:
        config: What is evaluated.
        output: Report; results bags, curves and page lie beside it.
        options: How frames are measured.
        clips: Folder of event clips, None for none.
        rule: Which tracks are events.
        all_topics: Clips hold every topic.
        pictures: Results bags hold source frames and overlays.

    Raises:
        InputError: The profile cannot run, or clips are wanted without tracks.
    """

    def __init__(
        self,
        config: PipelineConfig,
        output: Path,
        options: Options,
        *,
        clips: Path | None = None,
        rule: EventRule | None = None,
        all_topics: bool = False,
        pictures: bool = True,
    ) -> None:
        if clips is not None and not config.tracking.enabled:
            raise InputError("clips begin where a track begins: they need tracking.enabled=true")
        self.output = output
        self.pipeline = Pipeline.from_config(config)
        self._options = options
        self._clips = None if clips is None else ClipFolder(clips)
        self._rule = rule or EventRule()
        self._all_topics = all_topics
        self._pictures = pictures
        self._evaluation: Evaluation | None = None
        self._warm = False
        # On a CPU the work beside the pipeline would slow it down and so spoil its times.
        self._overlap = self.pipeline.runtime.device.type != "cpu"

    def offline(self, run: BagRun, external: External = lambda _: None) -> Iterator[Answer]:
        """Every frame of a recording, as the pipeline answers it; frames that cannot be used are counted.

        Args:
            run: The recording.
            external: Score map by frame name, for the scorer ``external``.

        Raises:
            InputError: The recording is damaged.
        """
        self.pipeline.reset()
        with BagReader(run.path) as bag:
            for image, labels in bag.iter_frames(run.topic, *run.label_topics):
                score_map = external(str(image.stamp_ns))
                try:
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

    def add(self, run: BagRun, answers: Iterator[Answer], most: int = 0, several: bool = False) -> None:
        """Takes a recording: measures its frames, and writes its results bag and clips.

        When the recording breaks off, all that came before is used, and ``run.problem`` says why.

        Args:
            run: The recording.
            answers: See :meth:`offline` and :meth:`replayed`.
            most: Stop after so many frames, 0 for all.
            several: There are other recordings: frame names begin with the recording's.

        Raises:
            InputError: Labels that cannot be used, or a file that cannot be written.
        """
        total = min(most, run.recorded) if most else run.recorded
        with (
            ResultsBag(run.results, self._pictures, self._overlap) as results,
            tqdm(total=total, desc=f"{self.pipeline.config.profile} on {run.name}", unit="frame") as bar,
        ):
            for answer in _until_broken(answers, run):
                self._measure(run, answer, several)
                run.count(answer)
                results.add(answer)
                bar.update()
                if run.frames == most:
                    break
        if self._clips is not None:
            drive = Drive(run.name, run.path, run.topic, run.label_topics, run.results)
            run.clips = self._clips.write(drive, run.log.events(self._rule), self._all_topics)

    def _measure(self, run: BagRun, answer: Answer, several: bool) -> None:
        if answer.result is None or not answer.labels:
            return
        name = f"{run.name}_{answer.image.stamp_ns}" if several else str(answer.image.stamp_ns)
        frame = labelled_image(name, answer.rgb, *(label.labels() for label in answer.labels))
        if self._evaluation is None:
            # Tracks depend on all frames before, so nothing of an earlier run is used again.
            self._evaluation = Evaluation(
                self.pipeline, self.output.with_suffix(".parts"), self._options, {"started": time.time()}, run.recorded * frame.label.size
            )
        self._evaluation.add_result(frame, answer.result)

    def report(self, runs: Sequence[BagRun], dataset: str, instance_rule: str = COMPONENT_RULE) -> dict[str, Any]:
        """Writes ``report.json`` and ``report.html``.

        Args:
            runs: All recordings.
            dataset: Name for the report.
            instance_rule: Where the ground-truth instances come from.

        Raises:
            InputError: No frame was answered, or there are labels and none of them has the stamp of an image.
        """
        frames = sum(run.frames for run in runs)
        if not frames:
            reasons = [run.problem for run in runs if run.problem]
            raise InputError(reasons[0] if reasons else f"no frame of '{dataset}' was answered")
        config, device = self.pipeline.config, str(self.pipeline.runtime.device)
        if self._evaluation is None:
            stages: dict[str, list[float]] = {}
            for run in runs:
                for stage, values in run.timings_ms.items():
                    stages.setdefault(stage, []).extend(values)
            report = unmeasured_report(dataset, config, device, frames, stages)
        else:
            report, counts = self._evaluation.report(dataset, instance_rule)
            counts.save(counts_path(self.output))
        if len(runs) == 1 and runs[0].node is not None:
            report["node"] = runs[0].node
        report["drive"] = {
            "frames": frames,
            "rule": vars(self._rule),
            "clips": None if self._clips is None else str(self._clips.folder),
            "bags": [run.summary() for run in runs],
        }
        self.output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        picture = None if self._evaluation is None else self._evaluation.picture
        self.output.with_suffix(".html").write_text(drive_html(report, picture), encoding="utf-8")
        if self._evaluation is not None:
            self._evaluation.finish()
        return report


def _until_broken(answers: Iterator[Answer], run: BagRun) -> Iterator[Answer]:
    try:
        yield from answers
    except InputError as error:
        run.problem = str(error)
        run.broken = True
