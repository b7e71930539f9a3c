"""The ``ood-seg`` command."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from ros2_ood_seg import __version__
from ros2_ood_seg.errors import InputError, ProcessError, os_error_text

# Command to the module whose register(subparsers) adds it; only the chosen one is imported, so --help is instant.
COMMANDS = {
    "segment": ("ros2_ood_seg.segment", "find anomalies in images, folders, videos and bags"),
    "evaluate": ("ros2_ood_seg.evaluation.cli", "measure a profile on a data set or a labelled bag"),
    "compare": ("ros2_ood_seg.evaluation.cli", "compare evaluation reports"),
    "submission": ("ros2_ood_seg.evaluation.submission", "write results for the SegmentMeIfYouCan or OoDIS benchmark"),
    "train": ("ros2_ood_seg.training.cli", "train scorer, prompt generator or segmenter"),
    "ablate": ("ros2_ood_seg.training.ablate", "measure what each stage of a method contributes"),
    "calibrate": ("ros2_ood_seg.training.cli", "calibrate a scorer on in-distribution frames"),
    "false-alarms": ("ros2_ood_seg.training.false_alarms", "measure a profile on frames without anomalies"),
    "weights": ("ros2_ood_seg.weights.manifest", "list, download or verify weights files"),
    "export": ("ros2_ood_seg.export", "write a network as ONNX"),
    "bench": ("ros2_ood_seg.bench", "measure speed"),
    "settings": ("ros2_ood_seg.settings_command", "show profiles and every setting with its range"),
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The argument parser.

    Args:
        command: The sub-command whose module is loaded; the others are only named.
    """
    parser = argparse.ArgumentParser(prog="ood-seg", description="Finds what a vehicle's segmentation network was never trained on.")
    parser.add_argument("--version", action="version", version=f"ros2_ood_seg {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = COMMANDS[command][0] if command in COMMANDS else None
    for name, (module, text) in COMMANDS.items():
        if module != chosen:
            subparsers.add_parser(name, help=text)
    if chosen is not None:
        importlib.import_module(chosen).register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0 on success, 1 when another process failed, 2 when the input cannot be used, 130 after an interrupt.
    """
    if argv is None:
        # Like an interrupt, so that processes that were started end, too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    try:
        code = int(args.run(args))
        # Here and not at exit, where nobody could tell that the reader has gone.
        sys.stdout.flush()
        return code
    except (InputError, ProcessError) as error:
        print(f"ood-seg: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:
        # Whoever read the output has enough; what is still buffered must not fail at exit, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"ood-seg: {os_error_text(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
