"""The trainer's agents to which a worker is connected, one per trainer rank, and how it reads from them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from weight_transfer.authoring import Deadline
from weight_transfer.errors import HandshakeError, TransferTimeoutError
from weight_transfer_rdma.info import PROBE_BYTES
from weight_transfer_rdma.link import doubt_about, link_rate
from weight_transfer_rdma.nixl import VRAM, Transport

if TYPE_CHECKING:
    from weight_transfer_rdma.config import RdmaOptions
    from weight_transfer_rdma.info import Endpoint
    from weight_transfer_rdma.memory import Arena, Memory, RunningAgent

logger = logging.getLogger(__name__)

_PROBE = "probe"  # the plan of a first read
_PROBE_TIMEOUT = 10.0  # seconds for the first, small read; a GPU's memory over TCP may never arrive


class Peers:
    """Connects a worker's agent to those of the trainer ranks as they are now.

    Args:
        options: of the worker.
        memory: in which its weights lie.
        ranks: how many trainer ranks there are.
    """

    def __init__(self, options: RdmaOptions, memory: Memory, ranks: int) -> None:
        self._options, self._memory, self._ranks = options, memory, ranks
        self._probe: Arena | None = None
        self._endpoints: dict[int, Endpoint] = {}
        self._transports: dict[int, Transport] = {}
        self._rates: dict[Transport, float | None] = {}

    def attach(self, agent: RunningAgent, rank: int, endpoint: Endpoint, deadline: Deadline) -> bool:
        """Connect to a rank's agent, read a little, and see how that went; return whether the agent has changed.

        Reads that were prepared before are void then.

        Raises:
            HandshakeError: it is another agent, or UCX reads from it in a way that the options do not allow.
        """
        known = self._endpoints.get(rank)
        if endpoint == known:
            return False
        label = "trainer" if self._ranks == 1 else f"trainer rank {rank}"
        peer = agent.connect(endpoint.metadata, deadline, known.agent if known is not None else None, label)
        if peer != endpoint.agent:
            raise HandshakeError(f"The metadata of agent {endpoint.agent} belongs to {peer}.", backend="rdma")
        if known is None or known.agent != endpoint.agent:
            self._transports[rank] = transport = self._try(agent, endpoint, label, deadline)
            self._rates[transport] = self._options.link_rate or link_rate(transport)
        self._endpoints[rank] = endpoint
        return True

    @property
    def transports(self) -> list[Transport]:
        """The different ways in which the worker reads from the ranks."""
        return list(dict.fromkeys(self._transports.values()))

    @property
    def doubts(self) -> list[str]:
        """What is to be said of ways that UCX took and that the options do not name."""
        doubted = [each for each in self.transports if not self._is_expected(each)]
        return list(filter(None, map(doubt_about, doubted)))

    @property
    def link(self) -> tuple[Transport, float | None]:
        """The slowest way, and its rate in GB/s; None if that of any is not known."""
        rates = [(self._rates[each], each) for each in self.transports]
        rate, slowest = min(rates, key=lambda each: each[0] or 0.0)
        return slowest, rate

    def _try(self, agent: RunningAgent, endpoint: Endpoint, label: str, deadline: Deadline) -> Transport:
        place = self._memory.place
        self._probe = self._probe or self._memory.arena(PROBE_BYTES, deadline)
        rows = np.array([[self._probe.address, endpoint.probe, PROBE_BYTES]], dtype=np.uint64)
        handle = agent.prepare("READ", endpoint.agent, rows, place, endpoint.place, deadline, _PROBE)
        agent.start(handle, 0, deadline)
        try:
            agent.finish(Deadline(min(deadline.remaining(), _PROBE_TIMEOUT)))
        except TransferTimeoutError:
            self._require_allowed(agent.transport(place), label)
            raise
        transport = agent.transport(place)
        self._require_allowed(transport, label)
        doubt = None if self._is_expected(transport) else doubt_about(transport)
        level = logging.WARNING if doubt else logging.INFO
        logger.log(level, "%s", doubt or f"rdma reads over {transport.kind} ({transport.path})")
        return transport

    def _is_expected(self, transport: Transport) -> bool:
        kind = transport.kind
        return self._options.transport == kind or (kind == "tcp" and self._options.allow_tcp)

    def _require_allowed(self, transport: Transport, label: str) -> None:
        """Refuse a transport that the options do not allow."""
        options, kind = self._options, transport.kind
        if options.transport not in ("auto", kind):
            raise HandshakeError(
                f"UCX reads from the {label} by {transport.path} ({kind}), not over {options.transport} as this "
                f'worker\'s options demand; check what both hosts offer, or set transport = "{kind}".',
                backend="rdma",
                peer=label,
            )
        place = self._memory.place
        if kind == "tcp" and options.transport == "auto" and place.memory == VRAM and not options.allow_tcp:
            raise HandshakeError(
                "UCX finds nothing better than TCP between these GPUs. On one GPU use the ipc backend; else check "
                "NVLink and RDMA devices, or set allow_tcp = true.",
                backend="rdma",
                peer=label,
            )
