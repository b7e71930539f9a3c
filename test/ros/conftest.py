"""Fixtures of the tests that need ROS 2; the tests skip without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness import Client, NodeProcess


@pytest.fixture(scope="module", autouse=True)
def _quiet_surroundings() -> Iterator[None]:
    """Nodes of these tests see this machine only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        patch.setenv("RCUTILS_COLORIZED_OUTPUT", "0")
        yield


@pytest.fixture
def dds() -> int:
    """A DDS domain of the test's own."""
    from harness import free_domain

    return free_domain()


@pytest.fixture
def start_node(dds: int, tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    """Starts nodes in the test's domain and ends those that the test leaves running."""
    from harness import NodeProcess

    started: list[NodeProcess] = []

    def start(**arguments: Any) -> NodeProcess:
        started.append(NodeProcess(tmp_path / f"node{len(started)}", dds, **arguments))
        return started[-1]

    yield start
    for node in started:
        node.kill()


@pytest.fixture
def client(dds: int) -> Iterator[Client]:
    """A client in the test's domain."""
    from harness import Client

    one = Client(dds)
    yield one
    one.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeProcess, Client]]:
    """One active node and its client for several tests, which must use ascending stamps."""
    from harness import Client, NodeProcess, free_domain

    domain = free_domain()
    node = NodeProcess(tmp_path_factory.mktemp("running"), domain)
    client = Client(domain)
    client.connect()
    yield node, client
    client.close()
    node.kill()
