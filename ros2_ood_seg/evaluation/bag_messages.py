"""ROS messages in bags, without ROS: their types, and this package's results as messages and back."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from ros2_ood_seg import rle
from ros2_ood_seg.disjoint import DisjointInstances
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.types import FrameResult, Instances, boxes_from_masks

RAW_IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
INSTANCE_ARRAY = "ros2_ood_seg/msg/AnomalyInstanceArray"
NS_PER_S = 1_000_000_000
_STAMP_END = 12
"""Serialised, a header begins with four bytes of CDR and the stamp."""


@lru_cache(maxsize=1)
def typestore() -> Typestore:
    """The message types of ROS 2 Jazzy and of this package; image messages are the same in every ROS 2."""
    store = get_typestore(Stores.ROS2_JAZZY)
    types = {}
    for path in sorted(_definitions_dir().glob("*.msg")):
        types.update(get_types_from_msg(path.read_text(encoding="utf-8"), f"ros2_ood_seg/msg/{path.stem}"))
    store.register(types)
    return store


def _definitions_dir() -> Path:
    """Folder of this package's ``.msg`` files: beside the installed module, else at the top of the source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "interfaces"
    return installed if installed.is_dir() else package.parent / "msg"


def make_header(stamp_ns: int, frame_id: str) -> Any:
    """A std_msgs/Header for :meth:`BagWriter.write`."""
    types = typestore().types
    stamp = types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, NS_PER_S))
    return types["std_msgs/msg/Header"](stamp, frame_id)


def stamp_ns(header: Any) -> int:
    """The stamp of a std_msgs/Header, ns."""
    return int(header.stamp.sec) * NS_PER_S + int(header.stamp.nanosec)


def header_stamp_ns(data: bytes | memoryview) -> int:
    """The stamp of a serialised message that begins with a header, ns, without deserialising the rest.

    Args:
        data: CDR bytes.

    Raises:
        InputError: Fewer bytes than a stamp takes.
    """
    if len(data) < _STAMP_END:
        raise InputError(f"a message of {len(data)} bytes has no header")
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(seconds) * NS_PER_S + int(nanoseconds)


def instances_from_message(message: Any, shape_hw: tuple[int, int]) -> Instances:
    """Instances of a ros2_ood_seg/AnomalyInstanceArray, on the CPU.

    Args:
        message: As :meth:`BagReader.message` or rclpy gives it.
        shape_hw: Size of its image, px.

    Raises:
        InputError: A mask of another size, or a run-length code that does not fit its size.
    """
    masks = torch.zeros((len(message.instances), *shape_hw), dtype=torch.bool)
    for mask, instance in zip(masks, message.instances, strict=True):
        code = instance.mask
        if (code.height, code.width) != shape_hw:
            raise InputError(f"instance {instance.id} has a mask of {code.width}x{code.height} px, its image {shape_hw[1]}x{shape_hw[0]}")
        mask.copy_(torch.from_numpy(rle.decode(code.counts, code.height, code.width)))

    def column(name: str) -> torch.Tensor:
        return torch.tensor([float(getattr(i, name)) for i in message.instances], dtype=torch.float32)

    boxes, area = boxes_from_masks(masks)
    scores = column("score")
    found = Instances(masks, boxes, scores, column("raw_score"), column("mask_quality"), area, column("track_id").long())
    return found.select(torch.argsort(scores, descending=True, stable=True))


def instances_message(result: FrameResult, header: Any) -> Any:
    """A ros2_ood_seg/AnomalyInstanceArray as the node publishes it: masks without overlaps, ids from 1 in order of score."""
    types = typestore().types
    instances = []
    disjoint = DisjointInstances.from_instances(result.instances, result.min_area_px)
    for number, (runs, track, score, raw, quality) in enumerate(disjoint.rows(), start=1):
        box = types["ros2_ood_seg/msg/BoundingBox"](*map(float, runs.box_xyxy), score)
        mask = types["ros2_ood_seg/msg/InstanceMask"](runs.height, runs.width, runs.counts())
        instances.append(types["ros2_ood_seg/msg/AnomalyInstance"](number, track, score, raw, quality, runs.area_px, box, mask))
    return types[INSTANCE_ARRAY](header, result.profile, result.score_map.scorer, instances)


def boxes_message(instances: Any) -> Any:
    """The boxes of an AnomalyInstanceArray alone, as ros2_ood_seg/BoundingBoxArray."""
    return typestore().types["ros2_ood_seg/msg/BoundingBoxArray"](instances.header, [instance.box for instance in instances.instances])


def timing_message(timings_ms: Mapping[str, float], profile: str, answered: int, header: Any) -> Any:
    """A ros2_ood_seg/FrameTiming of a pipeline that saw every frame.

    Args:
        timings_ms: Stages in the order they ran.
        profile: Settings that ran.
        answered: Frames so far, this one included.
        header: Of the source image.
    """
    durations = np.array(list(timings_ms.values()), np.float32)
    latency_ms = float(timings_ms.get("total", np.nan))
    return typestore().types["ros2_ood_seg/msg/FrameTiming"](
        header, profile, list(timings_ms), durations, latency_ms, answered, answered, 0, 0
    )
