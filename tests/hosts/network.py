"""Three hosts and a switch between them: network namespaces, of which nothing shows in the machine's own network."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from hosts.cable import bad_cable

HOSTS = {"trainer": "10.99.0.1", "left": "10.99.0.2", "right": "10.99.0.3"}
"""Address of each host by name. Its interface is ``eth0``; that of the switch has the host's name."""


class UnavailableError(Exception):
    """This machine cannot do it; the text says why."""


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    except FileNotFoundError as error:
        raise UnavailableError(f"needs {command[0]}, of iproute2") from error
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{' '.join(command)}: {error.stderr.strip()}") from error


class Network:
    """The hosts, and what can go wrong between them.

    Attributes:
        frames: how many a bad cable has ``carried`` and ``lost``.
    """

    def __init__(self) -> None:
        self.frames: Counter[str] = Counter()
        self._prefix = f"wt-{os.getpid()}-"
        self._switch = self.namespace("switch")

    def namespace(self, host: str) -> str:
        """Return the name of a host's namespace."""
        return self._prefix + host

    def cut(self, host: str) -> None:
        """Pull the host's cable: nobody is told, packets go nowhere."""
        _run("ip", "-n", self._switch, "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Put the cable back."""
        _run("ip", "-n", self._switch, "link", "set", host, "up")

    @contextmanager
    def plugged(self, delay: float = 0.0, loss: float = 0.0) -> Iterator[None]:
        """Make it all, and take it away.

        Args:
            delay: seconds that the trainer's cable takes in each direction.
            loss: the fraction of packets that it loses.

        Raises:
            UnavailableError: this machine or this user makes no namespaces.
        """
        with ExitStack() as stack:
            for name in ("switch", *HOSTS):
                _run("ip", "netns", "add", self.namespace(name))
                stack.callback(_remove, self.namespace(name))
            _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for host, address in HOSTS.items():
                theirs = self.namespace(host)
                if host == "trainer" and (delay or loss):
                    try:
                        cable = bad_cable((self._switch, host), (theirs, "eth0"), delay, loss)
                        self.frames = stack.enter_context(cable)
                    except OSError as error:
                        raise UnavailableError(f"no TAP interface: {error}") from error
                else:
                    peer = ("type", "veth", "peer", "name", "eth0", "netns", theirs)
                    _run("ip", "-n", self._switch, "link", "add", host, *peer)
                self._plug(host, theirs, address)
            yield

    def _plug(self, host: str, theirs: str, address: str) -> None:
        _run("ip", "-n", self._switch, "link", "set", host, "master", "bridge", "up")
        _run("ip", "-n", theirs, "address", "add", f"{address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _run("ip", "-n", theirs, "link", "set", interface, "up")


def _remove(namespace: str) -> None:
    with suppress(UnavailableError):
        _run("ip", "netns", "del", namespace)
