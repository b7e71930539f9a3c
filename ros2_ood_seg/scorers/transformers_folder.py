"""Checkpoints in transformers' format: a folder with ``config.json`` and safetensors. Nothing is fetched from a hub."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.runtime import Runtime
from ros2_ood_seg.weights.store import search_dirs


def find_folder(name: str, runtime: Runtime) -> Path | None:
    """The folder that a weights name or path means, None when it means a file."""
    candidates = [Path(name)] if "/" in name else [Path(name), *(folder / name for folder in search_dirs(runtime.weights_dir))]
    return next((path for path in candidates if (path / "config.json").is_file()), None)


def load_folder(folder: Path, model_class: str, scorer: str, runtime: Runtime) -> Any:
    """The network of a folder, on the runtime's device in evaluation mode.

    Args:
        folder: Holds ``config.json`` and safetensors.
        model_class: Class of transformers, ``Mask2FormerForUniversalSegmentation``.
        scorer: Name for messages.
        runtime: Device.

    Raises:
        InputError: transformers is not installed.
        WeightsError: Unreadable, or entries are missing, left over or of another shape.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"scorer '{scorer}' needs the Python package 'transformers' for the folder '{folder}': pip install transformers"
        ) from error
    try:
        model, report = getattr(transformers, model_class).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"folder '{folder}' holds no {model_class} that transformers can load: {' '.join(str(error).split())}"
        ) from error
    problems = [
        f"{len(report[kind])} {kind.removesuffix('_keys')} ({', '.join(map(str, sorted(report[kind])[:3]))})"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(kind)
    ]
    if problems:
        raise WeightsError(f"folder '{folder}' is not of the family 'transformers {model_class}': {'; '.join(problems)}")
    # Half-precision checkpoints keep their type otherwise, which float32 images do not fit.
    return model.float().to(runtime.device).eval()
