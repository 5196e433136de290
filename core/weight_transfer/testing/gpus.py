"""GPUs that one test has to itself.

Kernels of NCCL wait for each other. Where tests share GPUs, their kernels take turns there, each waits for one that is
not running, and all of them stand still. So a test whose processes talk by NCCL takes GPUs of its own, among all tests
that run on this machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

OWN = pytest.StashKey[tuple[int, ...]]()
"""Of a test: the CUDA devices that no other test uses meanwhile."""

_PATIENCE = 3600.0  # seconds; other tests end by time limits of their own
_PAUSE = 0.05  # seconds


class OwnGpus:
    """A plugin of pytest that takes them before a test begins: waiting does not count towards its time limit.

    Args:
        wanted: returns how many a test needs.
        names: of all GPUs here, in the order of their CUDA devices.
    """

    def __init__(self, wanted: Callable[[pytest.Item], int], names: Sequence[str]) -> None:
        self._wanted, self._names = wanted, names

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run a test with its own GPUs."""
        with taken(self._wanted(item), self._names, _folder()) as item.stash[OWN]:
            return (yield)


def visible_gpus(count: int) -> Sequence[str]:
    """Return the names of this process's CUDA devices, which are the same in all processes of this machine.

    Args:
        count: how many there are.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


@contextmanager
def taken(count: int, names: Sequence[str], folder: Path, patience: float = _PATIENCE) -> Iterator[tuple[int, ...]]:
    """Have GPUs that nobody else has who asks for them by the same folder: first come, first served.

    Args:
        count: how many; they come in neighbouring groups of a power of two.
        names: of all GPUs.
        folder: for a lock each.
        patience: seconds to wait for them.

    Yields:
        The indices of their names.

    Raises:
        TimeoutError: they did not come free.
    """
    size = min(1 << (count - 1).bit_length(), len(names)) if count else 0
    groups = [tuple(range(start, start + size)) for start in range(0, len(names) - size + 1, size)] if size else [()]
    until = time.monotonic() + patience
    with ExitStack() as held:
        try:
            with FileLock(folder / "turn", timeout=patience) if size else ExitStack():
                group = _await_one(groups, names, folder, until, held)
        except Timeout as error:
            raise TimeoutError(
                f"No {size} GPUs came free within {patience:g} s; end the tests that hold the locks in {folder}."
            ) from error
        yield group


def _await_one(
    groups: Sequence[tuple[int, ...]], names: Sequence[str], folder: Path, until: float, held: ExitStack
) -> tuple[int, ...]:
    """Return the first group whose locks are all free; they are taken, and ``held``."""
    while True:
        for group in groups:
            with ExitStack() as attempt:
                try:
                    for index in group:
                        attempt.enter_context(FileLock(folder / names[index], timeout=0))
                except Timeout:
                    if time.monotonic() > until:
                        raise
                    continue
                held.push(attempt.pop_all())
                return group
        time.sleep(_PAUSE)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"weight-transfer-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
