"""The processes of ``benchmarks/overhead.py``: receivers behind servers, or workers that are only played."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import h11
import no_bytes

import weight_transfer as wt
from weight_transfer.control import line

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage

CONFIG = {"backend": no_bytes.NAME, "verify": "none", "timeout": 60, "init_timeout": 60}


def main(stage: Stage, kind: str, given: dict[str, int]) -> None:
    """Host `Workers` or `Players`."""
    with closing({"Workers": Workers, "Players": Players}[kind](**given)) as host:
        stage.serve({name: getattr(host, name) for name in ("urls", "seconds") if hasattr(host, name)})


class Timed(wt.WeightReceiver):
    """Takes the time of its calls."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def start_weight_update(self, session: str | None = None) -> None:
        with self._timed("start"):
            super().start_weight_update(session)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        with self._timed("update"):
            return super().update_weights(update_info)

    def finish_weight_update(self, weight_version: Any = None, session: Any = None, update: Any = None) -> None:
        with self._timed("finish"):
            super().finish_weight_update(weight_version, session, update)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase].append(time.perf_counter() - since)


class Workers:
    """Some receivers of one process, each behind a server."""

    def __init__(self, params: int, count: int) -> None:
        model = no_bytes.Tiny(params)
        self._receivers = [Timed(CONFIG, model) for _ in range(count)]
        self._servers = [wt.serve(receiver) for receiver in self._receivers]

    def urls(self) -> list[str]:
        return [server.url for server in self._servers]

    def seconds(self) -> list[dict[str, list[float]]]:
        return [dict(receiver.seconds) for receiver in self._receivers]

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for receiver in self._receivers:
            receiver.close()


class Players:
    """Many workers that one event loop plays, each at a path of its own: they say yes at once, and have no model.

    What they cost is not what is measured, so there is nothing of a server in them but the words of a line.
    """

    def __init__(self, count: int) -> None:
        self._paths = [f"/{number}" for number in range(count)]
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(self._loop.create_server(Player, "127.0.0.1", 0, backlog=count))
        self._thread = threading.Thread(target=self._loop.run_forever, name="players")
        self._thread.start()

    def urls(self) -> list[str]:
        host, port = self._server.sockets[0].getsockname()
        return [f"http://{host}:{port}{path}" for path in self._paths]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        self._loop.close()


class Player(asyncio.Protocol):
    """One connection to a worker that is played: some requests, of which the last may open a line."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._http: h11.Connection | None = h11.Connection(h11.SERVER)
        self._target = ""
        self._chunks, self._messages = line.Chunks(), line.Messages()

    def data_received(self, data: bytes) -> None:
        if self._http is not None:
            self._http.receive_data(data)
            self._answer_requests(self._http)
            return
        for part in self._chunks.feed(data):
            for message in self._messages.feed(part):
                self._answer(json.loads(message))

    def _answer(self, call: dict[str, Any]) -> None:
        if "id" in call:
            said = self._said_to(call["call"])
            answer = {"id": call["id"], "status": 204 if said is None else 200, "body": said}
            self._transport.write(line.framed(json.dumps(answer).encode()))

    def _answer_requests(self, http: h11.Connection) -> None:
        while (event := http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Request):
                self._target = event.target.decode().rpartition("/")[2]
                if self._target == line.ROUTE:
                    self._send(h11.Response(status_code=200, headers=[("Transfer-Encoding", "chunked")]))
                    self._transport.write(line.framed(line.HELLO))
                    self._http = None
                    return
            elif isinstance(event, h11.EndOfMessage):
                said = self._said_to(self._target)
                body = b"" if said is None else json.dumps(said).encode()
                headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
                self._send(h11.Response(status_code=200 if body else 204, headers=headers if body else []))
                self._send(h11.Data(data=body))
                self._send(h11.EndOfMessage())
                http.start_next_cycle()

    def _send(self, event: h11.Event) -> None:
        assert self._http is not None
        self._transport.write(self._http.send(event) or b"")

    def _said_to(self, call: str) -> dict[str, Any] | None:
        if call == "status":
            known = {"state": "ready", "version": None, "backend": no_bytes.NAME}
            return {**known, "workers": 1, "id": str(id(self)), "line": True}
        if call in ("update_weights", "begin_weight_update"):
            return {"transport": "nothing", "warnings": []}
        return None
