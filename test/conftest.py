"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# Small networks: on a busy machine a second thread waits far longer than it works.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real images and labels beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real images are not here: no folder ../shared/data beside the checkout")
    return SHARED
