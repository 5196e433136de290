"""The processes of ``benchmarks/overhead.py``: receivers behind servers, or workers that are only played."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import no_bytes

import weight_transfer as wt
from weight_transfer.control import create_app
from weight_transfer.control.http_server import Server

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


class Played:
    """A control channel that has no worker behind it, and says yes."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def start_weight_update(self, session: str | None = None) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        return {"transport": "nothing", "warnings": []}

    def finish_weight_update(self, weight_version: Any = None, session: str | None = None) -> None:
        pass

    def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
        pass

    def status(self) -> dict[str, Any]:
        return {"state": "ready", "version": None, "backend": no_bytes.NAME, "workers": 1, "id": str(id(self))}

    def when_sampled(self, tell: Callable[[], object]) -> Callable[[], None]:
        return lambda: None


class Players:
    """Many workers of one process behind one server, each at a path of its own."""

    def __init__(self, count: int) -> None:
        self._apps = {f"/{number}": create_app(Played()) for number in range(count)}
        self._server = Server(self, "127.0.0.1", 0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._apps["/0"](scope, receive, send)
            return
        at = "/" + scope["path"].split("/")[1]
        await self._apps[at]({**scope, "root_path": at}, receive, send)

    def urls(self) -> list[str]:
        return [self._server.url + path for path in self._apps]

    def close(self) -> None:
        self._server.close()
