"""Sends malformed requests to a worker's HTTP server, and good updates in between.

    python benchmarks/http_fuzz.py --requests 20000 --json fuzz.json

A worker runs in a process of its own, over ``ipc``. Eight threads send it junk (`http_junk`): bodies made of the
server's own OpenAPI description, damaged ones, foreign headers, contradicting lengths, lines, noise. After every part a
trainer sends an update, whose bits the worker's are compared with. At the end: statuses by kind, answers of 500 with
what they say, requests without an end, and what the worker held after each part: memory, descriptors and threads.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch
from http_junk import Junk
from torch import nn

import weight_transfer as wt

TOKEN = "0123456789abcdef"
CONFIG: dict[str, Any] = {"backend": "ipc", "token": TOKEN, "timeout": 20, "init_timeout": 20}
THREADS = 8
_PATIENCE = 10.0  # seconds that an answer may take


def model(seed: int) -> nn.Module:
    """Return weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))


def digest(module: nn.Module) -> str:
    """Return what tells one model's bits from another's."""
    return "".join(parameter.detach().numpy().tobytes().hex() for parameter in module.parameters())


def serve() -> None:
    """Be the worker, until the standard input ends: tell the URL, and the digest of the weights for each line."""
    served = model(0)
    limits = wt.HttpLimits(stranger_seconds=2, body_seconds=2, body_bytes="1MiB")
    with wt.WeightReceiver(CONFIG, served) as receiver, wt.serve(receiver, limits=limits) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(digest(served), flush=True)


class Worker:
    """The worker's process."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._line()

    def digest(self) -> str:
        """Ask for the digest of its weights."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()

    def holds(self) -> dict[str, int]:
        """Return what the process holds: memory in MB, descriptors and threads."""
        place = Path(f"/proc/{self._process.pid}")
        status = dict(line.split(":", 1) for line in Path(place, "status").read_text().splitlines())
        return {
            "MB": int(status["VmRSS"].split()[0]) // 1000,
            "descriptors": len(os.listdir(place / "fd")),
            "threads": int(status["Threads"]),
        }

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Fuzz:
    """Sends junk from several threads, and counts what comes back."""

    def __init__(self, url: str, seed: int) -> None:
        self._address = httpx.URL(url)
        description = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
        self._junk = [Junk(description.json(), TOKEN, seed * THREADS + number) for number in range(THREADS)]
        self._lock = threading.Lock()
        self.answers: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []

    def run(self, count: int) -> None:
        """Send so many requests."""
        threads = [threading.Thread(target=self._send, args=(junk, count // THREADS)) for junk in self._junk]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _send(self, junk: Junk, count: int) -> None:
        for _ in range(count):
            kind, data = junk.request()
            answer, text = self._ask(kind, data)
            with self._lock:
                self.answers[f"{kind} {answer}"] += 1
                if answer == "no end" or answer.startswith("5"):
                    self.failures.append({"answer": answer, "said": text, "sent": repr(data[:1000])})

    def _ask(self, kind: str, data: bytes) -> tuple[str, str]:
        """Return the status of the first answer, or what came instead, and its beginning."""
        with socket.create_connection((self._address.host, self._address.port or 80), _PATIENCE) as line:
            heard = b""
            try:
                line.sendall(data)
                if kind in ("noise", "bent"):  # they ask for nothing, so nothing ends the connection but this
                    line.shutdown(socket.SHUT_WR)
                while len(heard) < 2**16 and (part := line.recv(2**16)):
                    heard += part
            except TimeoutError:
                return "no end", heard[:500].decode("latin-1")
            except OSError:  # it hung up before all was sent
                pass
        statuses = (b'"status":500', b"HTTP/1.1 500")
        answer = "500" if any(status in heard for status in statuses) else heard[9:12].decode("latin-1")
        return answer or "closed", heard[:1000].decode("latin-1")


def main() -> int:
    """Run it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--parts", type=int, default=10, help="after each a good update is sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve()
        return 0
    since = time.monotonic()
    worker = Worker()
    fuzz = Fuzz(worker.url, arguments.seed)
    held: list[dict[str, int]] = []
    good = 0
    with wt.WeightSender(CONFIG, [worker.url]) as sender:
        for part in range(arguments.parts):
            fuzz.run(arguments.requests // arguments.parts)
            weights = model(part % 3)
            sender.send(weights, version=part)
            good += worker.digest() == digest(weights)
            held.append(worker.holds())
            print(f"part {part + 1}: {held[-1]}, {sum(fuzz.answers.values())} requests", flush=True)
    worker.close()
    results = {
        "seconds": round(time.monotonic() - since, 1),
        "requests": sum(fuzz.answers.values()),
        "answers": dict(sorted(fuzz.answers.items())),
        "failures": fuzz.failures[:50],
        "failed": len(fuzz.failures),
        "good updates": good,
        "updates": arguments.parts,
        "held": held,
    }
    print(json.dumps(results, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2))
    return int(bool(fuzz.failures) or good != arguments.parts)


if __name__ == "__main__":
    sys.exit(main())
