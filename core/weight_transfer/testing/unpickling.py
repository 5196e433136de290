"""Notices whatever is unpickled in this process."""

from __future__ import annotations

import pickle  # noqa: TID251  (watched, not used)
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any
from unittest import mock

_lock = threading.Lock()
_watching: list[list[str]] = []
_patches = ExitStack()
_hooked: list[bool] = []


@contextmanager
def watched_unpickling() -> Iterator[list[str]]:
    """Record, inside a ``with`` block, who unpickles: the place of each call, in a list that grows.

    `pickle`, `torch.load` and multiprocessing's loads are watched by their names, and the import of classes out of
    a pickle, which no caller can hide, by the interpreter's audit event.
    """
    seen: list[str] = []
    with _lock:
        if not _watching:
            _watch()
        _watching.append(seen)
    try:
        yield seen
    finally:
        with _lock:
            _watching[:] = [other for other in _watching if other is not seen]
            if not _watching:
                _patches.close()


def _watch() -> None:
    import torch

    if not _hooked:
        sys.addaudithook(_on_audit)  # cannot be taken away again
        _hooked.append(True)
    for owner, name in ((pickle, "loads"), (pickle, "load"), (ForkingPickler, "loads"), (torch, "load")):
        _patches.enter_context(mock.patch.object(owner, name, staticmethod(_recorded(getattr(owner, name)))))
    _patches.enter_context(mock.patch.object(pickle, "Unpickler", _Unpickler))


def _recorded(call: Any) -> Any:
    def record(*args: Any, **kwargs: Any) -> Any:
        _record()
        return call(*args, **kwargs)

    return record


class _Unpickler(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _record()
        super().__init__(*args, **kwargs)


def _on_audit(event: str, _arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        _record()


def _record() -> None:
    if not _watching:
        return
    ours = (__file__, pickle.__file__)
    frame = next(frame for frame in reversed(traceback.extract_stack()) if frame.filename not in ours)
    for seen in _watching:
        seen.append(f"{frame.filename}:{frame.lineno}")
