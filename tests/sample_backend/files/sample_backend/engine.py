"""Both engines of the ``files`` backend.

The trainer makes a private directory in the shared one. For each update it writes the buckets into a directory inside,
one file each, before the workers are told of the update; then the workers read, and then the files are removed. So
nobody waits for anybody, and a worker may join at any time. Memory is bounded by one bucket per side; on disk lies one
copy of the weights while an update runs. A trainer that is killed leaves its directory behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.authoring import (
    Deadline,
    Packer,
    Unpacker,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    plan_buckets,
)
from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.errors import HandshakeError, ManifestMismatchError, PeerLostError

if TYPE_CHECKING:
    from weight_transfer.authoring import Manifest, ParallelConfig, WeightSource, WeightTransferConfig


# --8<-- [start:infos]
@attrs.frozen(kw_only=True)
class FilesInitInfo(WeightTransferInitInfo):
    """``folder``: name of the trainer's directory; ``bucket_bytes``: size of its buckets, both sides cut alike."""

    folder: str = attrs.field(repr=False)  # a secret: who knows it finds the weights
    bucket_bytes: int


@attrs.frozen(kw_only=True)
class FilesUpdateInfo(WeightTransferUpdateInfo):
    """``serial``: number of the update, and name of its directory, so that no worker reads another one's files."""

    serial: int


# --8<-- [end:infos]


# --8<-- [start:trainer]
class FilesTrainerEngine(TrainerWeightTransferEngine[FilesInitInfo, FilesUpdateInfo]):
    """Writes the buckets before the workers read; there is nothing to do while they do."""

    init_info_cls = FilesInitInfo
    update_info_cls = FilesUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._folder: Path | None = None
        self._serial = 0

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        if self._folder is None:  # else workers come back
            self._folder = Path(tempfile.mkdtemp(prefix="weights-", dir=self.config.options.directory))
        return [{"folder": self._folder.name, "bucket_bytes": self.config.bucket_bytes} for _ in slots]

    def join_workers(self, deadline: Deadline) -> None:
        pass  # their answers are all there is to wait for

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        assert self._folder is not None
        self._serial += 1
        folder = self._folder / str(self._serial)
        folder.mkdir()
        buffer = bytearray(self.config.bucket_bytes)
        plan = plan_buckets(manifest.params, len(buffer))
        packing = Packer(plan, [torch.frombuffer(buffer, dtype=torch.uint8)]).packing(weight for _, weight in source)
        for index, slots in enumerate(plan.buckets):
            next(packing)
            deadline.check("writing the weights", backend="files")
            (folder / str(index)).write_bytes(memoryview(buffer)[: slots[-1].offset + slots[-1].nbytes])
        return {"serial": self._serial}

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        pass  # the workers read

    def release_source(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder / str(self._serial), ignore_errors=True)  # it is not there after a failed join

    def shutdown(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None


# --8<-- [end:trainer]


# --8<-- [start:worker]
class FilesWorkerEngine(WeightTransferEngine[FilesInitInfo, FilesUpdateInfo]):
    """Reads bucket after bucket, and loads each before the next one is read."""

    init_info_cls = FilesInitInfo
    update_info_cls = FilesUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._folder = Path()
        self._bucket = bytearray()

    def init_transfer_engine(self, init_info: FilesInitInfo) -> None:
        directory = Path(self.config.options.directory)
        self._folder = directory / Path(init_info.folder).name
        if not self._folder.is_dir():
            message = f"The trainer's directory {self._folder} is not here; give both sides the same shared directory."
            raise HandshakeError(message, backend="files", peer="trainer")
        self._bucket = bytearray(init_info.bucket_bytes)

    def receive_weights(self, update_info: FilesUpdateInfo, load_weights: LoadWeights) -> None:
        plan = plan_buckets(update_info.manifest.params, len(self._bucket))
        unpacker = Unpacker(plan, [torch.frombuffer(self._bucket, dtype=torch.uint8)])
        deadline = Deadline(update_info.timeout)
        for index, slots in enumerate(plan.buckets):
            deadline.check("reading the weights", backend="files", peer="trainer")
            used = slots[-1].offset + slots[-1].nbytes
            self._read(self._folder / str(update_info.serial) / str(index), memoryview(self._bucket)[:used])
            unpacker.load(index, load_weights)  # raises when the update was aborted

    def _read(self, path: Path, buffer: memoryview) -> None:
        """Fill ``buffer`` with the whole of a file."""
        try:
            with path.open("rb") as file:
                if path.stat().st_size == len(buffer) == file.readinto(buffer):
                    return
        except OSError as error:
            message = f"The trainer's file {path} cannot be read: it was removed."
            raise PeerLostError(message, backend="files", peer="trainer", cause=str(error)) from error
        message = f"The file {path} does not hold the {len(buffer)} bytes that the manifest asks for; send again."
        raise ManifestMismatchError(message, backend="files", peer="trainer")

    def shutdown(self) -> None:
        self._bucket = bytearray()

    @property
    def extra_memory(self) -> int:
        return len(self._bucket)


# --8<-- [end:worker]
