"""A checkpoint on disk as a source of weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from weight_transfer.config.structuring import brief
from weight_transfer.errors import ConfigError, IntegrityError
from weight_transfer.model.manifest import Manifest
from weight_transfer.model.safetensors_file import SafetensorsFile, Stamp, stamp_of
from weight_transfer.model.source import WeightSource

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import torch

logger = logging.getLogger(__name__)

_MAX_NAME = 256  # characters of a file's name


class CheckpointSource(WeightSource):
    """A directory of safetensors files, with or without ``model.safetensors.index.json``, or a single file.

    Tensors are read one by one; the checkpoint is never wholly in memory. Files that were replaced since the last
    update are read anew. A file that changes while it is sent is an error, and never a mixture of two checkpoints.

    Args:
        path: the directory or file. If a directory has ``model.safetensors`` and an index of other files, the single
            file is taken, as ``transformers`` does, and the log says so.
        device: where to materialise tensors.

    Raises:
        ConfigError: there is no safetensors file, or the index names one that is missing.
        IntegrityError: a file is truncated or damaged; it is named.
    """

    INDEX = "model.safetensors.index.json"
    SINGLE = "model.safetensors"

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        self.path = Path(path)
        self._device = device
        self._stamps: dict[Path, Stamp | None] = {}
        self._files: tuple[SafetensorsFile, ...] = ()
        self._manifest = Manifest(())
        self._read()

    def manifest(self) -> Manifest:
        """Look at the files, and read their headers anew if one of them was replaced, added or removed.

        Raises:
            ConfigError, IntegrityError: as at construction.
        """
        if self._stamps != self._stamps_now():
            self._read()
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._tensors(self._manifest.by_name)

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return self._tensors(names)

    def _tensors(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self._files:
            with file.opened() as reader:
                for entry in file.entries:
                    if entry.meta.name in names:
                        yield entry.meta.name, reader.read(entry).to(self._device)

    @property
    def device(self) -> str:
        return self._device

    @property
    def reuses_memory(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"CheckpointSource({str(self.path)!r})"

    def _read(self) -> None:
        stamps = self._stamps_now()  # first: what changes meanwhile is noticed next time
        index = self._read_index()
        files = tuple(map(self._open, self._paths(index)))
        try:
            manifest = Manifest(entry.meta for file in files for entry in file.entries)
        except ValueError as error:
            raise ConfigError(f"{self.path} cannot be sent: {error}.") from error
        lacking = sorted(index.keys() - manifest.by_name.keys())
        if lacking:
            file = self.path / index[lacking[0]]
            raise IntegrityError(
                f"{file} lacks {lacking[0]!r}, which {self.INDEX} promises; copy or download it again."
            )
        self._stamps, self._files = stamps, files
        if manifest != self._manifest:
            self._manifest = manifest

    def _open(self, path: Path) -> SafetensorsFile:
        try:
            return SafetensorsFile.read(path)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.path / self.INDEX} names {path.name}, which does not exist; complete the checkpoint."
            ) from error
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read.", cause=str(error)) from error

    def _stamps_now(self) -> dict[Path, Stamp | None]:
        """Return the stamps of every file that has a say."""
        if self.path.is_file():
            return {self.path: stamp_of(self.path)}
        return {path: stamp_of(path) for path in (self.path / self.INDEX, *sorted(self.path.glob("*.safetensors")))}

    def _paths(self, index: dict[str, str]) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if index:
            return [self.path / name for name in sorted(set(index.values()))]
        single = self.path / self.SINGLE
        found = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        if not found:
            raise ConfigError(
                f"{self.path} holds no safetensors file; name a checkpoint's directory or one .safetensors file."
            )
        return found

    def _read_index(self) -> dict[str, str]:
        """Return file names by weight; empty without an index, or if a single file takes its place."""
        index = self.path / self.INDEX
        if not index.is_file():
            return {}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: str(file) for name, file in weight_map.items()}
            outside = [file for file in files.values() if not _is_file_name(file)]
            if outside:
                raise ValueError(f"{brief(outside[0])} is not the name of a file in this folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{index} is not a valid index of safetensors files.", cause=str(error)) from error
        if (self.path / self.SINGLE).is_file() and self.SINGLE not in files.values():
            logger.warning("%s has %s beside %s; the single file is sent", self.path, self.SINGLE, self.INDEX)
            return {}
        return files


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name) < _MAX_NAME
