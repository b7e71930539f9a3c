"""Points the CMake files of ROS wheels to this environment's Python instead of the one of the machine that built them."""

import re
import sys
import sysconfig
from pathlib import Path

PATHS = (
    (re.compile(r"/opt/python/cp3\d+-cp3\d+/include/python3\.\d+"), sysconfig.get_path("include")),
    (re.compile(r"/opt/python/cp3\d+-cp3\d+/lib/python3\.\d+/site-packages"), sysconfig.get_path("purelib")),
)

if __name__ == "__main__":
    for file in Path(sys.prefix, "share").rglob("*.cmake"):
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
        fixed = text
        for pattern, path in PATHS:
            fixed = pattern.sub(lambda _, path=path: path, fixed)
        if fixed != text:
            file.write_text(fixed, encoding="utf-8", errors="surrogateescape")
