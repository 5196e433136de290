"""One safetensors file, read with plain reads.

The safetensors library maps files into memory, and a mapped file that somebody truncates ends the process with SIGBUS.
A trainer must survive that, so the header (8 bytes of length, then JSON) is read here.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from weight_transfer.config.structuring import brief
from weight_transfer.errors import IntegrityError
from weight_transfer.model.manifest import ParamMeta, torch_dtype

_LENGTH = struct.Struct("<Q")
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # to open a pipe would wait for whoever writes into it
_MAX_HEADER = 100_000_000  # bytes; the library's own limit

# The format's names, from the safetensors documentation.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}


@attrs.frozen
class Stamp:
    """What tells a file from one that took its place or was written to."""

    device: int
    inode: int
    nbytes: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of the file at ``path`` as it is now; None if there is none."""
    try:
        return Stamp.of(path.stat())
    except FileNotFoundError:
        return None


@attrs.frozen
class Entry:
    """A tensor of a file, and the offset of its first byte in it."""

    meta: ParamMeta
    offset: int


@attrs.frozen
class SafetensorsFile:
    """A file whose header has been read.

    Attributes:
        path: where it is.
        stamp: of the file whose header it was.
        entries: its tensors, in the order of their bytes.
    """

    path: Path
    stamp: Stamp
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, path: Path) -> SafetensorsFile:
        """Read the header.

        Raises:
            OSError: the file cannot be opened.
            IntegrityError: it is truncated or damaged, or no regular file.
        """
        descriptor = os.open(path, _FLAGS)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IntegrityError(f"{path} is no regular file; copy or download it again.")
            stamp = Stamp.of(status)
            return cls(path, stamp, _entries(descriptor, stamp.nbytes))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, EOFError) as error:
            raise _damaged(path, error) from error
        finally:
            os.close(descriptor)

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """Open it to read tensors, and see at both ends that it is the file whose header was read.

        Raises:
            IntegrityError: it was replaced, written to or removed since.
        """
        try:
            descriptor = os.open(self.path, _FLAGS)
        except FileNotFoundError as error:
            raise self._changed("was removed") from error
        try:
            if Stamp.of(os.fstat(descriptor)) != self.stamp:
                raise self._changed("was replaced")
            yield Reader(self.path, descriptor)
            if Stamp.of(os.fstat(descriptor)) != self.stamp:
                raise self._changed("was written to")
        finally:
            os.close(descriptor)

    def _changed(self, how: str) -> IntegrityError:
        return IntegrityError(f"{self.path} {how} while it was being sent; send it again.")


class Reader:
    """Reads tensors of an open file."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def read(self, entry: Entry) -> torch.Tensor:
        """Return a tensor, in memory of its own.

        Raises:
            IntegrityError: the file ends before the tensor does.
        """
        dtype, shape = torch_dtype(entry.meta.dtype), entry.meta.shape
        if not entry.meta.nbytes:
            return torch.empty(shape, dtype=dtype)
        try:
            data = _read(self._descriptor, entry.offset, entry.meta.nbytes)
        except EOFError as error:
            raise _damaged(self._path, error) from error
        return torch.frombuffer(data, dtype=dtype).view(shape)


def _entries(descriptor: int, nbytes: int) -> tuple[Entry, ...]:
    (length,) = _LENGTH.unpack(_read(descriptor, 0, _LENGTH.size))
    if length > min(_MAX_HEADER, nbytes):
        raise ValueError(f"its header claims {length} bytes")
    header = json.loads(_read(descriptor, _LENGTH.size, length))
    header.pop("__metadata__", None)
    begin = end = _LENGTH.size + length
    entries = []
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        meta = ParamMeta(name, _dtype(fields["dtype"]), fields["shape"])
        first, last = fields["data_offsets"]
        if begin + first != end or last - first != meta.nbytes:
            raise ValueError(f"the bytes of {brief(name)} are not where its header says")
        entries.append(Entry(meta, end))
        end += meta.nbytes
    if end != nbytes:
        raise ValueError(f"it has {nbytes} bytes, and its header speaks of {end}")
    return tuple(entries)


def _dtype(name: Any) -> str:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"dtype {brief(name)} is unknown")
    return _DTYPES[name]


def _read(descriptor: int, offset: int, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view, done = memoryview(data), 0
    while done < nbytes:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise EOFError(f"it ends after {offset + done} bytes")
        done += count
    return data


def _damaged(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"{path} is truncated or damaged; copy or download it again.", cause=str(error))
