from __future__ import annotations

import gc
import importlib.util
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "evaluation_memory.py"
FRAME_BYTES = 96 * 160 * 4
"""One float32 map of the program's frames."""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The program that docs/evaluation.md takes its figures from."""
    spec = importlib.util.spec_from_file_location("evaluation_memory", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prompt_collection() -> Iterator[None]:
    """Garbage goes at once: figures are cycles of many MB, and when they would go by themselves is chance."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    # Again: full collections wait until a quarter of what the last one left is new, which now is nothing.
    gc.collect()
    gc.set_threshold(200, 2, 1)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def peak_bytes(program: ModuleType, frames: int, folder: Path) -> int:
    folder.mkdir()
    tracemalloc.start()
    try:
        program.evaluate(frames, folder, "coarse")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("prompt_collection")
def test_a_frame_more_takes_far_less_memory_than_its_maps(program: ModuleType, tmp_path: Path) -> None:
    program.evaluate(2, tmp_path, "coarse")
    short, long = (peak_bytes(program, frames, tmp_path / str(frames)) for frames in (20, 100))
    assert (long - short) / 80 < FRAME_BYTES / 4
    assert (tmp_path / "100" / "report.json").stat().st_size > (tmp_path / "20" / "report.json").stat().st_size
