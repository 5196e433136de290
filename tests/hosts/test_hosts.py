"""Trainer and workers on three hosts, with addresses of their own and a network that fails: ``make test-hosts``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from hosts.network import HOSTS, Network, UnavailableError
from support.actors import Actor
from weight_transfer import PeerLostError, TransferTimeoutError

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

ROWS = 40_000  # of 512 bytes: more than what sockets hold
TIMEOUT = 6.0
NCCL = {"backend": "nccl", "nccl": {"transport": "gloo", "address": HOSTS["trainer"], "interface": "eth0"}}
RDMA = {"backend": "rdma", "rdma": {"transport": "tcp", "interface": "eth0", "adopt": False}}
BACKENDS = pytest.mark.parametrize("backend", [NCCL, RDMA], ids=["nccl over gloo", "rdma over TCP"])

Start = Callable[..., Actor]


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """The three hosts; a test may give arguments of `Network.plugged`."""
    network = Network()
    with ExitStack() as stack:
        try:
            stack.enter_context(network.plugged(**getattr(request, "param", {})))
        except UnavailableError as reason:
            pytest.skip(f"no network namespaces here: {reason}")
        yield network


@pytest.fixture
def start(network: Network) -> Iterator[Start]:
    """Start a role on a host."""
    with ExitStack() as stack:

        def on(host: str, role: str, **spec: Any) -> Actor:
            actor = Actor("host", plays=role, host=network.namespace(host), **spec)
            stack.callback(actor.stop)
            return actor.ready()

        yield on


def _three(
    start: Start, backend: dict[str, Any], timeout: float = TIMEOUT, rows: int = ROWS
) -> tuple[Actor, Actor, Actor]:
    """Return a trainer and two workers, each on its host."""
    config = {"timeout": timeout, "init_timeout": 20, "bucket_bytes": "256KiB", "token": "between-hosts", **backend}
    left, right = (
        start(host, "worker", seed=seed, config=config, rows=rows, listen=HOSTS[host])
        for seed, host in ((11, "left"), (12, "right"))
    )
    return start("trainer", "trainer", config=config, rows=rows, workers=[left.hello, right.hello]), left, right


def _sends_a_b_a(trainer: Actor, *workers: Actor) -> None:
    digests = []
    for version, seed in enumerate((1, 2, 1)):
        sent = trainer.ask("send", seed=seed, version=version)
        assert [worker.ask("digest") for worker in workers] == [sent["digest"]] * len(workers)
        digests.append(sent["digest"])
    assert digests[0] == digests[2] != digests[1]


@BACKENDS
def test_every_bit_arrives_on_other_hosts(start: Start, backend: dict[str, Any]) -> None:
    trainer, *workers = _three(start, backend)
    assert [worker.hello.rpartition(":")[0] for worker in workers] == ["http://10.99.0.2", "http://10.99.0.3"]
    _sends_a_b_a(trainer, *workers)


@BACKENDS
def test_a_cut_link_is_an_error_in_time_that_names_the_host(
    start: Start, network: Network, backend: dict[str, Any]
) -> None:
    """And the host takes part again when the link is back, with the right bytes."""
    trainer, left, right = _three(start, backend)
    trainer.ask("send", seed=1, version=1)
    right.ask("arm", block_at=1)
    trainer.tell("send", seed=2, version=2)
    assert right.reply() == "blocked"
    since = time.monotonic()  # the update began a moment before, once the trainer had new weights
    network.cut("right")
    right.ask("release")
    error = trainer.error(within=30)
    assert time.monotonic() - since < TIMEOUT + 1
    assert isinstance(error, TransferTimeoutError | PeerLostError)
    assert error.peer == right.hello
    assert right.hello in str(error)
    network.mend("right")
    right.ask("arm")
    sent = trainer.ask("send", seed=3, version=3)
    assert [worker.ask("digest") for worker in (left, right)] == [sent["digest"]] * 2


@BACKENDS
@pytest.mark.parametrize(
    ("network", "loses"),
    [({"delay": 0.01}, False), ({"loss": 0.01}, True)],
    ids=["20 ms there and back", "1 % lost"],
    indirect=["network"],
)
def test_every_bit_arrives_over_a_bad_network(
    start: Start, network: Network, backend: dict[str, Any], loses: bool
) -> None:
    trainer, *workers = _three(start, backend, timeout=30, rows=4_000)
    _sends_a_b_a(trainer, *workers)
    assert network.frames["carried"] > 1000
    assert (network.frames["lost"] > 0) is loses
