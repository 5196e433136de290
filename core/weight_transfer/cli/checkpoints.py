"""The checkpoints that a training run writes into a folder, each once it is complete."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError, IntegrityError
from weight_transfer.model.checkpoint import CheckpointSource
from weight_transfer.model.safetensors_file import Stamp, stamp_of

if TYPE_CHECKING:
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.values.events import Version

_Stamps = frozenset[tuple[Path, Stamp | None]]
_Contents = frozenset[tuple[str, Stamp | None]]
_NUMBER = re.compile(r"\d+\Z")


class Checkpoints:
    """Looks for folders of safetensors files in a folder, again and again.

    A checkpoint is complete when its index and all files that this names are there, or ``model.safetensors`` by itself;
    when every file is as long as its header says; and when nothing of it has changed for a while. A folder without
    either is none. One that is renamed, or has a second name, is still the same.

    Args:
        folder: whose folders are checkpoints.
        settle: seconds for which nothing of a checkpoint may have changed.
        device: on which the tensors are materialised.
        clock: returns seconds.
    """

    def __init__(
        self, folder: Path, settle: float, device: str = "cpu", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._settle = settle
        self._device = device
        self._clock = clock
        self._seen: dict[Path, tuple[_Stamps, float]] = {}
        self._taken: set[_Contents] = set()

    def new(self) -> list[CheckpointSource]:
        """Return those that are complete and have not been taken by any name, the oldest first.

        Raises:
            ConfigError: the folder cannot be listed.
        """
        try:
            paths = [path for path in self._folder.iterdir() if path.is_dir()]
        except OSError as error:
            raise ConfigError(f"{self._folder} cannot be listed.", cause=str(error)) from error
        found = {path: _stamps(path) for path in paths}
        new = [_source(path, stamps, self._device) for path, stamps in found.items() if self._is_new(path, stamps)]
        by_name = sorted(filter(None, new), key=_preference)
        different = {_contents(source.stamps): source for source in reversed(by_name)}
        return sorted(different.values(), key=_written)

    def take(self, source: CheckpointSource) -> None:
        """Do not return this checkpoint again, unless it is written anew."""
        self._taken.add(_contents(self._seen[source.path][0]))

    def _is_new(self, path: Path, stamps: _Stamps) -> bool:
        now = self._clock()
        if self._seen.get(path, (None,))[0] != stamps:
            self._seen[path] = stamps, now
        return now - self._seen[path][1] >= self._settle and _contents(stamps) not in self._taken


def version_of(path: Path) -> Version:
    """Return the number at the end of a checkpoint's name, such as 200 for ``checkpoint-200``, else the name."""
    number = _NUMBER.search(path.name)
    return int(number[0]) if number else path.name


def _stamps(path: Path) -> _Stamps:
    """Return the stamps of a checkpoint's files; none if its folder has been removed meanwhile, or may not be read."""
    try:
        files = [path / CheckpointSource.INDEX, *path.glob("*.safetensors")]
        return frozenset((file, stamp_of(file)) for file in files)
    except OSError:
        return frozenset()


def _contents(stamps: _Stamps) -> _Contents:
    """Return what tells a checkpoint from others whatever it is called."""
    return frozenset((path.name, stamp) for path, stamp in stamps)


def _preference(source: CheckpointSource) -> tuple[bool, str]:
    """Return by what the names of one checkpoint are sorted: those with a number come first."""
    return isinstance(version_of(source.path), str), source.path.name


class _Settled(CheckpointSource):
    """A checkpoint that is not read anew when a file was replaced: the others may not have been yet."""

    def manifest(self) -> Manifest:
        """Return the manifest of the files as they were found.

        Raises:
            IntegrityError: one was replaced, added or removed since.
        """
        if self.stamps != _stamps(self.path):
            raise IntegrityError(f"{self.path} has changed since it was complete; it is sent when it is so again.")
        return super().manifest()

    @property
    def stamps(self) -> _Stamps:
        """Of the files that were read."""
        return frozenset(self._stamps.items())


def _source(path: Path, stamps: _Stamps, device: str) -> _Settled | None:
    """Return a checkpoint if all of it is there, as it was when it was looked at."""
    names = {file.name for file, stamp in stamps if stamp is not None}
    if names.isdisjoint((CheckpointSource.INDEX, CheckpointSource.SINGLE)):
        return None
    try:
        source = _Settled(path, device)
    except (ConfigError, IntegrityError):  # a file is missing, or shorter than its header says
        return None
    return source if source.stamps == stamps else None


def _written(source: CheckpointSource) -> tuple[int, str]:
    """Return when the last file of a checkpoint was written."""
    modified = [stamp.modified for _, stamp in _stamps(source.path) if stamp is not None]
    return max(modified, default=0), source.path.name
