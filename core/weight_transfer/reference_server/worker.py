"""The parts of a worker, put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.control.http_server import Server, require_free, require_token
from weight_transfer.control.tls import Tls
from weight_transfer.observers.update_metrics import UpdateMetrics
from weight_transfer.reference_server.batching import Batching
from weight_transfer.reference_server.hosted import host
from weight_transfer.reference_server.metrics import Metrics
from weight_transfer.reference_server.routes import Routes
from weight_transfer.session.receiver import WeightReceiver

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.values.events import Version

_CACHE_TOKENS = 8192  # on a CPU


@contextmanager
def open_worker(
    config: WeightTransferConfig,
    path: Path,
    address: str,
    port: int,
    name: str | None = None,
    device: str | None = None,
    version: Version = 0,
    cache_tokens: int | None = None,
) -> Iterator[Server]:
    """Serve a model inside of a block.

    Args:
        config: the worker's.
        path: of the model; see `host`.
        address: to listen on; anything but a loopback address demands ``config.token``.
        port: TCP port; 0 takes a free one.
        name: of the model; default is its folder's.
        device: torch device; default is the first GPU, else the CPU.
        version: of the weights that are in ``path``.
        cache_tokens: how many tokens the key-value cache has room for; by default 8192 on a CPU.

    Raises:
        ConfigError: the model cannot be loaded, the address not listened on, or a certificate file not read.
    """
    require_token(address, config.token)
    tls = Tls.of(config)
    tls.for_worker()  # a file that cannot be read, like a port that is taken, is told before minutes go into loading
    require_free(address, port)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    hosted, metrics = host(path, device, name), Metrics()
    if cache_tokens is None and device == "cpu":
        cache_tokens = _CACHE_TOKENS
    if cache_tokens is not None:  # a request that never fits would wait for ever
        hosted = attrs.evolve(hosted, context=min(hosted.context, cache_tokens))
    batching = Batching(hosted, cache_tokens, config.timeout)
    observers = (UpdateMetrics(metrics.registry),)
    with WeightReceiver(
        config, hosted.model, observers=observers, version=version if hosted.trained else None
    ) as receiver:
        metrics.watch(receiver)
        routes = Routes(hosted, batching, receiver, metrics, config.token)
        try:
            with Server(routes.app(), address, port, tls=tls) as server:
                yield server
        finally:
            batching.close()
