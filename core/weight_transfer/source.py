"""Where the weights come from: a module of the trainer, or a checkpoint on disk."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weight_transfer.errors import ConfigError, IntegrityError
from weight_transfer.manifest import Manifest, ParamMeta, dtype_name
from weight_transfer.weights import ModuleWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


_NONE: Mapping[str, torch.Tensor] = MappingProxyType({})


class WeightSource(ABC):
    """A stream of named tensors that can be read again and again.

    Metadata and bytes are separate: `manifest` is cheap and moves nothing, iteration materialises.
    """

    @abstractmethod
    def manifest(self) -> Manifest:
        """Return what iteration will yield, in the same order; the same object while nothing changed.

        Called once at the beginning of each update, before anything else.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)`` once each, full and on one device.

        With sharded parameters this runs collectives, so all trainer ranks must iterate in lockstep.
        """

    def resident(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that need no materialising and keep their storage between updates, by name.

        A backend may export these once instead of copying them at each update.
        """
        return {}

    def masters(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that are as `resident` ones, but of another dtype than the manifest says, by name.

        A backend may let its own copy convert: ``target.copy_(tensor)`` gives the bits that iteration yields, without
        a tensor in between.
        """
        return _NONE

    def cast(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate, with the tensors named in ``dtypes`` cast to these; each cast tensor is a new one.

        Override it where a tensor can be cast before it is gathered or copied; the bits are those of ``tensor.to``.
        """
        for name, tensor in self:
            yield name, tensor.to(dtypes[name]) if name in dtypes else tensor

    @property
    def device(self) -> str:
        """The torch device of the tensors that iteration yields."""
        return "cpu"

    @property
    def collective(self) -> bool:
        """Whether iteration runs collectives, and so must be finished on every rank even when an update fails."""
        return False


def as_source(weights: nn.Module | WeightSource) -> WeightSource:
    """Return ``weights`` as a source; a module becomes a `ModuleSource`.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(weights, WeightSource):
        return weights
    if isinstance(weights, nn.Module):
        return ModuleSource(weights)
    raise ConfigError(f"Weights to send must be an nn.Module or a WeightSource, got {type(weights).__name__}.")


class ModuleSource(WeightSource):
    """The parameters and persistent buffers of an ``nn.Module``.

    Tied weights are sent once. ``DTensor`` parameters (FSDP2, tensor parallel) are gathered one at a time with
    ``full_tensor()``, a collective: every trainer rank iterates the same module in the same order.

    Args:
        module: read anew by `manifest`, so that replaced parameters are noticed at each update.
        rename: maps a parameter's name to the name under which it is sent, e.g. to strip a wrapper's prefix.
    """

    def __init__(self, module: nn.Module, rename: Callable[[str], str] | None = None) -> None:
        self.module = module
        self._rename = rename
        self._reader = ModuleWeights(module)
        self._read: Mapping[str, torch.Tensor] | None = None
        self._weights: Mapping[str, torch.Tensor] = {}
        self._resident: Mapping[str, torch.Tensor] = {}
        self._manifest = Manifest(())

    def manifest(self) -> Manifest:
        """Read the module anew; iteration and `resident` then speak of the same tensors."""
        read = self._reader.read()
        if read is not self._read:
            self._weights = self._renamed(read)
            self._resident = {name: tensor for name, tensor in self._weights.items() if not is_sharded(tensor)}
            manifest = Manifest(
                ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in self._weights.items()
            )
            if manifest != self._manifest:
                self._manifest = manifest
            self._read = read
        return self._manifest

    def _renamed(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if self._rename is None:
            return weights
        renamed: dict[str, torch.Tensor] = {}
        for name, tensor in weights.items():
            new = self._rename(name)
            if new in renamed:
                raise ConfigError(f"rename gives several parameters the name {new!r}; each needs one of its own.")
            renamed[new] = tensor
        return renamed

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights.items():
            yield name, full_tensor(tensor)

    def cast(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate; a sharded tensor is cast before it is gathered, which then moves fewer bytes."""
        for name, tensor in self._weights.items():
            yield name, full_tensor(tensor, dtypes.get(name))

    def resident(self) -> Mapping[str, torch.Tensor]:
        return self._resident

    @property
    def device(self) -> str:
        first = next(iter(self._weights.values()), None)
        return "cpu" if first is None else str(first.device)

    @property
    def collective(self) -> bool:
        return len(self._resident) < len(self._weights)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of several shards, such as a ``DTensor``."""
    return hasattr(type(tensor), "full_tensor")


def full_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return all of a tensor, in ``dtype`` if one is named."""
    with torch.no_grad():
        if not is_sharded(tensor):
            return tensor.detach() if dtype is None else tensor.detach().to(dtype)
        is_sum = any(placement.is_partial() for placement in getattr(tensor, "placements", ()))
        shard: Any = tensor if dtype is None or is_sum else tensor.to(dtype)
        full: torch.Tensor = shard.full_tensor()
        return full if dtype is None else full.to(dtype)


class CheckpointSource(WeightSource):
    """A directory of safetensors files, with or without ``model.safetensors.index.json``, or a single file.

    Files are memory-mapped and read tensor by tensor; the checkpoint is never wholly in memory.

    Args:
        path: the directory or file.
        device: where to materialise tensors.

    Raises:
        ConfigError: there is no safetensors file, or the index names one that is missing.
        IntegrityError: a file is truncated or damaged; it is named.
    """

    INDEX = "model.safetensors.index.json"

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        self.path = Path(path)
        self._device = device
        self._index = self._read_index()
        self._files = self._open()
        try:
            self._manifest = Manifest(self._metas())
        except ValueError as error:
            raise ConfigError(f"{self.path} cannot be sent: {error}.") from error
        lacking = sorted(self._index.keys() - self._manifest.by_name.keys())
        if lacking:
            file = self.path / self._index[lacking[0]]
            raise IntegrityError(
                f"{file} lacks {lacking[0]!r}, which {self.INDEX} promises; copy or download it again."
            )

    def manifest(self) -> Manifest:
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file, handle in self._files.items():
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                try:
                    yield name, handle.get_tensor(name)
                except _safetensors().SafetensorError as error:
                    raise _damaged(file, error) from error

    @property
    def device(self) -> str:
        return self._device

    def _open(self) -> dict[Path, Any]:
        handles = {}
        for file in self._paths():
            try:
                handles[file] = _safetensors().safe_open(file, framework="pt", device=self._device)
            except FileNotFoundError as error:
                raise ConfigError(
                    f"{self.path / self.INDEX} names {file.name}, which does not exist; complete the checkpoint."
                ) from error
            except (OSError, _safetensors().SafetensorError) as error:
                raise _damaged(file, error) from error
        return handles

    def _paths(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if self._index:
            return [self.path / name for name in sorted(set(self._index.values()))]
        found = sorted(self.path.glob("*.safetensors"))
        if not found:
            raise ConfigError(
                f"{self.path} holds no safetensors file; name a checkpoint's directory or one .safetensors file."
            )
        return found

    def _read_index(self) -> dict[str, str]:
        """Return file names by parameter, empty without an index."""
        index = self.path / self.INDEX
        if not index.is_file():
            return {}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{index} is not a valid index of safetensors files.", cause=str(error)) from error

    def _metas(self) -> Iterator[ParamMeta]:
        for handle in self._files.values():
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                part = handle.get_slice(name)
                yield ParamMeta(name, _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()), part.get_shape())


# The format's names, from the safetensors documentation.
_SAFETENSORS_DTYPES = {
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


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ConfigError("CheckpointSource needs safetensors: pip install safetensors") from error
    return safetensors


def _damaged(file: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"{file} is truncated or damaged; copy or download it again.", cause=str(error))
