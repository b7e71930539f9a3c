"""Calibration of scorers whose weights come from elsewhere: a JSON file beside the weights.

One weights file can serve several scorers and score functions, so the file holds one calibration for each, by its key:
``{"rpl/energy": {"raw": [...], "unit": [...]}}``.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import get_args

from ros2_ood_seg.config import ScorerConfig
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.types import Calibration

DEFAULT_RANGES = {
    "msp": (0.0, 1.0),
    "entropy": (0.0, 1.0),
    "energy": (-30.0, 0.0),
    "max_logit": (-30.0, 0.0),
    "hybrid": (-30.0, 0.0),
    "sml": (0.0, 6.0),
    "distance": (0.0, 1024.0),
    "rba": (-1.0, 0.0),
    "rba_tanh": (-1.0, 0.0),
    "eam": (0.0, 1.0),
    "uno": (-1.0, 1.0),
    "mask2anomaly": (0.0, 1.0),
    "likelihood": (-88.6, 11.4),
}
"""Raw scores that count as 0 and 1 without a calibration: bounds where there are any; for logits and energies RPL's -30 to 0; for
standardized max logits 0 to 6 standard deviations; for distances four times the mean of chi-squared with 256 degrees of freedom; for
Mask2Former what a pixel gets that one mask covers with certainty, and that none covers (uno: that a negative one covers); for GMMSeg
a feature at the mean of a component, and one at right angles to it, with 64 dimensions and their least standard deviation of 0.1."""

SELECTABLE = get_args(ScorerConfig.model_fields["score"].annotation)
"""Score functions that the setting ``scorer.score`` names; others are the only one of their scorer."""

_LOG = logging.getLogger(__name__)


def calibration_path(weights: Path) -> Path:
    """Where the calibrations of a weights file are: ``rev3.pth`` has ``rev3.calibration.json`` beside it."""
    return weights.with_suffix(".calibration.json")


def read_calibration(weights: Path, key: str, fallback: Calibration) -> Calibration:
    """The calibration of a scorer, or a stand-in with a warning that says how to make one.

    Args:
        weights: The scorer's weights file.
        key: ``scorer/score``.
        fallback: Used when the file or the key is missing.

    Raises:
        WeightsError: The file is damaged.
    """
    path = calibration_path(weights)
    if path.is_file():
        calibrations = _read(path)
        if key in calibrations:
            return calibrations[key]
    _LOG.warning(
        "no calibration '%s' in %s: raw scores of %g to %g count as 0 to 1 until "
        "'%s' has been run, with the --input-width of the profile",
        key, path, fallback.raw[0], fallback.raw[-1], _command(weights, key),
    )  # fmt: skip
    return fallback


def _command(weights: Path, key: str) -> str:
    """What makes the calibration of a key."""
    scorer, _, score = key.partition("/")
    score, _, temperature = score.partition("@")
    # A folder of transformers is named as a whole.
    named = weights.parent if (weights.parent / "config.json").is_file() else weights
    words = ["ood-seg calibrate", f"--scorer {scorer}", f"--weights {named}", "--images DIR"]
    words += [f"--score {score}"] if score in SELECTABLE else []
    words += [f"--set scorer.temperature={temperature}"] if temperature else []
    return " ".join(words)


def write_calibration(weights: Path, key: str, calibration: Calibration) -> Path:
    """Adds or replaces one calibration beside a weights file.

    Raises:
        WeightsError: The existing file is damaged.
    """
    path = calibration_path(weights)
    calibrations = _read(path) if path.is_file() else {}
    calibrations[key] = calibration
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({name: value.to_dict() for name, value in calibrations.items()}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _read(path: Path) -> dict[str, Calibration]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): Calibration.from_dict(values) for key, values in loaded.items()}
    except (OSError, ValueError, AttributeError) as error:
        reason = error if isinstance(error, InputError) else "no JSON object of calibrations"
        raise WeightsError(f"calibration file '{path}' cannot be read, delete it or calibrate anew: {reason}") from error
