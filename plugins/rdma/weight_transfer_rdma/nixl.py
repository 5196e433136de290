"""One NIXL agent: memory regions, a connection to the trainer's agent, prepared transfers. Needs numpy and NIXL only.

Everything here may block, abort the process or crash it; `weight_transfer_rdma.process` is where it is contained.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

MODULES = ("nixl_cu12", "nixl_cu13")
"""NIXL's builds, by the CUDA version that they load; without a GPU either will do."""

Rows = NDArray[np.uint64]
"""Transfers, ``[n, 3]``: local address, remote address, bytes."""

DRAM, VRAM = "DRAM", "VRAM"

_WORDS = 2
_FIRST_PAUSE, _LONGEST_PAUSE = 2e-5, 1e-3  # seconds between two looks at a transfer
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
        progress: whether a thread of NIXL's drives transfers; without it they go on in `done` and `wait` only, and
            peers whose transfers need this side's processor (TCP) wait for as long.
    """

    def __init__(self, name: str, module: str, progress: bool = True) -> None:
        api = load(module)
        self._nixl: Any = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress, backends=[]))
        # Mode "none" would wait for ever for a peer that died.
        self._nixl.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
        self._transfers: list[Any] = []
        self._regions: dict[int, Any] = {}
        self._words = np.zeros(_WORDS, dtype=np.int64)
        self.register(self._words.ctypes.data, self._words.nbytes, Place())
        self._flags: tuple[int, int] | None = None
        self._peer: str | None = None
        self._asking = self._telling = False
        self._read = 0

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

    def connect(self, metadata: bytes) -> str:
        """Load the peer's metadata, also newer ones; return its name. Transfers that were prepared are forgotten.

        NIXL adds newer metadata to those it has, so regions that the peer has taken back since would stay, and hide new
        ones that lie across them.
        """
        if self._peer is not None:
            self.release()
            peer, self._peer = self._peer, None
            self._nixl.remove_remote_agent(peer)
        name = self._nixl.add_remote_agent(metadata)
        self._peer = name.decode() if isinstance(name, bytes) else str(name)
        return self._peer

    def prepare(self, operation: str, peer: str, rows: Rows, local: Place, remote: Place) -> int:
        """Prepare a READ or WRITE; return its handle, which can be run again and again."""
        devices = np.empty(len(rows), dtype=np.uint64)
        lists = []
        for column, place in ((0, local), (1, remote)):
            devices.fill(place.device)
            described = np.ascontiguousarray(np.stack([rows[:, column], rows[:, 2], devices], axis=1))
            lists.append(self._nixl.get_xfer_descs(described, place.memory))
        self._transfers.append(self._nixl.initialize_xfer(operation, *lists, peer))
        return len(self._transfers) - 1

    def release(self) -> None:
        """Forget all prepared transfers; none may be under way."""
        for transfer in self._transfers:
            self._nixl.release_xfer_handle(transfer)
        self._transfers.clear()
        self._flags = None
        self._asking = self._telling = False

    def attach_flags(self, peer: str, filled: int, loaded: int) -> None:
        """Say where the peer counts filled buckets, and where this side is to count those that it has read."""
        self._words[:], self._read = 0, 0
        word = self._words.itemsize
        read = np.array([[self._words.ctypes.data, filled, word]], dtype=np.uint64)
        write = np.array([[self._words.ctypes.data + word, loaded, word]], dtype=np.uint64)
        self._flags = tuple(  # type: ignore[assignment]
            self.prepare(operation, peer, rows, Place(), Place())
            for operation, rows in (("READ", read), ("WRITE", write))
        )

    def run(self, handle: int, bucket: int = 0) -> None:
        """Run a transfer to its end.

        Args:
            handle: from `prepare`.
            bucket: if positive, first wait until the peer has filled that many buckets, and afterwards tell it so.
        """
        pause = _FIRST_PAUSE
        while not self.filled(bucket):
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self.post(handle)
        self.wait(handle)
        if bucket:
            self.tell_read(bucket)

    def filled(self, bucket: int, check: Callable[[], None] = lambda: None) -> bool:
        """Ask the peer whether it has filled that many buckets; for ``check`` see `wait`."""
        if self._words[0] < bucket:
            assert self._flags is not None
            self.post(self._flags[0])
            self.wait(self._flags[0], check)
        return bool(self._words[0] >= bucket)

    def tell_read(self, bucket: int, check: Callable[[], None] = lambda: None) -> None:
        """Tell the peer that this side has read that many buckets; for ``check`` see `wait`."""
        self._words[1] = bucket
        assert self._flags is not None
        self.post(self._flags[1])
        self.wait(self._flags[1], check)

    def is_filled(self, bucket: int) -> bool:
        """As `filled`, but without waiting for the peer's word: ask again."""
        if self._words[0] < bucket:
            assert self._flags is not None
            if not self._asking:
                self.post(self._flags[0])
            self._asking = not self.done(self._flags[0])
        return bool(self._words[0] >= bucket)

    def note_read(self, bucket: int) -> None:
        """As `tell_read`, but without waiting: `has_told` goes on telling."""
        self._read = bucket
        self.has_told()

    def has_told(self) -> bool:
        """Go on with what `note_read` has begun; return whether the peer knows everything."""
        if self._flags is None:
            return True  # no buckets: there is nothing to tell
        if self._telling:
            self._telling = not self.done(self._flags[1])
        if not self._telling and self._words[1] != self._read:
            self._words[1] = self._read
            self.post(self._flags[1])
            self._telling = True
        return not self._telling

    def post(self, handle: int) -> None:
        """Begin a transfer. Where the kernel copies (CMA), this is also its end."""
        self._nixl.transfer(self._transfers[handle])

    def done(self, handle: int) -> bool:
        """Ask whether a transfer has ended.

        Raises:
            RuntimeError, or an error of NIXL's: it failed.
        """
        state = self._nixl.check_xfer_state(self._transfers[handle])
        if state not in ("PROC", "DONE"):
            raise RuntimeError(f"NIXL ended a transfer in state {state}")
        return bool(state == "DONE")

    def wait(self, handle: int, check: Callable[[], None] = lambda: None) -> None:
        """Wait for the end of a transfer.

        Args:
            handle: from `prepare`.
            check: called now and then; what it raises ends the waiting, though not the transfer.
        """
        pause = _FIRST_PAUSE
        while not self.done(handle):
            check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
