"""A cable that delays and loses what goes through it, in either direction."""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from support.host import enter_network

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
_FRAME = 65536


@contextmanager
def bad_cable(one: tuple[str, str], other: tuple[str, str], delay: float, loss: float) -> Iterator[Counter[str]]:
    """Join two interfaces that it makes, each ``(namespace, interface)``, up until the ``with`` block ends.

    Yields:
        how many frames were ``carried`` and how many ``lost``, until now.

    Args:
        one: an end.
        other: the other end.
        delay: seconds in each direction.
        loss: the fraction of frames that is lost in each direction.

    Raises:
        OSError: this machine has no TAP interfaces, or this user may not make them.
    """
    ends: list[int] = []
    frames: Counter[str] = Counter()
    stop = threading.Event()
    carrier = threading.Thread(target=_carry, args=(ends, delay, loss, frames, stop), name="bad cable", daemon=True)
    try:
        for namespace, interface in (one, other):
            ends.append(_tap(namespace, interface))
            subprocess.run(["ip", "-n", namespace, "link", "set", interface, "up"], check=True, timeout=10)
        carrier.start()
        yield frames
    finally:
        stop.set()
        if carrier.ident is not None:
            carrier.join()
        for end in ends:
            os.close(end)


def _tap(namespace: str, interface: str) -> int:
    """Return a descriptor of a new interface in a namespace, which a thread of its own enters."""

    def make() -> int:
        enter_network(namespace)
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _IFF_TAP | _IFF_NO_PI))
        return end

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _carry(ends: list[int], delay: float, loss: float, frames: Counter[str], stop: threading.Event) -> None:
    one, other = ends
    opposite = {one: other, other: one}
    chance = random.Random(1)
    under_way: deque[tuple[float, int, bytes]] = deque()
    while not stop.is_set():
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.1
        for end in select.select(ends, [], [], min(wait, 0.1))[0]:
            frame = os.read(end, _FRAME)
            fate = "lost" if chance.random() < loss else "carried"
            frames[fate] += 1
            if fate == "carried":
                under_way.append((time.monotonic() + delay, opposite[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            os.write(end, frame)
