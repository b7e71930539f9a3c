"""`make demo`: plays a recording to the node and shows what it finds."""

import sys

from ros2_ood_seg.ros.demo import main

sys.exit(main())
