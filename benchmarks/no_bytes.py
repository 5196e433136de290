"""A backend that moves no bytes, and weights that nobody reads: what is left of a send is its control path."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from weight_transfer import hookimpl
from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.model.info import WeightTransferInitInfo, WeightTransferUpdateInfo
from weight_transfer.model.manifest import Manifest, ParamMeta
from weight_transfer.model.source import WeightSource
from weight_transfer.plugins.backend import API_VERSION, Backend, Capability

if TYPE_CHECKING:
    from weight_transfer.values.deadline import Deadline

NAME = "no_bytes"


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name=NAME,
        api_version=API_VERSION,
        summary="moves nothing; for measuring what else a send costs",
        worker_engine="no_bytes:NoBytesWorkerEngine",
        trainer_engine="no_bytes:NoBytesTrainerEngine",
        capabilities=frozenset({Capability.CPU, Capability.REJOIN}),
    )


def install() -> tempfile.TemporaryDirectory[str]:
    """Make the backend known to this process and to those that it starts, until the folder is removed."""
    folder = tempfile.TemporaryDirectory()
    info = Path(folder.name, f"{NAME}-0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[weight_transfer.backends]\n{NAME} = {NAME}\n")
    added = [folder.name, str(Path(__file__).parent)]
    sys.path += added
    os.environ["PYTHONPATH"] = os.pathsep.join([*added, os.environ.get("PYTHONPATH", "")])
    return folder


class NoBytesWorkerEngine(WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):
    """Says that all has been written in place."""

    transport = "nothing"

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        pass

    def receive_weights(self, update_info: WeightTransferUpdateInfo, load_weights: LoadWeights) -> None:
        load_weights.write_in_place()  # type: ignore[attr-defined]  # the model is copied into by name
        load_weights.written(update_info.manifest.nbytes)  # type: ignore[attr-defined]

    def shutdown(self) -> None:
        pass


class NoBytesTrainerEngine(TrainerWeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):
    """Waits for the workers' answers, and no more.

    Attributes:
        threads: the most that there were in this process while workers updated.
    """

    threads: ClassVar[int] = 0

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        return [{} for _ in slots]

    def join_workers(self, deadline: Deadline) -> None:
        pass

    @property
    def tolerates_moves(self) -> bool:
        return True  # nobody reads anything

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        kind = type(self)
        kind.threads = max(kind.threads, threading.active_count())

    def shutdown(self) -> None:
        pass


def names_of(count: int) -> list[str]:
    """Return names as long as those of a language model."""
    return [f"model.layers.{number // 100}.mlp.experts.{number % 100}.down_proj" for number in range(count)]


class Unread(WeightSource):
    """Weights of which there is only the manifest: of ``count`` vectors of one float."""

    def __init__(self, count: int) -> None:
        self._manifest = Manifest([ParamMeta(f"{name}.weight", "float32", (1,)) for name in names_of(count)])

    def manifest(self) -> Manifest:
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("nobody reads these weights")


class Tiny(nn.Module):
    """The model that would take them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        memory = torch.zeros(count)
        for number, name in enumerate(names_of(count)):
            module = nn.Module()
            module.weight = nn.Parameter(memory[number : number + 1])
            *path, last = name.split(".")
            at: nn.Module = self
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            at.add_module(last, module)
