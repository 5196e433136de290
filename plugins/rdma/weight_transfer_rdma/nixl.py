"""One NIXL agent: memory regions, connections to the trainer's agents, prepared transfers. Needs numpy and NIXL only.

Everything here may block, abort the process or crash it; `weight_transfer_rdma.process` is where it is contained.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

MODULES = ("nixl_cu12", "nixl_cu13")
"""NIXL's builds, by the CUDA version that they load; without a GPU either will do."""

Rows = NDArray[np.uint64]
"""Transfers, ``[n, 3]``: local address, remote address, bytes."""

DRAM, VRAM = "DRAM", "VRAM"

WHOLE, REGIONS = "whole", "regions"
"""The two plans to which prepared transfers belong: of what goes whole, and of what goes by region."""

_WORDS = 2
_LONGEST_REST = 1000  # microseconds that a progress thread sleeps, unless it is woken


@attrs.frozen
class Place:
    """The kind of memory in which a region lies: ``"DRAM"`` or ``"VRAM"``, and the index of the CUDA device."""

    memory: str = DRAM
    device: int = 0


@attrs.frozen
class Transport:
    """What UCX chose for large reads from a peer.

    Attributes:
        kind: ``"rdma"``, ``"nvlink"``, ``"shm"``, ``"tcp"``, or ``"unknown"``.
        path: UCX's own words, such as ``"zero-copy over cma/memory"``.
    """

    kind: str
    path: str


def installed() -> str | None:
    """Return the NIXL module to import: the one for torch's CUDA version if torch is loaded and both are there."""
    found = [name for name in MODULES if find_spec(name) is not None]
    if len(found) > 1:
        import sys

        version = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None) or ""
        found.sort(key=lambda name: not name.endswith(version.partition(".")[0]))
    return found[0] if found else None


def load(module: str) -> Any:
    """Import NIXL's Python interface; its import turns off the reporting of errors in logging, which is undone."""
    reported = logging.raiseExceptions
    try:
        return import_module(f"{module}._api")
    finally:
        logging.raiseExceptions = reported


def let_progress_threads_rest(module: str) -> None:
    """Make the progress threads of this process's agents sleep while nothing happens.

    NIXL's Python interface sets their longest sleep to zero, so that each takes a processor core for as long as it
    lives. Events of the transport wake a thread at once, however long it may sleep.
    """
    bindings = load(module).nixlBind
    original: Any = bindings.nixlAgentConfig

    class Resting(original):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, _LONGEST_REST if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = Resting


def environment(transport: str, interface: str | None, ucx: Mapping[str, str]) -> dict[str, str]:
    """Return the UCX and NIXL variables for an agent that has these options.

    Variables that the user has set in the environment stay in force where this sets none.
    """
    own = {
        "NIXL_LOG_LEVEL": os.environ.get("NIXL_LOG_LEVEL", "WARN"),
        "UCX_PROTO_INFO": "y",  # `transport_in` reads what it prints
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "UCX_TCP_TX_SEG_SIZE": "1m",  # reads over TCP with the default, 8 KB, are five times slower
        "UCX_TCP_RX_SEG_SIZE": "1m",
    }
    if transport in _TLS:
        own["UCX_TLS"] = _TLS[transport]
    if interface is None and transport != "rdma":
        interface = "lo"
    if interface not in (None, "all"):
        own["UCX_NET_DEVICES"] = str(interface)
    return own | {f"UCX_{key}": value for key, value in ucx.items()}


# TCP stands beside shared memory and NVLink because neither can notice that a peer died; it carries control messages.
_TLS = {
    "rdma": "rc,dc,ud,srd,self,cuda_copy",
    "nvlink": "cuda_ipc,cuda_copy,tcp,self",
    "shm": "cma,tcp,self",
    "tcp": "tcp,self,cuda_copy",
}

_READ = re.compile(r"\|\s*(?P<config>\S.*?cfg#\d+)\s*\|\n.*\|\s*remote memory read by ucp_get(?P<rest>.*)\|")
_ROW = re.compile(r"\|\s*\S*\.\.inf\s*\|\s*(?P<how>[^|]*?)\s*\|\s*(?P<path>[^|]*?)\s*\|")
_KINDS = (
    ("nvlink", re.compile(r"\bcuda_ipc\b|\brocm_ipc\b|\bze_ipc\b")),
    ("rdma", re.compile(r"\b(rc|dc|ud)_|\bsrd\b|mlx5")),
    ("tcp", re.compile(r"\btcp\b")),
    ("shm", re.compile(r"\b(cma|xpmem|knem|posix|sysv|memory|self)\b")),
)


def transport_in(log: str, place: Place) -> Transport:
    """Find in UCX's protocol report how it reads large pieces from another agent into ``place``."""
    wanted = "cuda" if place.memory == VRAM else "host"
    found = Transport("unknown", "UCX did not report it")
    for match in _READ.finditer(log):
        if match["config"].endswith(" self cfg#0") or f"into {wanted}" not in match["rest"]:  # 0 is itself
            continue
        row = _ROW.search(log, match.end())
        if row is not None:
            path = f"{row['how']} over {row['path']}"
            kind = next((kind for kind, pattern in _KINDS if pattern.search(row["path"])), "unknown")
            found = Transport(kind, path)
    return found


class Agent:
    """A NIXL agent with the UCX backend.

    Args:
        name: unique among all agents that may meet.
        module: the NIXL module, from `installed`.
        progress: whether a thread of NIXL's drives transfers; without it they go on in `done` only, and peers whose
            transfers need this side's processor (TCP) wait for as long.
    """

    def __init__(self, name: str, module: str, progress: bool = True) -> None:
        api = load(module)
        self._nixl: Any = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress, backends=[]))
        # Mode "none" would wait for ever for a peer that died.
        self._nixl.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
        self._transfers: dict[int, _Prepared] = {}
        self._numbers = count()
        self._regions: dict[int, Any] = {}
        self._flags: dict[Channel, _Flags] = {}
        self._peers: set[str] = set()

    def register(self, address: int, nbytes: int, place: Place) -> None:
        """Let peers and transfers at a region."""
        rows = np.array([[address, nbytes, place.device]], dtype=np.uint64)
        self._regions[address] = self._nixl.register_memory(rows, place.memory)

    def deregister(self, address: int) -> None:
        """Take a region back."""
        self._nixl.deregister_memory(self._regions.pop(address))

    def metadata(self) -> bytes:
        """Return what a peer needs to connect and to reach the regions registered so far."""
        blob: bytes = self._nixl.get_agent_metadata()
        return blob

    def connect(self, metadata: bytes, replaced: str | None = None) -> str:
        """Load a peer's metadata; return its name.

        NIXL adds newer metadata to those it has, so regions that the peer has taken back since would stay, and hide new
        ones that lie across them. So the peer's older ones must be named.

        Args:
            metadata: the peer's.
            replaced: a peer's name whose metadata, and transfers that were prepared, are forgotten.
        """
        if replaced in self._peers:
            self._forget(lambda channel: channel[1] == replaced)
            self._peers.discard(replaced)
            self._nixl.remove_remote_agent(replaced)
        name = self._nixl.add_remote_agent(metadata)
        peer = name.decode() if isinstance(name, bytes) else str(name)
        self._peers.add(peer)
        return peer

    def prepare(self, operation: str, peer: str, rows: Rows, local: Place, remote: Place, plan: str = WHOLE) -> int:
        """Prepare a READ or WRITE; return its handle, which can be run again and again, until `release` of its plan."""
        devices = np.empty(len(rows), dtype=np.uint64)
        lists = []
        for column, place in ((0, local), (1, remote)):
            devices.fill(place.device)
            described = np.ascontiguousarray(np.stack([rows[:, column], rows[:, 2], devices], axis=1))
            lists.append(self._nixl.get_xfer_descs(described, place.memory))
        handle = next(self._numbers)
        self._transfers[handle] = _Prepared(self._nixl.initialize_xfer(operation, *lists, peer), (plan, peer))
        return handle

    def release(self, plan: str = WHOLE) -> None:
        """Forget what was prepared for a plan; nothing of it may be under way."""
        self._forget(lambda channel: channel[0] == plan)

    def attach_flags(self, peer: str, filled: int, loaded: int, plan: str = WHOLE) -> None:
        """Say where the peer counts filled buckets, and where this side is to count those that it has read."""
        words = np.zeros(_WORDS, dtype=np.int64)
        here, word = words.ctypes.data, words.itemsize
        self.register(here, words.nbytes, Place())
        rows = {"READ": [[here, filled, word]], "WRITE": [[here + word, loaded, word]]}
        ask, tell = (
            self.prepare(operation, peer, np.array(row, dtype=np.uint64), Place(), Place(), plan)
            for operation, row in rows.items()
        )
        self._flags[plan, peer] = _Flags(words, ask, tell)

    def channel(self, handle: int) -> Channel:
        """Return plan and peer of a transfer."""
        return self._transfers[handle].channel

    def is_filled(self, channel: Channel, bucket: int) -> bool:
        """Ask the peer whether it has filled that many buckets, without waiting for its word: ask again."""
        flags = self._flags[channel]
        if flags.words[0] < bucket:
            if not flags.asking:
                self.post(flags.ask)
            flags.asking = not self.done(flags.ask)
        return bool(flags.words[0] >= bucket)

    def note_read(self, channel: Channel, bucket: int) -> None:
        """Tell the peer that this side has read that many buckets, without waiting: `has_told` goes on telling."""
        self._flags[channel].read = bucket

    def has_told(self) -> bool:
        """Go on with what `note_read` has begun; return whether all peers know everything."""
        told = [self._has_told(flags) for flags in self._flags.values()]  # of each, whatever the first ones say
        return all(told)

    def post(self, handle: int) -> None:
        """Begin a transfer. Where the kernel copies (CMA), this is also its end."""
        self._nixl.transfer(self._transfers[handle].transfer)

    def done(self, handle: int) -> bool:
        """Ask whether a transfer has ended.

        Raises:
            RuntimeError, or an error of NIXL's: it failed.
        """
        state = self._nixl.check_xfer_state(self._transfers[handle].transfer)
        if state not in ("PROC", "DONE"):
            raise RuntimeError(f"NIXL ended a transfer in state {state}")
        return bool(state == "DONE")

    def _has_told(self, flags: _Flags) -> bool:
        if flags.telling:
            flags.telling = not self.done(flags.tell)
        if not flags.telling and flags.words[1] != flags.read:
            flags.words[1] = flags.read
            self.post(flags.tell)
            flags.telling = True
        return not flags.telling

    def _forget(self, chosen: Callable[[Channel], bool]) -> None:
        for handle in [handle for handle, prepared in self._transfers.items() if chosen(prepared.channel)]:
            self._nixl.release_xfer_handle(self._transfers.pop(handle).transfer)
        for channel in [channel for channel in self._flags if chosen(channel)]:
            self.deregister(self._flags.pop(channel).words.ctypes.data)


Channel = tuple[str, str]
"""The plan and the peer of transfers that share a pair of counters."""


@attrs.frozen(eq=False)
class _Prepared:
    transfer: Any
    channel: Channel


@attrs.define(eq=False)
class _Flags:
    """Counters of one channel: ``words`` hold what the peer has filled, and what this side has read of that.

    ``ask`` and ``tell`` are the transfers that bring the one and take the other, ``read`` is what is to be told.
    """

    words: NDArray[np.int64]
    ask: int
    tell: int
    asking: bool = False
    telling: bool = False
    read: int = 0
