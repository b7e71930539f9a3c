"""Settings as ROS parameters: the pipeline's, with the chosen profile's values as defaults, and the node's own."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

from ros2_ood_seg.config import PipelineConfig, Setting, build_config, describe_allowed, iter_settings, load_profile
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.pipeline import check_stages

# A change of these means loading another model or moving to another device: they are fixed while the node lives.
_READ_ONLY = (
    "scorer.name",
    "scorer.weights",
    "prompts.boxes.weights",
    "segmenter.name",
    "segmenter.model",
    "segmenter.weights",
    "runtime.device",
    "runtime.precision",
    "runtime.threads",
    "runtime.ignore_mask",
    "runtime.weights_dir",
    "profile",
    "autostart",
    "image_transport",
    "weights_dir",
    "warm_up.height",
    "warm_up.width",
    "external.queue_size",
    "external.slop_s",
    "diagnostics_period_s",
)
# rclpy's own parameters; they are not settings and no typing errors.
_FOREIGN = ("qos_overrides.", "use_sim_time", "start_type_description_service")
_MAX_INT = 2**63 - 1


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WarmUpConfig(_Group):
    """The empty image that the networks see before the first frame."""

    height: int = Field(720, ge=0, le=16384, description="Height of the warm-up image, px; 0 for no warm-up")
    width: int = Field(1280, ge=0, le=16384, description="Width of the warm-up image, px; 0 for no warm-up")


class ExternalConfig(_Group):
    """How anomaly maps find their images (scorer 'external')."""

    queue_size: int = Field(10, ge=1, le=1000, description="Images and maps kept while waiting for their counterpart")
    slop_s: float = Field(0.0, ge=0.0, le=10.0, description="Stamps may differ by less than this, s; 0 wants them equal")


class OverlayConfig(_Group):
    """The overlay picture."""

    heat: bool = Field(True, description="Show the score map as a glow below the instances")
    jpeg_quality: int = Field(80, ge=1, le=100, description="JPEG quality of ~/overlay/compressed")


class PublishConfig(_Group):
    """Topics that can be switched off; one without subscribers costs nothing anyway."""

    boxes: bool = Field(True, description="Publish ~/boxes")
    detections: bool = Field(True, description="Publish ~/detections (where vision_msgs is installed)")
    timing: bool = Field(True, description="Publish ~/timing")
    instance_mask: bool = Field(True, description="Publish ~/instance_mask")
    anomaly_map: bool = Field(True, description="Publish ~/anomaly_map")
    semantic: bool = Field(True, description="Publish ~/semantic (scorers with classes)")
    overlay: bool = Field(True, description="Publish ~/overlay and ~/overlay/compressed")


class NodeConfig(_Group):
    """Settings of the node around the pipeline."""

    profile: str = Field("compact", description="Bundled profile or path of a YAML file; its values are the defaults of all others")
    autostart: bool = Field(True, description="Configure and activate at start, without a lifecycle manager")
    image_transport: Literal["raw", "compressed"] = Field("raw", description="Subscribe to 'image' or to 'image/compressed'")
    weights_dir: str = Field("", description="Short name of runtime.weights_dir; wins when both are set")
    diagnostics_period_s: float = Field(1.0, ge=0.1, le=60.0, description="Period of /diagnostics, s")
    warm_up: WarmUpConfig = WarmUpConfig()
    external: ExternalConfig = ExternalConfig()
    overlay: OverlayConfig = OverlayConfig()
    publish: PublishConfig = PublishConfig()


class Parameters:
    """Declares all settings on a node and keeps the validated trees of their values.

    Args:
        node: Whose parameters they become.

    Raises:
        InputError: An unknown profile, or an override of wrong type or out of range; names it and what is allowed.

    Attributes:
        node_config: Current settings of the node.
        pipeline_config: Current settings of the pipeline; a new object after every change.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        own = {setting.name: setting for setting in iter_settings(NodeConfig())}
        profile = self._declare(own.pop("profile"))
        pipeline = {setting.name: setting for setting in iter_settings(load_profile(profile)) if setting.name != "profile"}
        for setting in (*own.values(), *pipeline.values()):
            self._declare(setting)
        self._own_names, self._pipeline_names = ("profile", *own), tuple(pipeline)
        self._warn_of_unknown({"profile", *own, *pipeline})
        self.node_config, self.pipeline_config = self._validated({})
        node.add_on_set_parameters_callback(self._on_set)
        node.add_post_set_parameters_callback(self._on_changed)

    def _declare(self, setting: Setting) -> Any:
        descriptor = ParameterDescriptor(description=setting.description, read_only=setting.name in _READ_ONLY)
        if setting.choices:
            descriptor.additional_constraints = describe_allowed(setting)
        if setting.low is not None or setting.high is not None:
            if setting.kind is int:
                low, high = setting.low or 0, _MAX_INT if setting.high is None else setting.high
                descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high))]
            else:
                low = -sys.float_info.max if setting.low is None else setting.low
                high = sys.float_info.max if setting.high is None else setting.high
                descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
        try:
            value = self._node.declare_parameter(setting.name, setting.value, descriptor).value
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise InputError(f"parameter '{setting.name}' must be {describe_allowed(setting)}: {error}") from error
        if setting.choices and value not in setting.choices:
            raise InputError(f"parameter '{setting.name}' is '{value}', allowed: {describe_allowed(setting)}")
        return value

    def _validated(self, changes: dict[str, Any]) -> tuple[NodeConfig, PipelineConfig]:
        def tree(names: Iterable[str]) -> dict[str, Any]:
            return _nested({name: changes.get(name, self._node.get_parameter(name).value) for name in names})

        node_config = NodeConfig.model_validate(tree(self._own_names))
        settings = tree(self._pipeline_names)
        settings["profile"] = Path(node_config.profile).stem
        if node_config.weights_dir:
            settings["runtime"]["weights_dir"] = node_config.weights_dir
        return node_config, build_config(settings, "parameters")

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
        try:
            check_stages(self._validated({parameter.name: parameter.value for parameter in parameters})[1])
        except InputError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _on_changed(self, _parameters: list[Parameter]) -> None:
        self.node_config, self.pipeline_config = self._validated({})

    def _warn_of_unknown(self, known: set[str]) -> None:
        # rclpy ignores overrides of undeclared parameters without a word, and has no public way to list them.
        for name in getattr(self._node, "_parameter_overrides", {}):
            if name not in known and not name.startswith(_FOREIGN):
                near = " or ".join(difflib.get_close_matches(name, known)) or "one that 'ros2 param list' shows"
                self._node.get_logger().warning(f"parameter '{name}' does not exist and is ignored, did you mean {near}?")


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, leaf = name.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[leaf] = value
    return tree
