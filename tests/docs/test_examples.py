"""What the documentation shows works: Python runs between real processes, TOML is read, commands are parsed."""

from __future__ import annotations

import ast
import re
import shlex
import socket
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import pytest

from support.actors import Actor
from support.pages import PAGES, ROOT, Block, blocks
from weight_transfer.cli import main
from weight_transfer.plugins.read_config import load_config

PORT = re.compile(r"\b80\d\d\b")
SECONDS = 120
WORKERS = """
import weight_transfer as wt
receivers = [wt.WeightReceiver("sync.toml", type(model)(*(type(m)(m.in_features, m.out_features) for m in model)))
    for _ in PORTS]
servers = [wt.serve(receiver, port=port) for receiver, port in zip(receivers, PORTS)]
"""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python" and not block.quoted]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_block_says_whether_it_runs(page: Path) -> None:
    for block in python(page):
        ast.parse(block.code)
        assert block.mark, f"{name_of(page)}:{block.line}: put <!-- run --> before it, or <!-- not run: why -->"
        assert block.mark != "not run" or block.argument, f"{name_of(page)}:{block.line}: say why it is not run"


@pytest.mark.timeout(5 * SECONDS)  # a page may have several scripts
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.mark == "run" for b in python(page))], ids=name_of)
def test_the_examples_run(page: Path, tmp_path: Path) -> None:
    marked = [block for block in python(page) if block.mark == "run"]
    assert {block.argument for block in marked} <= {"", "worker", "trainer", "trainer, 2 ranks"}
    worker = [block for block in marked if block.argument == "worker"]
    trainer = [block for block in marked if block.argument in ("", "trainer")]
    sharded = [block for block in marked if block.argument == "trainer, 2 ranks"]
    with ExitStack() as stack:
        ports = {shown: stack.enter_context(free_port()) for block in marked for shown in PORT.findall(block.code)}
        write_files(page, tmp_path, ports)
        code = with_ports(worker, ports)
        own = {shown for block in worker for shown in PORT.findall(block.code)}
        others = [port for shown, port in ports.items() if shown not in own]
        workers = []
        if worker:
            workers.append(stack.enter_context(example(page, tmp_path, code)))
            for port in others:  # the same worker once more
                [shown] = own
                workers.append(stack.enter_context(example(page, tmp_path, with_ports(worker, {shown: port}))))
        elif ports:
            standard = WORKERS.replace("PORTS", str(others))
            workers.append(stack.enter_context(example(page, tmp_path, [(0, standard, False)])))
        if trainer:
            with example(page, tmp_path, with_ports(trainer, ports)) as process:
                finish([process], tmp_path)
        for block in sharded:  # each a script of its own, as torchrun starts it
            with ExitStack() as ranks:
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.enter_context(free_port()))}
                script = with_ports([block], ports)
                finish(
                    [
                        ranks.enter_context(
                            example(
                                page, tmp_path, script, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **where
                            )
                        )
                        for rank in range(2)
                    ],
                    tmp_path,
                )
        finish(workers, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_configurations_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "toml" and not block.quoted:
            data = tomllib.loads(block.code)
            if block.title != "pyproject.toml":
                load_config(data)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_valid(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in blocks(page):
        for line in block.code.splitlines() if block.language == "bash" else ():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program == "make":
                assert arguments[0] in targets, line
            if program == "weight-transfer":
                parse(main, program, arguments)


def parse(command: click.Command, name: str, arguments: list[str], parent: click.Context | None = None) -> None:
    context = command.make_context(name, list(arguments), parent=parent)
    if isinstance(command, click.Group):
        child_name, child, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert child is not None
        parse(child, str(child_name), rest, context)


@contextmanager
def free_port() -> Iterator[int]:
    """Keep a port from everybody but servers that reuse addresses, as ours do, for as long as the block lasts."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def with_ports(part: list[Block], ports: dict[str, int]) -> list[tuple[int, str, bool]]:
    """Return lines, code, and whether it is a whole script, of a page.

    The ports that it shows are replaced by free ones, and a final endless wait is left out.
    """
    return [
        (
            block.line,
            PORT.sub(lambda match: str(ports.get(match[0], match[0])), block.code).removesuffix("server.wait()\n"),
            block.title is not None,
        )
        for block in part
    ]


def write_files(page: Path, folder: Path, ports: dict[str, int]) -> None:
    """Write the blocks that are files; a pyproject.toml is installed, as far as its entry points go."""
    for block in blocks(page):
        if not block.title or block.quoted or "/" in block.title or block.mark == "not run":
            continue
        (folder / block.title).write_text(block.code)
        if block.title == "pyproject.toml":
            project = tomllib.loads(block.code)["project"]
            info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
            points = [f"[{group}]\n{k} = {v}\n" for group, g in project["entry-points"].items() for k, v in g.items()]
            (info / "entry_points.txt").write_text("".join(points))


@contextmanager
def example(page: Path, folder: Path, code: list[tuple[int, str, bool]], **environ: str) -> Iterator[Actor]:
    """Run code of a page in a process; the process has ended when the block is left."""
    log = str(folder / "log")
    process = Actor("example", page=name_of(page), folder=str(folder), code=code, log=log, environ=environ)
    try:
        yield process
    finally:
        process.stop()


def finish(processes: list[Actor], folder: Path) -> None:
    """Wait until processes have run their examples; if one fails, show what all of the page's processes printed."""
    try:
        for process in processes:
            process.reply(SECONDS)
    except AssertionError as error:
        pytest.fail(f"{error}\n{(folder / 'log').read_text()}")
