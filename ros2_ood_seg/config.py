"""One typed tree of settings. Profiles (``config/*.yaml``), command-line overrides and ROS parameters all fill it.

Every leaf is a bool, int, float or str with a description and, where it makes sense, a range or a set of choices, so that it
maps one to one to a ROS parameter (``prompts.points.count``) and to ``--set prompts.points.count=100``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from pydantic.fields import FieldInfo

from ros2_ood_seg.errors import InputError

Leaf = bool | int | float | str


_FILE: dict[str, JsonValue] = {"names_file": True}


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class ScorerConfig(_Settings):
    """Image to score map."""

    name: str = Field("compact", description="Registered scorer: the network, or 'external' for a map that comes from elsewhere")
    score: Literal["default", "msp", "entropy", "energy", "max_logit", "outlier", "rba_tanh"] = Field(
        "default",
        description="Score function on the network's outputs; 'default' is the one the weights were trained and calibrated for; "
        "'rba_tanh' is RbA with bounded classes, as in its own code",
    )
    temperature: float = Field(1.0, gt=0.0, le=1000.0, description="T of the energy score -T*logsumexp(f/T) (S2M Eq. 2)")
    weights: str = Field("", description="Weights file, or a name of the manifest; empty takes the scorer's own", json_schema_extra=_FILE)
    input_width: int = Field(
        1152,
        ge=0,
        le=8192,
        description="Images are resized to this width (px, 64 or more) before the network, keeping their shape (compact: up to whole "
        "strides of 32 px, others are padded with 0); 0 for their own width",
        json_schema_extra={"allowed": "0, or a whole number from 64 to 8192"},
    )
    coarse_scale: float = Field(
        0.25,
        gt=0.0,
        le=1.0,
        description="compact: the network also looks at this multiple of input_width, for what is near and large, and the logits are "
        "averaged; 1 for no such look",
    )
    second_scale: float = Field(
        0.5,
        ge=0.125,
        le=4.0,
        description="compact: the same at a third multiple, above 1 for what is small and far; 1 for no such look",
    )
    zoom: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="compact: in images wider than 1.25 times the widest look, one more in the camera's own pixels, no wider than that "
        "look, where the road ends: a window of this share of the width, in which the greater score counts; 0 for no such look",
    )
    statistics: str = Field(
        "",
        description="mahalanobis, sml: file of in-distribution statistics; empty looks for <weights>.statistics.* beside the weights",
        json_schema_extra=_FILE,
    )
    smoothing_px: int = Field(
        0,
        ge=0,
        le=63,
        description="Odd kernel size of a Gaussian blur of the score map, 1 for none, 0 for the scorer's own (pebal, rpl: 7 with sigma 1)",
        json_schema_extra={"allowed": "0, or an odd number up to 63"},
    )
    external_low: float = Field(0.0, description="Scorer 'external': the raw value that is calibrated to 0")
    external_high: float = Field(1.0, description="Scorer 'external': the raw value that is calibrated to 1")

    @field_validator("input_width")
    @classmethod
    def _wide_enough(cls, value: int) -> int:
        if 0 < value < 64:
            raise ValueError(f"{value} px is too narrow")
        return value

    @field_validator("smoothing_px")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value and value % 2 == 0:
            raise ValueError(f"{value} px has no middle")
        return value


class BoxPromptsConfig(_Settings):
    """Score map to boxes (S2M)."""

    method: str = Field("none", description="Registered box prompt generator, or 'none'")
    threshold: float = Field(0.5, ge=0.0, le=1.0, description="components: calibrated score above which a pixel belongs to a component")
    min_area_px: int = Field(50, ge=1, le=10_000_000, description="components: smaller ones are dropped, px of the input image")
    margin: float = Field(0.0, ge=0.0, le=1.0, description="Boxes are widened on each side by this fraction of their size")
    max_boxes: int = Field(100, ge=1, le=1000, description="Only the most confident boxes are kept (detectron2: 100)")
    min_confidence: float = Field(0.05, ge=0.0, le=1.0, description="Less confident boxes are dropped (S2M: 0.05)")
    weights: str = Field(
        "", description="faster_rcnn, compact_rcnn: weights file or manifest name; empty takes the method's own", json_schema_extra=_FILE
    )
    input_mode: Literal["auto", "raw", "calibrated"] = Field(
        "auto", description="faster_rcnn, compact_rcnn: scores fed to the detector; 'auto' is what its weights were trained on"
    )
    input_width: int = Field(
        0,
        ge=0,
        le=8192,
        description="faster_rcnn, compact_rcnn: score maps are resized to this width (px), 0 for what the weights were trained on",
    )
    zoom: float = Field(
        0.33,
        ge=0.0,
        le=1.0,
        description="compact_rcnn: where the scorer says where the road ends, look again at a window there of this share of the width, "
        "for small and far objects; where that would enlarge the map, at more of it; 0 for no such look",
    )
    tiles: int = Field(
        1, ge=1, le=4, description="faster_rcnn, compact_rcnn: look again at N x N overlapping tiles, enlarged, for small and far objects"
    )


class PointPromptsConfig(_Settings):
    """Score map to points (UGainS)."""

    method: str = Field("none", description="Registered point prompt generator, or 'none'")
    threshold: float = Field(0.5, ge=0.0, le=1.0, description="Calibrated score from which a pixel is a candidate")
    use_raw_threshold: bool = Field(False, description="Compare raw scores with raw_threshold instead of calibrated ones with threshold")
    raw_threshold: float = Field(-0.15, description="Raw score from which a pixel is a candidate (UGainS on RbA: -0.15)")
    count: int = Field(50, ge=1, le=1024, description="Points sampled per frame (UGainS: 50)")
    min_candidates: int = Field(1, ge=1, le=10_000_000, description="With fewer candidate pixels there are no points at all")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the random and k-means samplers; every frame starts from it")
    grid_side: int = Field(32, ge=1, le=128, description="grid: points per image side (SAM's automatic masks: 32), whatever the scores say")


class PromptsConfig(_Settings):
    """Score map to prompts; both kinds may be on (hybrid)."""

    boxes: BoxPromptsConfig = BoxPromptsConfig()
    points: PointPromptsConfig = PointPromptsConfig()


class SegmenterConfig(_Settings):
    """Image and prompts to masks."""

    name: str = Field("compact", description="Registered promptable segmenter")
    model: Literal["vit_b", "vit_l", "vit_h"] = Field("vit_b", description="sam: image encoder size (S2M: vit_b, UGainS: vit_h)")
    weights: str = Field("", description="Weights file or manifest name; empty takes the segmenter's own", json_schema_extra=_FILE)
    batch_size: int = Field(64, ge=1, le=1024, description="Prompts per decoder call; a frame with more takes several calls")
    encoder_width: int = Field(
        0, ge=0, le=8192, description="sam: shrink the image to this width before the encoder (UGainS: 1024), 0 for the full image"
    )
    iterations: int = Field(1, ge=1, le=20, description="grabcut: iterations of the graph cut")
    working_px: int = Field(
        96, ge=32, le=1024, description="grabcut: longest side of the window that is cut, px; larger boxes are shrunk to it"
    )
    point_radius: float = Field(
        0.25, gt=0.0, le=0.5, description="grabcut: a point prompt looks at a window of this half-size, as a fraction of the image height"
    )


class FusionConfig(_Settings):
    """Masks and scores to instances and a refined score map."""

    name: str = Field("ugains", description="Registered fusion: 's2m', 'ugains' or 'hybrid'")
    nms_iou: float = Field(
        0.7, gt=0.0, le=1.0, description="ugains, hybrid: a mask is dropped when its IoU with a better one is above this (UGainS: 0.7)"
    )
    compat: Literal["paper", "code"] = Field(
        "paper", description="s2m: overlaps take the lowest confidence ('paper') or the last mask in detector order ('code')"
    )
    merge_overlap: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="s2m: masks whose overlap covers this fraction of the smaller one become one instance; "
        "hybrid: a box's mask joins a better box's that covers this fraction of it",
    )
    floor: Literal["calibration", "value"] = Field(
        "calibration",
        description="ugains, hybrid: the best mask adds what it scores above the raw score at floor_unit, times its predicted IoU "
        "('calibration'), or all masks add their score, and pixels outside them get floor_value ('value', as published)",
    )
    floor_unit: float = Field(0.0, ge=0.0, le=1.0, description="ugains, hybrid: calibrated score from which masks count in the ensemble")
    floor_value: float = Field(-1.0, description="ugains, hybrid: see floor (UGainS on RbA: -1)")
    box_weight: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="s2m, hybrid: weight of the box confidence in an instance's score; the rest is the calibrated score inside (S2M: 1)",
    )
    inside_quantile: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="What stands for the scores inside a mask in its instance's score: 0 takes their mean, as published; 0.9 the one that "
        "a tenth of its pixels exceed, because the scorer sees large objects in parts",
    )
    quality_power: float = Field(
        0.0,
        ge=0.0,
        le=4.0,
        description="Instance scores are multiplied by the mask's predicted IoU to this power: 0 as published, 1 as in Mask Scoring R-CNN",
    )
    nms_containment: float = Field(
        0.6,
        gt=0.0,
        le=1.0,
        description="ugains, hybrid: a mask is no instance of its own when a better one covers more than this share of it (UGainS: 1)",
    )
    ignore_overlap_px: int = Field(
        100, ge=1, le=10_000_000, description="A mask with this many pixels on the ignore mask is dropped (UGainS: 100)"
    )
    min_area_px: int = Field(1, ge=1, le=10_000_000, description="Smaller instances are dropped, px of the input image")
    half_score: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="What is reported as an instance score of 0.5; below and above it scores are scaled linearly. 'ood-seg false-alarms' "
        "says which value leaves one instance above 0.5 in 20 ordinary frames",
    )
    min_score: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Masks with a lower reported score (see half_score) are no instances; S2M leaves them out of its map, too",
    )


class TrackingConfig(_Settings):
    """Instances over time."""

    enabled: bool = Field(False, description="Give instances of consecutive frames a common track_id")
    iou: float = Field(0.2, gt=0.0, le=1.0, description="Least box IoU of an instance with its track")
    max_age: int = Field(5, ge=0, le=1000, description="Frames a track survives without being seen")


class RuntimeConfig(_Settings):
    """Where and how the networks run."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="'auto' (CUDA where torch can compute on it), 'cpu', 'cuda' or 'cuda:N'",
        json_schema_extra={"allowed": "text (auto, cpu, cuda, cuda:N)"},
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="'auto': bfloat16 autocast on GPUs that have it, float32 otherwise"
    )
    engine: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="What runs the compact networks: 'auto' is openvino in float32 on a CPU where it is installed, torch otherwise"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the networks, 0 leaves torch's choice")
    ignore_mask: str = Field(
        "",
        description="PNG of the camera image's size, non-zero where nothing is to be found (ego hood, rectification border)",
        json_schema_extra=_FILE,
    )
    weights_dir: str = Field(
        "", description="Folder of further weights, searched after the package's own and before OOD_SEG_WEIGHTS", json_schema_extra=_FILE
    )


class PipelineConfig(_Settings):
    """Settings of the whole pipeline, in the order of the data flow."""

    profile: str = Field("compact", description="Name of the profile these settings started from")
    scorer: ScorerConfig = ScorerConfig()
    prompts: PromptsConfig = PromptsConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    fusion: FusionConfig = FusionConfig()
    tracking: TrackingConfig = TrackingConfig()
    runtime: RuntimeConfig = RuntimeConfig()


@dataclass(frozen=True)
class Setting:
    """One leaf of the tree, described for ROS parameters, ``--help`` and the docs.

    Args:
        name: Dotted path, ``prompts.points.count``.
        kind: bool, int, float or str.
        value: Current value.
        description: One line.
        low: Least allowed value, None when unbounded.
        high: Greatest allowed value, None when unbounded.
        choices: Allowed strings; empty when any.
        above_low: ``low`` itself is not allowed.
        below_high: ``high`` itself is not allowed.
        allowed: What is allowed, in words, where the above does not say it all.
        names_file: The value names a file or folder, on whose content results depend.
    """

    name: str
    kind: type[Leaf]
    value: Leaf
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    above_low: bool = False
    below_high: bool = False
    allowed: str = ""
    names_file: bool = False


def _leaf(name: str, info: FieldInfo, value: Leaf) -> Setting:
    low: float | None = None
    high: float | None = None
    for rule in info.metadata:
        for attribute in ("ge", "gt"):
            low = float(getattr(rule, attribute)) if hasattr(rule, attribute) else low
        for attribute in ("le", "lt"):
            high = float(getattr(rule, attribute)) if hasattr(rule, attribute) else high
    choices = tuple(get_args(info.annotation)) if get_origin(info.annotation) is Literal else ()
    kind: Any = str if choices else info.annotation
    above_low, below_high = (any(hasattr(rule, attribute) for rule in info.metadata) for attribute in ("gt", "lt"))
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    allowed, names_file = str(extra.get("allowed", "")), bool(extra.get("names_file"))
    return Setting(name, kind, value, info.description or "", low, high, choices, above_low, below_high, allowed, names_file)


def iter_settings(config: BaseModel, prefix: str = "") -> Iterator[Setting]:
    """All leaves of a settings tree, depth first, in order of declaration."""
    for key, info in type(config).model_fields.items():
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            yield from iter_settings(value, f"{prefix}{key}.")
        else:
            yield _leaf(prefix + key, info, value)


def cache_root() -> Path:
    """Folder of what can be made or fetched again: ``$XDG_CACHE_HOME/ros2_ood_seg``, by default under ``~/.cache``.

    Raises:
        InputError: Nothing says where the user's home is, as in containers that run under a number without an account.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ros2_ood_seg"
    except RuntimeError as error:
        raise InputError("neither XDG_CACHE_HOME nor HOME says where files can be kept: set one of them, or name a folder") from error


def profile_dirs() -> tuple[Path, ...]:
    """Folders that may hold bundled profiles: beside the installed module, then the source tree's ``config/``."""
    package = Path(__file__).resolve().parent
    return package / "profiles", package.parent / "config"


def profile_names() -> tuple[str, ...]:
    """Names of the bundled profiles, sorted."""
    return tuple(sorted({path.stem for folder in profile_dirs() if folder.is_dir() for path in folder.glob("*.yaml")}))


def load_profile(profile: str | Path, overrides: Mapping[str, Any] | None = None) -> PipelineConfig:
    """Reads a profile and applies overrides.

    Args:
        profile: Name of a bundled profile (``compact``) or path of a YAML file. A file may start with
            ``extends: NAME`` and then holds only what differs; a file that it extends is looked for beside it, then in the current folder.
        overrides: Dotted name to value, ``{"prompts.points.count": 100}``.

    Raises:
        InputError: Unknown profile, unreadable YAML, unknown key or a value out of range; names the key and what is allowed.
    """
    name = str(profile)
    tree = _read_profile(name, ())
    known = {s.name: s for s in iter_settings(PipelineConfig())}
    for key, value in (overrides or {}).items():
        if key not in known:
            raise InputError(f"unknown setting '{key}': {_closest(key, known)}")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            # A group that a file names and leaves empty is null.
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise InputError(f"profile '{name}': '{parent}' is {node!r}, allowed: a group of settings")
        node[leaf] = value
    tree["profile"] = Path(name).stem
    return build_config(tree, f"profile '{name}'")


def build_config(tree: Mapping[str, Any], source: str) -> PipelineConfig:
    """Validates a nested mapping; ``source`` names it in errors.

    Raises:
        InputError: An unknown key or a value of wrong type or out of range.
    """
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    known = {s.name: s for s in iter_settings(PipelineConfig())}
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting '{key}': {_closest(key, known)}")
            continue
        allowed = describe_allowed(known[key]) if key in known else "a group of settings"
        lines.append(f"'{key}' is {item['input']!r}, allowed: {allowed}")
    return "; ".join(lines)


def describe_allowed(setting: Setting) -> str:
    """What values a setting takes, in words."""
    if setting.allowed:
        return setting.allowed
    if setting.choices:
        return "one of " + ", ".join(setting.choices)
    kind = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}[setting.kind.__name__]
    bounds = []
    if setting.low is not None:
        bounds.append(f"{'above' if setting.above_low else 'at least'} {setting.low:.10g}")
    if setting.high is not None:
        bounds.append(f"{'below' if setting.below_high else 'at most'} {setting.high:.10g}")
    if bounds:
        return f"{kind}, {' and '.join(bounds)}"
    return kind


def _closest(key: str, known: Mapping[str, Setting]) -> str:
    import difflib

    # A misspelt group is one as deep.
    depth = key.count(".") + 1
    groups = {".".join(name.split(".")[:depth]) for name in known if name.count(".") >= depth}
    near = difflib.get_close_matches(key, [*sorted(groups - {key}), *known], n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    group = key.rsplit(".", 1)[0] + "."
    members = [name for name in known if name.startswith(group)] or sorted({name.split(".")[0] for name in known})
    return "known are " + ", ".join(members)


def _read_profile(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise InputError(f"profile '{name}' extends itself: {' -> '.join((*seen, name))}")
    path = _find_profile(name)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"profile '{path}' cannot be read: {' '.join(str(error).split())}") from error
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise InputError(f"profile '{path}' must be a mapping of settings, got {type(loaded).__name__}")
    parent = loaded.pop("extends", None)
    if parent is None:
        return loaded
    beside = path.parent / str(parent)
    is_beside = _is_file_name(str(parent)) and beside.is_file()
    base = _read_profile(os.path.normpath(beside) if is_beside else str(parent), (*seen, name))
    return _merge(base, loaded)


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


def _find_profile(name: str) -> Path:
    if _is_file_name(name):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"profile file '{name}' does not exist; bundled profiles: {', '.join(profile_names())}")
        return path
    for folder in profile_dirs():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise InputError(f"unknown profile '{name}': use one of {', '.join(profile_names())}, or the path of a YAML file")


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        is_group = isinstance(merged.get(key), dict)
        if value is None and is_group:
            # Named and left empty: nothing in it differs.
            continue
        both = isinstance(value, Mapping) and is_group
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Reads ``KEY=VALUE`` words; texts are taken as they are, other values as YAML, so ``true``, ``3`` and ``0.5`` have their types.

    Raises:
        InputError: A word without ``=``, or a value that is no YAML.
    """
    texts = {setting.name for setting in iter_settings(PipelineConfig()) if setting.kind is str}
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, value = (part.strip() for part in assignment.partition("="))
        if not separator or not key:
            raise InputError(f"--set '{assignment}' must be KEY=VALUE, as in prompts.points.count=100")
        if key in texts:
            # A folder may be called 2024, and a file null.
            overrides[key] = value
            continue
        try:
            overrides[key] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise InputError(f"value of '{assignment}' cannot be read: {' '.join(str(error).split())}") from error
    return overrides


def format_value(value: Leaf) -> str:
    """A setting's value as YAML would write it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(yaml.safe_dump(value)).strip().removesuffix("...").strip()
