"""``weight-transfer status``: what each worker serves, and since when."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weight_transfer.cli import options

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig

_MANY = 64  # workers that are asked at once
_BAD = ("failed", "refused", "unreachable")


@click.command(short_help="Ask workers what they serve.")
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@options.config_file
@options.token
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds that a worker may take to answer.",
)
@options.as_json
@click.pass_context
def status(
    ctx: click.Context,
    urls: tuple[str, ...],
    config_file: Path | None,
    token: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Ask each worker for its state, its version and its last error.

    All are asked at once. The exit status is 1 if one of them does not answer, refuses to or has failed; one that has
    failed serves nothing until it gets all weights anew. AGE says how long ago the version was published.

    STATE is ready or updating while a trainer has the worker, created while none does, and failed after an update that
    left no version to serve. Of a configuration the token and the certificate files count.

    \b
    Example:
      weight-transfer status http://127.0.0.1:8001 http://127.0.0.1:8002
    """  # noqa: D301  (click wants the character itself)
    options.require("http", "httpx")
    from weight_transfer.cli.tables import console, grid

    workers = ask_all(urls, options.configured(config_file, "loopback", token=token), timeout)
    if as_json:
        click.echo(json.dumps(workers, indent=2))
    else:
        with_digest = any(worker.get("digest") for worker in workers)
        header = ["URL", "STATE", "VERSION", *(["DIGEST"] if with_digest else []), "AGE", "BACKEND", "WORKERS"]
        console().print(grid([_row(worker, with_digest) for worker in workers], header))
        for worker in workers:
            if worker.get("error"):
                click.echo(f"{worker['url']}: {worker['error'].removeprefix(worker['url'] + ': ')}")
    if any(worker["state"] in _BAD for worker in workers):
        ctx.exit(1)


def ask_all(urls: Sequence[str], config: WeightTransferConfig, timeout: float) -> list[dict[str, Any]]:
    """Return each worker's status with its ``url``, all asked at once; a state that is `_BAD` comes with an ``error``.

    Args:
        urls: of workers.
        config: has the token of all of them, and the certificate files.
        timeout: seconds that one may take to answer.
    """
    with ThreadPoolExecutor(min(len(urls), _MANY)) as pool:
        return list(pool.map(partial(_ask, config=config, timeout=timeout), urls))


def _ask(url: str, config: WeightTransferConfig, timeout: float) -> dict[str, Any]:
    """Return a worker's status, with its ``url``; one that tells none is ``refused`` or ``unreachable``."""
    from weight_transfer.control import HttpChannel, Tls
    from weight_transfer.errors import HandshakeError, WeightTransferError
    from weight_transfer.plugins.channels import worker_at

    with ExitStack() as stack:
        channel = stack.enter_context(worker_at(url))
        if isinstance(channel, str):
            channel = HttpChannel(
                channel, token=config.token, timeout=timeout, connect_timeout=timeout, tls=Tls.of(config)
            )
            stack.enter_context(channel)
        try:
            told = channel.status() or {"state": "unknown", "error": "its server does not tell its status"}
        except WeightTransferError as error:
            told = {"state": "refused" if isinstance(error, HandshakeError) else "unreachable", "error": str(error)}
    return {"url": url, **told}


def _row(worker: dict[str, Any], with_digest: bool) -> list[str]:
    digest = [str(worker.get("digest") or "")[:12]] if with_digest else []
    return [
        worker["url"],
        str(worker.get("state")),
        _versions(worker),
        *digest,
        _age(worker.get("published")),
        str(worker.get("backend") or ""),
        str(worker.get("workers") or ""),
    ]


def _versions(worker: dict[str, Any]) -> str:
    """Return the version, and those of the further models by their names."""
    versions = worker.get("versions") or {}
    others = [f"{target}: {version}" for target, version in versions.items() if target != "model"]
    return ", ".join([str(worker["version"]) if worker.get("version") is not None else "-", *others])


def _age(published: float | None) -> str:
    if published is None:
        return ""
    seconds = max(0.0, time.time() - published)  # noqa: TID251  (the time of day)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
