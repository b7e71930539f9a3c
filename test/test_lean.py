from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from ros2_ood_seg.config import load_profile
from ros2_ood_seg.pipeline import Pipeline
Pipeline(load_profile("compact", {"runtime.device": "cpu", "runtime.engine": "torch"})).warm_up(64, 96)
assert "torchvision" in sys.modules
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
import torch, torch._dynamo, torchvision
from torchvision.ops import roi_align as module_or_function
assert torch._dynamo.config.cache_size_limit > 0, "the real one comes when it is asked for"
asked = sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu")
assert asked == torch._dynamo.utils.is_compile_supported("cpu")
boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
assert module_or_function(torch.ones(1, 1, 8, 8), boxes, 2).eq(1).all()
"""


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


def test_a_pipeline_of_the_bundled_weights_needs_no_compiler() -> None:
    run(CODE)


def test_whatever_else_is_asked_of_the_compiler_meanwhile_is_the_real_one() -> None:
    run(
        """
import sys
from ros2_ood_seg import lean
import importlib
real = importlib.import_module
def importing(name, package=None):
    if name == "torchvision.ops":
        from torch._dynamo.utils import counters
        import torch._dynamo.utils
        assert torch._dynamo.utils.counters is counters
    return real(name, package)
importlib.import_module = importing
lean.import_torchvision()
import torch._dynamo
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
"""
    )
