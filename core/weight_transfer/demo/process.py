"""A worker in a process of its own, behind HTTP; `weight_transfer.demo.worker` is the other side."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.config.structuring import unstructure
from weight_transfer.errors import PeerLostError, TransferTimeoutError

if TYPE_CHECKING:
    import httpx

    from weight_transfer.config.settings import WeightTransferConfig

_START_TIMEOUT = 300.0  # seconds that a process may take to import and to build its model
_END_TIMEOUT = 5.0  # seconds from the end of its stdin to SIGKILL
_TAIL, _TAIL_LINES = 4000, 12  # bytes and lines that are shown of a dead worker's stderr
_THREADS = 1  # CPU threads of a worker


class ProcessWorker:
    """A process that runs `weight_transfer.demo.worker`. It ends when its stdin does."""

    def __init__(self, config: WeightTransferConfig, index: int) -> None:
        self.peer = self.name = f"worker {index}"
        self._timeout = config.timeout
        self._token = config.token
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self._client: httpx.Client | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "weight_transfer.demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | {"OMP_NUM_THREADS": str(_THREADS)},
            start_new_session=True,  # Ctrl-C is the trainer's; the workers end in order
        )
        self.where = f"process {self._process.pid}"
        settings = {"config": unstructure(config), "seed": index + 1, "threads": _THREADS}
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; wait_up says so
            self._process.stdin.write(json.dumps(settings).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def channel(self) -> str:
        return self.peer

    def wait_up(self) -> None:
        """Wait until the process serves; from here on its URL is its name."""
        import httpx

        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], _START_TIMEOUT)[0]:
            raise TransferTimeoutError(f"{self._title} was not up after {_START_TIMEOUT:g} s.", peer=self.peer)
        line = stdout.readline()
        if not line:
            self.check(grace=_END_TIMEOUT)
        self.peer = json.loads(line)["url"]
        self.name = f"worker {self.peer}"
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._client = httpx.Client(base_url=self.peer, headers=headers, timeout=self._timeout, trust_env=False)

    def check(self, grace: float = 0.0) -> None:
        """Raise if the process has ended.

        Args:
            grace: seconds to wait for that.
        """
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        code = self._process.poll()
        if code is None:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        tail = self._tail()
        message = f"{self._title} {how}" + (f"; the end of its stderr:\n{tail}" if tail else ".")
        raise PeerLostError(message, peer=self.peer)

    def generate(self, prompt: str, count: int) -> dict[str, Any]:
        return self._request("POST", "/generate", json={"prompt": prompt, "count": count})

    def fingerprint(self) -> dict[str, Any]:
        return self._request("GET", "/digest")

    def status(self) -> dict[str, Any]:
        return self._request("GET", "/status")

    def hang_up(self) -> None:
        """Close its stdin, which tells it to end."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        """Wait for its end, and enforce it."""
        try:
            self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._client is not None:
            self._client.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stderr.close()

    @property
    def _title(self) -> str:
        return f"{self.name} ({self.where})"

    def _tail(self) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - _TAIL))
        lines = self._stderr.read().decode(errors="replace").rstrip().splitlines()
        return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])

    def _request(self, method: str, route: str, **body: Any) -> dict[str, Any]:
        import httpx

        assert self._client is not None, "wait_up comes first"
        try:
            response = self._client.request(method, route, **body)
            response.raise_for_status()
        except httpx.HTTPError as error:
            self.check(grace=1.0)
            cause = f"{type(error).__name__}: {error}"
            raise PeerLostError(f"{self._title} did not answer {route}.", peer=self.peer, cause=cause) from error
        answer: dict[str, Any] = response.json()
        return answer
