"""The node with a pipeline that takes longer: tenths of a second as the first pixel of the image says, for ever at 255."""

from __future__ import annotations

import sys
import time
from typing import Any

from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.ros import node
from ros2_ood_seg.types import FrameResult


class SlowPipeline(Pipeline):
    """Sleeps, then does its work."""

    def run(self, image: Any, external: Any = None) -> FrameResult:
        tenths = int(image[0, 0, 0])
        if tenths == 255:
            print("long frame in work", flush=True)
        time.sleep(tenths * (3600.0 if tenths == 255 else 0.1))
        return super().run(image, external)


if __name__ == "__main__":
    node.Pipeline = SlowPipeline
    sys.exit(node.main())
