"""One local cluster of three nodes for all tests; node ``n2`` may be killed and comes back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_MEMORY = 80 * 2**20  # bytes of each node's object store, the least that Ray takes


class Nodes:
    """The cluster, and its nodes by name: ``head``, ``n1`` and ``n2``, each with a resource of that name."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 4, "object_store_memory": _MEMORY, "resources": {"head": 100}, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.by_name = {name: self.add(name) for name in ("n1", "n2")}

    def add(self, name: str) -> Any:
        return self.cluster.add_node(num_cpus=4, object_store_memory=_MEMORY, resources={name: 100})

    def kill(self, name: str) -> None:
        self.cluster.remove_node(self.by_name.pop(name), allow_graceful=False)

    def bring_back(self, name: str) -> None:
        self.by_name[name] = self.add(name)


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(found)  # the nodes import the actors' classes
    nodes = Nodes()
    ray.init(address=nodes.cluster.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.cluster.shutdown()


@pytest.fixture
def place(nodes: Nodes) -> Iterator[Callable[..., Any]]:
    """Make actors on a node, and end them after the test."""
    import ray

    made = []

    def make(cls: Any, node: str, *arguments: Any, **options: Any) -> Any:
        made.append(cls.options(resources={node: 1}, **options).remote(*arguments))
        return made[-1]

    yield make
    for actor in made:
        ray.kill(actor)
