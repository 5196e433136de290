"""``weight-transfer serve``: the options; the worker itself is `weight_transfer.reference_server`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weight_transfer.cli import options

if TYPE_CHECKING:
    from weight_transfer.values.events import Version


@click.command(short_help="Serve a language model that takes weight updates.")
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@options.backend
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; beyond loopback it needs a token."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="TCP port; 0: a free one.")
@click.option("--name", help="What requests call the model; default is its folder's name.")
@click.option("--device", callback=options.as_device, help="torch device; default is cuda if there is a GPU, else cpu.")
@click.option("--version", callback=options.as_version, default="0", show_default=True, help="Of the weights in MODEL.")
@click.option(
    "--cache-tokens",
    type=click.IntRange(min=1),
    help="Tokens that the key-value cache has room for; default is 8192 on a CPU, and 0.4 of a GPU's free memory.",
)
@options.config_file
@options.token
def serve(
    model: Path,
    backend: str | None,
    host: str,
    port: int,
    name: str | None,
    device: str | None,
    version: Version,
    cache_tokens: int | None,
    config_file: Path | None,
    token: str | None,
) -> None:
    """Serve MODEL, a folder with a Hugging Face causal language model, to OpenAI clients, and take weight updates.

    MODEL has config.json and safetensors files. It may also be a config.json by itself: then the weights are random,
    and requests wait for the first update. The routes are /v1/completions, /v1/chat/completions, /v1/models, /metrics,
    /healthz and those of the control channel. Each answer names the version of the weights that made it. Requests under
    way when an update comes end on the old version, and others wait for the new one. With a token every request needs
    it, as OpenAI's API key.

    \b
    Example:
      weight-transfer serve ./model --port 8001
      weight-transfer push ./checkpoint --to http://127.0.0.1:8001
    """  # noqa: D301  (click wants the character itself)
    options.require("serve", "httpx", "prometheus_client", "starlette", "transformers", "uvicorn")
    config = options.configured(config_file, "ipc", backend=backend, token=token)
    click.echo(f"Loading {model}")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: threads that spin longer crawl on a busy machine
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends a container ends the worker in order, too
    from weight_transfer.reference_server.worker import open_worker

    with open_worker(config, model, host, port, name, device, version, cache_tokens) as server:
        click.echo(f"Serving {server.url} over {config.backend}; Ctrl-C ends it.")
        server.wait()
