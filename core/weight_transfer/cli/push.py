"""``weight-transfer push``: a checkpoint to running workers, or each new one that a training run writes."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs
import click

from weight_transfer.cli import options

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.model.checkpoint import CheckpointSource
    from weight_transfer.session.sender import WeightSender
    from weight_transfer.values.events import Version

_LOOK = 0.5  # seconds between two looks at a folder


@click.command(short_help="Send a checkpoint to running workers.")
@click.argument("checkpoint", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--to", "addresses", metavar="URL", multiple=True, required=True, help="A worker; give it once for each of them."
)
@options.backend
@click.option(
    "--version", callback=options.as_version, help="Of the weights; default is the highest that is served, plus 1."
)
@click.option(
    "--verify",
    type=click.Choice(["none", "wire", "loaded"]),
    help="Compare digests of what was sent, and of what arrived or was loaded, before the version is published.",
)
@click.option(
    "--watch",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Send the newest checkpoint in DIR, then each new one as soon as it is complete, until Ctrl-C or SIGTERM.",
)
@click.option(
    "--settle",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="Seconds for which a checkpoint in DIR must not have changed.",
)
@click.option(
    "--device",
    callback=options.as_device,
    help="torch device that the tensors pass through; default is cuda if a worker says that its weights are on a GPU "
    "and there is one here, else cpu.",
)
@options.config_file
@options.token
@options.as_json
@click.pass_context
def push(
    ctx: click.Context,
    checkpoint: Path | None,
    addresses: tuple[str, ...],
    backend: str | None,
    version: Version | None,
    verify: str | None,
    watch: Path | None,
    settle: float,
    device: str | None,
    config_file: Path | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Send CHECKPOINT, a folder of safetensors files or one file, to running workers, and publish it on all of them.

    A worker is a URL; vllm+http://HOST:PORT is a server of vLLM's, with weight-transfer-vllm installed on both sides.

    On a terminal each worker has a bar while bytes move, as it tells itself how far it is; of many the first 32.

    With --watch a checkpoint is a folder in DIR. It is complete when the files that its index names are there, or
    model.safetensors, and none of them is shorter than its header says or changes any more. The number at the end of
    its name is its version. One that fails is not sent again; the next one is. One that is renamed once it is complete,
    or has a link as a second name, is sent once.

    The exit status is 1 if a worker did not get a checkpoint. --json prints a line for each checkpoint.

    \b
    Example:
      weight-transfer push ./checkpoint --to http://127.0.0.1:8001 --to http://127.0.0.1:8002
      weight-transfer push --watch ./run --to http://127.0.0.1:8001
    """  # noqa: D301  (click wants the character itself)
    if (checkpoint is None) is (watch is None):
        raise click.UsageError("Name either a CHECKPOINT or, with --watch, a folder of them.", ctx)
    if watch is not None and version is not None:
        raise click.UsageError("With --watch the names of checkpoints are their versions; leave --version out.", ctx)
    options.require("http", "httpx")
    from weight_transfer.model.checkpoint import CheckpointSource

    config = options.configured(config_file, "ipc", backend=backend, token=token, verify=verify)
    device = device or _device_of(addresses, config)
    pushed = True
    with _sender(config, addresses) as sender:
        if checkpoint is not None:
            pushed = _push(sender, CheckpointSource(checkpoint, device), version, as_json)
        elif watch is not None:
            with _until_interrupted() as stopped:
                for source, named in _written_into(watch, settle, device, stopped):
                    pushed &= _push(sender, source, named, as_json)
    if not pushed:
        ctx.exit(1)


def _device_of(addresses: Sequence[str], config: WeightTransferConfig) -> str:
    """Return the kind of memory that the workers' weights lie in, since most backends connect like with like."""
    import torch

    from weight_transfer.cli.status import ask_all

    workers = ask_all(addresses, config, config.init_timeout) if torch.cuda.is_available() else []
    return "cuda" if any(str(worker.get("device")).startswith("cuda") for worker in workers) else "cpu"


@contextmanager
def _sender(config: WeightTransferConfig, addresses: Sequence[str]) -> Iterator[WeightSender]:
    """Provide a sender that shows its progress on a terminal, worker by worker; close the channels with it."""
    from rich.console import Console

    from weight_transfer.cli.push_bars import WorkerBars, asking
    from weight_transfer.plugins.channels import worker_at
    from weight_transfer.session.sender import WeightSender

    screen = Console(stderr=True)
    with ExitStack() as stack:
        workers = [stack.enter_context(worker_at(address)) for address in addresses]
        bars: list[object] = []
        if screen.is_terminal:
            bars.append(WorkerBars(stack.enter_context(asking(addresses, config)), screen))
            others = tuple(name for name in config.observers if name != "progress")
            config = attrs.evolve(config, observers=others)
        yield stack.enter_context(WeightSender(config, workers, observers=tuple(bars)))


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """End a ``with`` block at Ctrl-C, or as a container is ended, and provide what that sets.

    In a finalizer, Python drops the exception.
    """
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.default_int_handler(number, frame)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with suppress(KeyboardInterrupt):
            yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _written_into(
    folder: Path, settle: float, device: str, stopped: threading.Event
) -> Iterator[tuple[CheckpointSource, Version]]:
    """Yield the newest checkpoint, then each new one, until that is stopped."""
    from weight_transfer.cli.checkpoints import Checkpoints, version_of

    checkpoints = Checkpoints(folder, settle, device)
    known = False
    while not stopped.is_set():
        new = checkpoints.new()
        for source in new:
            checkpoints.take(source)
        for source in new if known else new[-1:]:
            yield source, version_of(source.path)
        known = known or bool(new)
        if not new:
            stopped.wait(_LOOK)


def _push(sender: WeightSender, source: CheckpointSource, version: Version | None, as_json: bool) -> bool:
    """Send one checkpoint, say how it went, and return whether all workers have it."""
    from weight_transfer.errors import TransferError

    row: dict[str, Any] = {"checkpoint": str(source.path), "version": version}
    try:
        report = sender.send(source, version)
    except TransferError as error:
        row |= {"error": str(error), "peer": error.peer}
    else:
        row |= attrs.asdict(report) | {"error": None, "gbps": report.gbps, "total_seconds": report.total_seconds}
    if as_json:
        click.echo(json.dumps(row))
    elif row["error"]:
        click.echo(f"error: {row['checkpoint']}: {row['error']}", err=True)
    else:
        _show(row)
    return not row["error"] and not row["lost"]


def _show(row: dict[str, Any]) -> None:
    from weight_transfer.cli.tables import console, grid
    from weight_transfer.values.report import sized

    rate = row["nbytes"] / row["total_seconds"]
    total = f"{sized(row['nbytes'])} in {row['total_seconds']:.2f} s, {sized(rate)}/s"
    click.echo(f"{row['checkpoint']} is version {row['version']}: {total}")
    got = [(worker, "published", row["transports"].get(worker, "")) for worker in row["workers"]]
    console().print(grid([*got, *((worker, "lost", error) for worker, error in row["lost"])]))
    for warning in row["warnings"]:
        click.echo(f"warning: {warning}")
