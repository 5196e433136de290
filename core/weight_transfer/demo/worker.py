"""One inference worker: a model behind a `WeightReceiver`; run as a module it is a process with an HTTP server.

The process reads its settings as one JSON line from stdin, answers with one JSON line on stdout, and lives until its
stdin is closed: the kernel closes it when the trainer ends, in whatever way.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from weight_transfer.config.settings import WeightTransferConfig

_GRACE = 3.0  # seconds that a process may take to end after its trainer did


class InferenceWorker:
    """Holds a model, receives its weights and samples from it.

    Args:
        config: the trainer's configuration.
        seed: of the weights before the first update.
    """

    def __init__(self, config: WeightTransferConfig, seed: int) -> None:
        from weight_transfer.demo.model import make_model
        from weight_transfer.session.receiver import WeightReceiver

        self.model = make_model(seed)
        self.receiver = WeightReceiver(config, self.model)

    def generate(self, prompt: str, count: int) -> dict[str, Any]:
        """Return ``version`` and the ``tokens`` that it continues the prompt with."""
        from weight_transfer.demo.corpus import encode
        from weight_transfer.demo.model import generate

        with self.receiver.serving() as version:
            return {"version": version, "tokens": generate(self.model, encode(prompt), count)}

    def fingerprint(self) -> dict[str, Any]:
        """Return ``version`` and the ``sha256`` of its weights."""
        from weight_transfer.demo.model import fingerprint

        with self.receiver.serving() as version:
            return {"version": version, "sha256": fingerprint(self.model)}


def create_demo_app(worker: InferenceWorker) -> Starlette:
    """Return the ASGI app of `weight_transfer.create_app`, with ``POST /generate`` and ``GET /digest`` beside it."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Mount, Route

    from weight_transfer.control import create_app

    async def generate(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(worker.generate, **await request.json()))

    async def digest(_request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(worker.fingerprint))

    control = Mount("/", app=create_app(worker.receiver, worker.receiver.config.token))
    return Starlette(
        routes=[Route("/generate", generate, methods=["POST"]), Route("/digest", digest, methods=["GET"]), control]
    )


def main() -> None:
    """Serve until stdin is closed."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints from now on does not disturb the one answer
    settings = json.loads(sys.stdin.readline())
    ended = threading.Event()
    threading.Thread(target=_watch, args=(ended,), daemon=True).start()

    import torch

    from weight_transfer.control import Server
    from weight_transfer.plugins.read_config import load_config

    torch.set_num_threads(settings["threads"])
    worker = InferenceWorker(load_config(**settings["config"]), settings["seed"])
    with worker.receiver, Server(create_demo_app(worker), "127.0.0.1", 0) as server:
        with answer:
            answer.write(json.dumps({"url": server.url}) + "\n")
        ended.wait()
    sys.stderr.flush()
    os._exit(0)  # all is closed; tearing the libraries down would take another second or two


def _watch(ended: threading.Event) -> None:
    """Wait for the end of stdin, then give the process a while to end by itself."""
    sys.stdin.read()
    ended.set()
    time.sleep(_GRACE)
    os._exit(1)


if __name__ == "__main__":
    main()
