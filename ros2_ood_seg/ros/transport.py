"""Room for camera images in the shared memory of Fast DDS."""

from __future__ import annotations

import os
from pathlib import Path

PROFILES = Path(__file__).with_name("fastdds.xml")
# Fast DDS 2 (Jazzy) reads the first, Fast DDS 3 (Kilted and later) the second.
_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE", "FASTDDS_BUILTIN_TRANSPORTS")


def room_for_images() -> dict[str, str]:
    """The environment in which Fast DDS makes room for images; empty where the user has set it up."""
    if any(name in os.environ for name in _VARIABLES):
        return {}
    return dict.fromkeys(_VARIABLES[:2], str(PROFILES))


def make_room_for_images() -> None:
    """Enlarges the shared memory of this process and its children, unless the user has set up Fast DDS; call it before rclpy.init.

    Other publishers of large images on the machine, camera drivers above all, need the same: export
    ``FASTRTPS_DEFAULT_PROFILES_FILE`` (Kilted and later ``FASTDDS_DEFAULT_PROFILES_FILE``) for them. Other DDS vendors ignore it.
    """
    os.environ.update(room_for_images())
