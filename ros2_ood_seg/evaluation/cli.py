"""``ood-seg evaluate`` and ``ood-seg compare``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ros2_ood_seg.config import PipelineConfig, load_profile, parse_overrides
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation import component, evaluate_bag, pixel
from ros2_ood_seg.evaluation.compare import comparison
from ros2_ood_seg.evaluation.counts import counts_path
from ros2_ood_seg.evaluation.datasets import LAYOUTS, check_external, open_dataset
from ros2_ood_seg.evaluation.evaluate import Evaluation, Options
from ros2_ood_seg.evaluation.job import Job, run_on_ray
from ros2_ood_seg.evaluation.report_page import report_html


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands."""
    parser = subparsers.add_parser("evaluate", help="measure a profile on a data set or a labelled bag")
    parser.add_argument("--dataset", choices=tuple(LAYOUTS), help="layout of the data set (default: folder)")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--profile", default="compact", help="name of a bundled profile or path of a YAML file")
    parser.add_argument("--output", type=Path, required=True, help="report.json to write; report.html appears beside it")
    parser.add_argument("--max-images", type=int, default=0, metavar="N", help="only the first N images")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write score/, refined/ (npy) and instances/ (json) of every image")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the profile; may be repeated")
    parser.add_argument("--weights-dir", help="folder of further weights")
    parser.add_argument(
        "--external", type=Path, metavar="DIR", help="score maps <stem>.npy (bag: <stamp in ns>.npy) for the scorer 'external'"
    )
    parser.add_argument("--fpr-rule", choices=pixel.FPR_RULES, default="ge", help="how fpr95 is read; all rules are in the report")
    parser.add_argument("--track", choices=("auto", *component.TRACKS), default="auto", help="minimum component sizes (SegmentMeIfYouCan)")
    parser.add_argument(
        "--pixel-mode",
        choices=("auto", "exact", "coarse"),
        default="auto",
        help="pool every score, or coarsened ones; exact takes about 20 bytes of disk a pixel and, at the end, 80 of memory for each "
        "distinct score of an anomalous one (default: exact up to 512 million pixels)",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="spread images, or recordings, over N processes, with Ray")
    parser.add_argument("--ray", metavar="ADDRESS", help="with --workers: running Ray cluster ('auto' finds it) instead of this machine")
    evaluate_bag.add_arguments(parser)
    parser.set_defaults(run=run_evaluate)
    parser = subparsers.add_parser("compare", help="compare evaluation reports")
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json", help="the first is what the others are compared with")
    parser.add_argument("--samples", type=int, default=500, help="bootstrap resamplings of the images, 0 for no intervals")
    parser.set_defaults(run=run_compare)


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluates and writes the report.

    Raises:
        InputError: Anything in the arguments or the data that cannot be used.
    """
    if bool(args.root) == bool(args.bag):
        raise InputError("name either --root, the folder of a data set, or --bag, one or several recordings")
    if args.max_images < 0:
        raise InputError(f"--max-images is {args.max_images}, it must be 1 or more, or 0 for all")
    if args.workers < 0:
        raise InputError(f"--workers is {args.workers}, it must be 1 or more, or 0 for this process")
    if args.ray and not args.workers:
        raise InputError("--ray goes with --workers")
    if args.bag and args.dataset:
        raise InputError("--dataset is of data sets, --bag names recordings: leave one out")
    if args.root:
        evaluate_bag.check_unused(args)
    output = checked_output(args.output)
    overrides = parse_overrides(args.set)
    if args.weights_dir:
        overrides["runtime.weights_dir"] = args.weights_dir
    config = load_profile(args.profile, overrides)
    if args.root:
        # Images are not a sequence; tracks would carry over from one to the next.
        config = _with_tracking(config, "tracking.enabled" in overrides and config.tracking.enabled)
    elif "enabled" not in config.tracking.model_fields_set:
        config = _with_tracking(config, True)
    evaluate = _evaluate_bag if args.bag else _evaluate_dataset
    report = evaluate(args, config, output)
    print(summary(report))
    print(f"report: {output}")
    return 0


def _with_tracking(config: PipelineConfig, enabled: bool) -> PipelineConfig:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": enabled})})


def _write(evaluation: Evaluation, output: Path, dataset: str, instance_rule: str) -> dict[str, Any]:
    report, counts = evaluation.report(dataset, instance_rule)
    output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    counts.save(counts_path(output))
    output.with_suffix(".html").write_text(report_html(report, evaluation.picture), encoding="utf-8")
    evaluation.finish()
    return report


def _evaluate_dataset(args: argparse.Namespace, config: PipelineConfig, output: Path) -> dict[str, Any]:
    dataset = open_dataset(args.dataset or "folder", args.root)
    check_external(args.external, config.scorer.name)
    if args.max_images:
        dataset = dataset.head(args.max_images)
    minimum = component.TRACKS[dataset.track if args.track == "auto" else args.track]
    options = Options(args.fpr_rule, minimum, args.save, args.pixel_mode)
    job = Job(dataset, config, output.with_suffix(".parts"), options, args.external)
    evaluation = job.open()
    missing = [source for source in dataset.sources if not evaluation.has(source.name)]
    with tqdm(total=len(dataset), initial=len(dataset) - len(missing), desc=f"{config.profile} on {dataset.name}", unit="image") as bar:
        if args.workers:
            run_on_ray(job, job.parts(missing), args.workers, args.ray, bar.update)
        else:
            job.run(evaluation, missing, bar.update)
    evaluation.order(source.name for source in dataset.sources)
    return _write(evaluation, output, dataset.name, dataset.instance_rule)


def _evaluate_bag(args: argparse.Namespace, config: PipelineConfig, output: Path) -> dict[str, Any]:
    minimum = component.TRACKS["obstacle" if args.track == "auto" else args.track]
    options = Options(args.fpr_rule, minimum, args.save, args.pixel_mode)
    return evaluate_bag.evaluate_bags(args, config, output, options)


def run_compare(args: argparse.Namespace) -> int:
    """Prints a table of reports.

    Raises:
        InputError: Reports that cannot be read, or a negative number of resamplings.
    """
    if args.samples < 0:
        raise InputError(f"--samples is {args.samples}, it must be 0 or more")
    print(comparison(args.reports, args.samples))
    return 0


def checked_output(path: Path) -> Path:
    """Makes the folder of an output file.

    Raises:
        InputError: It cannot be made, the path is a folder itself or does not end in ``.json``.
    """
    if path.is_dir():
        raise InputError(f"--output '{path}' is a folder; name a file, as {path / 'report.json'}")
    if path.suffix != ".json":
        raise InputError(f"--output '{path}' must end in .json: other files of its name are written beside it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output '{path}': the folder cannot be made: {error.strerror}") from error
    return path


def summary(report: dict[str, Any]) -> str:
    """A few lines for the terminal."""

    def show(value: float | None) -> str:
        return "   -  " if value is None else f"{value:6.4f}"

    rows = [
        ("scorer", [("AP", report["pixel"]["ap"]), ("FPR95", report["pixel"]["fpr95"]), ("AuROC", report["pixel"]["auroc"])]),
        ("refined", [("AP", report["refined"]["ap"]), ("FPR95", report["refined"]["fpr95"]), ("AuROC", report["refined"]["auroc"])]),
        (
            "scorer's best",
            [("IoU", report["baseline"]["iou_best"]), ("AuIoU", report["baseline"]["auiou"]), ("mF1", report["baseline"]["mean_f1"])],
        ),
        ("masks (S2M)", [("IoU", report["s2m"]["iou"]), ("AuIoU", report["s2m"]["auiou"]), ("mF1", report["s2m"]["mean_f1"])]),
        ("components", [("sIoU", report["component"]["siou"]), ("PPV", report["component"]["ppv"]), ("F1*", report["component"]["f1"])]),
        ("instances", [("AP", report["instance"]["ap"]), ("AP50", report["instance"]["ap50"])]),
    ]
    lines = [f"{report['profile']} on {report['dataset']}, {report['images']} images"]
    if report["pixel"].get("positives") == 0:
        lines.append("  no pixel is labelled 1 (anomaly), so most figures say nothing; 255 means ignore, masks of 0 and 255 do not fit")
    rows = [(name, values) for name, values in rows if any(value is not None for _, value in values)]
    lines += [f"  {name:<14}" + "   ".join(f"{key:>5} {show(value)}" for key, value in values) for name, values in rows]
    total = report["timings_ms"].get("total")
    if total:
        lines.append(f"  {'time':<14}  p50 {total['p50']:.0f} ms   p95 {total['p95']:.0f} ms an image")
    return "\n".join([*lines, *evaluate_bag.summary_lines(report)])
