"""Models made of any weights whatever, and their bytes, read without the help of an engine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from weight_transfer.model.manifest import Manifest, ParamMeta, dtype_name, torch_dtype
from weight_transfer.model.source import WeightSource

Weight = tuple[str, str, list[int], str]
"""Name, dtype, shape and layout: ``"contiguous"``, ``"transposed"``, ``"strided"`` (every second element of a larger
storage), or ``"tied NAME"`` (the same parameter as an earlier one). JSON-safe."""


def weight(name: str, dtype: str, *shape: int, layout: str = "contiguous") -> Weight:
    """Return the description of one weight."""
    return name, dtype, list(shape), layout


class Model(nn.Module):
    """A model of the given weights: floating point and complex ones are parameters, the others persistent buffers.

    Args:
        weights: what it holds, in order.
        seed: of the bits.
        device: torch device.
    """

    def __init__(self, weights: Iterable[Weight], seed: int, device: str = "cpu") -> None:
        super().__init__()
        self._strided: list[str] = []
        for name, dtype, shape, layout in weights:
            if layout.startswith("tied "):
                self.register_parameter(name, self.get_parameter(layout.removeprefix("tied ")))
                continue
            if layout == "strided":
                self._strided.append(name)
            tensor = _allocate(torch_dtype(dtype), shape, layout, device)
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        randomise(self, seed)

    def replace(self, name: str) -> None:
        """Put a new tensor with new storage in the place of a parameter."""
        setattr(self, name, nn.Parameter(torch.empty_like(self.get_parameter(name)), requires_grad=False))

    def strays(self) -> list[str]:
        """Return the names of strided weights between whose elements something was written."""
        state = self.state_dict()
        return [name for name in self._strided if state[name].numel() and any(raw_bytes(_between(state[name])))]


def _between(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements that a strided tensor leaves out."""
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() + 1)


def _allocate(dtype: torch.dtype, shape: list[int], layout: str, device: str) -> torch.Tensor:
    if layout == "transposed":
        flipped = torch.zeros(shape[::-1], dtype=torch.uint8, device=device).to(dtype)
        return flipped.permute(tuple(reversed(range(len(shape)))))
    if layout == "strided":
        return torch.zeros((*shape, 2), dtype=torch.uint8, device=device).to(dtype)[..., 0]
    return torch.zeros(shape, dtype=torch.uint8, device=device).to(dtype)


def randomise(module: nn.Module, seed: int) -> None:
    """Give every weight new bits, all patterns included, such as those of NaNs; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            high = 2 if tensor.dtype is torch.bool else 256
            size = (tensor.numel() * tensor.element_size(),)
            noise = torch.randint(0, high, size, dtype=torch.uint8, generator=generator)
            tensor.copy_(noise.view(tensor.dtype).view(tensor.shape))


def inference_tensors(module: nn.Module) -> list[str]:
    """Return the names of the weights that are inference tensors, which can be changed in inference mode only."""
    return [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_inference()]


def cast(module: nn.Module, weights: Iterable[Weight]) -> Model:
    """Return a model of these weights, with the values of ``module`` by ``tensor.to`` of their dtypes."""
    state = module.state_dict()
    model = Model(weights, 0, str(next(iter(state.values())).device))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[name].to(tensor.dtype))
    return model


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor's elements in logical order, read from memory."""
    flat = tensor.detach().cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if flat.numel() else b""


def hashes(module: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each persistent weight's dtype, shape and bytes, by name."""
    return {
        name: hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + raw_bytes(tensor)).hexdigest()
        for name, tensor in module.state_dict().items()
    }


def digest(module: nn.Module) -> str:
    """Return one SHA-256 over names, dtypes, shapes and bytes of all persistent weights."""
    return combined(hashes(module))


def combined(parts: Mapping[str, str]) -> str:
    """Return the digest of a module whose weights have these hashes."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


class PassingSource(WeightSource):
    """Yields copies that nobody keeps, as a trainer does that gathers its shards.

    Args:
        module: whose weights.
        before_each: called with the index of a weight before it is yielded.
        memory: what becomes of a copy once the next one is asked for: it is ``"kept"`` while somebody refers to it, its
            memory is ``"reused"`` for the next one, or ``"freed"``.
    """

    def __init__(
        self,
        module: nn.Module,
        before_each: Callable[[int], None],
        memory: Literal["kept", "reused", "freed"] = "kept",
    ) -> None:
        self._module = module
        self._before_each = before_each
        self._memory = memory
        self._manifest: Manifest | None = None

    def manifest(self) -> Manifest:
        manifest = Manifest(
            ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in self._weights().items()
        )
        if manifest != self._manifest:
            self._manifest = manifest
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, tensor) in enumerate(self._weights().items()):
            self._before_each(index)
            yield from self._passing(name, tensor.detach())

    def _passing(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if self._memory == "reused":
            nbytes = tensor.numel() * tensor.element_size()
            copy = self._buffer[:nbytes].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor)
            yield name, copy
            self._buffer.fill_(0xA5)
        else:
            copy = tensor.clone()
            yield name, copy
            if self._memory == "freed":
                copy.untyped_storage().resize_(0)

    @functools.cached_property
    def _buffer(self) -> torch.Tensor:
        largest = max(tensor.numel() * tensor.element_size() for tensor in self._weights().values())
        return torch.empty(largest, dtype=torch.uint8, device=self.device)

    @property
    def reuses_memory(self) -> bool:
        return self._memory != "kept"

    @property
    def device(self) -> str:
        return str(next(iter(self._weights().values())).device)

    def _weights(self) -> Mapping[str, torch.Tensor]:
        return dict([*self._module.named_parameters(), *self._module.named_buffers()])
