from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "evaluation_memory.py"
"""The program that docs/evaluation.md takes its figures from."""
FRAME_BYTES = 96 * 160 * 4
"""One float32 map of the program's frames."""
PROBE = """
import gc, importlib.util, sys, tracemalloc
from pathlib import Path

spec = importlib.util.spec_from_file_location("evaluation_memory", sys.argv[1])
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
folder = Path(sys.argv[2])
program.evaluate(2, folder, "coarse")
# Garbage goes at once: figures are cycles of many MB, and when they would go by themselves is chance. Collected again after the
# freeze: full collections wait until a quarter of what the last one left is new.
gc.collect()
gc.freeze()
gc.collect()
gc.set_threshold(200, 2, 1)
for frames in (20, 100):
    (folder / str(frames)).mkdir()
    tracemalloc.start()
    program.evaluate(frames, folder / str(frames), "coarse")
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""
"""Prints the peak of 20 and of 100 frames; in a process of its own, where nothing else allocates."""


def test_a_frame_more_takes_far_less_memory_than_its_maps(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, PROGRAM, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split()[-2:])
    assert (long - short) / 80 < FRAME_BYTES / 8
    assert (tmp_path / "100" / "report.json").stat().st_size > (tmp_path / "20" / "report.json").stat().st_size
