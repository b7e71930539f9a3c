from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.fusion import FUSIONS
from ros2_ood_seg.prompts import BOX_PROMPTS, POINT_PROMPTS
from ros2_ood_seg.registry import Registry
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.segmenters import SEGMENTERS


@pytest.mark.parametrize("registry", [SCORERS, BOX_PROMPTS, POINT_PROMPTS, SEGMENTERS, FUSIONS], ids=lambda registry: registry.kind)
def test_every_registered_name_resolves(registry: Registry) -> None:
    for name in registry.names:
        assert callable(registry.get(name))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown fusion 'sum': use one of s2m, ugains, hybrid"):
        FUSIONS.get("sum")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("scorer", {"more": "needs_more:build"})
    with pytest.raises(InputError, match="scorer 'more' needs the Python package 'a_package_nobody_has'"):
        registry.get("more")


def test_a_module_is_imported_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_stage.py").write_text("def build():\n    return 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("scorer", {"lazy": "lazy_stage:build"})
    assert registry.names == ("lazy",)
    assert "lazy_stage" not in sys.modules
    assert registry.get("lazy")() == 1
    monkeypatch.delitem(sys.modules, "lazy_stage")
