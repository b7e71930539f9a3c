"""``ood-seg evaluate --bag``: what a profile finds, misses and invents on recorded drives, offline or through the running node."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_evaluation import BagEvaluation, BagJob, BagRun, find_bags
from ros2_ood_seg.evaluation.datasets import COMPONENT_RULE, check_external
from ros2_ood_seg.evaluation.evaluate import Options
from ros2_ood_seg.evaluation.events import EventRule
from ros2_ood_seg.evaluation.job import run_on_ray
from ros2_ood_seg.evaluation.replayed import Recording


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only concerns bags."""
    group = parser.add_argument_group("recordings")
    group.add_argument("--bag", nargs="+", type=Path, help="recordings (rosbag2: MCAP or sqlite3) to evaluate instead of a data set")
    group.add_argument("--image-topic", help="camera topic; may be left out when there is one")
    group.add_argument("--label-topic", help="label topic, matched by stamp: 0 normal, 1 anomaly, 255 ignore; without it nothing is scored")
    group.add_argument("--instance-topic", help="instance label topic: 0 none, k = instance")
    group.add_argument(
        "--realtime",
        nargs="?",
        type=float,
        const=1.0,
        metavar="RATE",
        help="replay through the running node at RATE times the recorded speed (default 1), and measure latency, drops and stale output",
    )
    group.add_argument(
        "--stale-after", type=float, default=0.3, metavar="S", help="realtime: older instances are stale (default: %(default)s s)"
    )
    group.add_argument(
        "--results",
        choices=("full", "messages"),
        default="full",
        help="what the results bag beside the report holds: source frames, overlays and messages, or messages only (default: %(default)s)",
    )
    group.add_argument("--clips", type=Path, metavar="DIR", help="write the seconds around each new anomaly track as a bag and a picture")
    rule = EventRule()
    group.add_argument("--clip-before", type=float, default=rule.before_s, metavar="S", help="(default: %(default)s s)")
    group.add_argument("--clip-after", type=float, default=rule.after_s, metavar="S", help="(default: %(default)s s)")
    group.add_argument("--clip-min-score", type=float, default=rule.min_score, metavar="P", help="of the track (default: %(default)s)")
    group.add_argument("--clip-min-frames", type=int, default=rule.min_frames, metavar="N", help="of the track (default: %(default)s)")
    group.add_argument("--clip-all-topics", action="store_true", help="clips hold every topic, not only camera, labels and results")


def check_unused(args: argparse.Namespace) -> None:
    """Looks for arguments that mean nothing without recordings.

    Raises:
        InputError: One is given.
    """
    for name in _given(args):
        raise InputError(f"{_flag(name)} is of recordings (--bag), --root names a data set: leave one out")


def _given(args: argparse.Namespace) -> list[str]:
    """The arguments of recordings that differ from their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return [name for name, default in vars(parser.parse_args([])).items() if getattr(args, name) != default]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def evaluate_bags(args: argparse.Namespace, config: PipelineConfig, output: Path, options: Options) -> dict[str, Any]:
    """Evaluates the recordings of the command line and writes the report.

    Args:
        args: See :func:`add_arguments`, with ``external``, ``max_images``, ``workers`` and ``ray``.
        config: What is evaluated.
        output: Report.
        options: How frames are measured.

    Raises:
        InputError: An argument or a recording that cannot be used; of a recording that breaks off, the report has what came before.
    """
    if args.save and not args.label_topic:
        raise InputError("--save writes what was measured: name --label-topic; the results bag has all frames")
    if args.instance_topic and not args.label_topic:
        raise InputError("--instance-topic needs --label-topic")
    for name in _given(args):
        if args.clips is None and name.startswith("clip_"):
            raise InputError(f"{_flag(name)} goes with --clips")
        if args.realtime is None and name == "stale_after":
            raise InputError(f"{_flag(name)} goes with --realtime")
    labels = [topic for topic in (args.label_topic, args.instance_topic) if topic]
    rule = EventRule(args.clip_before, args.clip_after, args.clip_min_score, args.clip_min_frames)
    replay = None if args.realtime is None else _checked_replay(args, config)
    job = BagJob(
        config,
        output,
        options,
        tuple(find_bags(args.bag, output, args.image_topic, labels)),
        external=args.external,
        most=args.max_images,
        clips=args.clips,
        rule=rule,
        all_topics=args.clip_all_topics,
        pictures=args.results == "full",
        replayed="" if replay is None else f"{args.realtime} {args.stale_after}",
    )
    check_external(args.external, config.scorer.name)
    evaluation = BagEvaluation(job)
    missing = [run for run in job.runs if evaluation.finished(run) is None]
    if len(missing) < len(job.runs):
        print(f"{len(job.runs) - len(missing)} of {len(job.runs)} recordings were finished by an earlier run", file=sys.stderr)
    if args.workers:
        with tqdm(total=sum(map(job.frames, missing)), desc=f"{config.profile} on {len(missing)} recordings", unit="frame") as bar:
            run_on_ray(job, [[run] for run in missing], args.workers, args.ray, bar.update)
    for run in () if args.workers else missing:
        if replay is None:
            evaluation.add(run, evaluation.offline(run))
        else:
            folder = output.with_suffix(".replay")
            with replay(run.path, run.topic, config, folder, rate=args.realtime, maps=bool(labels), most=args.max_images) as recording:
                evaluation.add(run, evaluation.replayed(run, recording, args.stale_after))
    done = [evaluation.finished(run) or run for run in job.runs]
    dataset = done[0].path.resolve().name if len(done) == 1 else f"{len(done)} recordings"
    report = evaluation.report(done, dataset, f"topic {args.instance_topic}" if args.instance_topic else COMPONENT_RULE)
    _explain(done, bool(labels))
    return report


def summary_lines(report: dict[str, Any]) -> list[str]:
    """What a report says about drives, for the terminal; nothing when it is about a data set."""
    lines = []
    for bag in report.get("drive", {}).get("bags", ()):
        clips = f", {len(bag['clips'])} clips" if report["drive"]["clips"] else ""
        lines.append(f"  {bag['name']:<14}  {bag['instances']} instances, {bag['tracks']} tracks in {bag['frames']} frames{clips}")
        node = bag["node"]
        if node is not None and node["latency_ms"] is not None:
            latency = "   ".join(f"{key} {node['latency_ms'][key]:.0f}" for key in ("p50", "p90", "p99"))
            stale = "-" if node["stale"]["rate"] is None else f"{node['stale']['rate']:.1%}"
            lines.append(f"  {'node':<14}  latency {latency} ms   dropped {node['drop_rate']:.1%}   stale {stale}")
        lines.append(f"  {'results':<14}  {bag['results']}")
    return lines


def _checked_replay(args: argparse.Namespace, config: PipelineConfig) -> Callable[..., AbstractContextManager[Recording]]:
    """The function that replays a recording through the node; it belongs to ros/, which not every home has.

    Raises:
        InputError: No ROS, or settings that cannot be replayed.
    """
    if args.workers:
        raise InputError("--realtime measures one node on this machine: leave --workers out")
    if not args.realtime > 0.0:
        raise InputError(f"--realtime is {args.realtime:g}, it must be above 0")
    if not args.stale_after > 0.0:
        raise InputError(f"--stale-after is {args.stale_after:g}, it must be above 0 s")
    if config.scorer.name == "external":
        raise InputError("--realtime replays images only: the scorer 'external' would wait for its score maps")
    if find_spec("rclpy") is None or find_spec("ros2_ood_seg.msg") is None:
        raise InputError("--realtime needs rclpy and the built messages: use 'make env' and '. ./env.sh', or source your ROS 2")
    replay: Callable[..., AbstractContextManager[Recording]] = importlib.import_module("ros2_ood_seg.ros.replay").replay
    return replay


def _explain(runs: Sequence[BagRun], asked_for_labels: bool) -> None:
    """Says what could not be used.

    Raises:
        InputError: Recordings broke off, or labels were asked for and no frame had any.
    """
    broken = [f"{run.problem}; the report holds the {run.frames} frames before" for run in runs if run.broken]
    for run in runs:
        # The problem of a broken one is why it broke off, which is said below.
        if run.rejected and not run.broken:
            print(
                f"{run.name}: {run.rejected} frames could not be used, the first: {run.problem or 'see the log of the node'}",
                file=sys.stderr,
            )
        if run.bad_labels:
            print(f"{run.bad_labels} labels could not be used, the first: {run.label_problem}", file=sys.stderr)
    if broken:
        raise InputError("; ".join(broken))
    if asked_for_labels and not any(run.labelled for run in runs):
        run = runs[0]
        if run.label_problem:
            raise InputError(f"no label could be used; the report holds what needs none; the first: {run.label_problem}")
        raise InputError(
            f"bag '{run.path}': no answered image of '{run.topic}' has the same stamp as a label of {', '.join(run.label_topics)}; "
            "the report holds what needs no labels"
        )
