"""Recorded copies made ready, and made together: in integers as wide as they allow, and in as few launches.

What limits them, and what follows:

* Python: each tensor operation takes 0.5 to 1.3 us (two cores, torch 2.13). So all geometry is worked out once for a
  recording, views of targets once for a layer, and a source that goes whole into one place is viewed once.
* Threads: torch divides a copy among threads by elements, not by bytes, and on a busy machine they wait for each other.
  Bits go as integers of 8 bytes where sizes, steps and addresses allow it; then less than 256 KiB stay on one thread.
* Launches, on CUDA: all copies that are made together are one table, which a kernel walks; see `kernel_copies`.
  Without Triton torch copies there, too, many pairs in a launch where all in a list are dense.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import attrs
import numpy as np
import torch

from weight_transfer.errors import TransferError
from weight_transfer.model.bits import as_bits
from weight_transfer.model.manifest import dtype_name
from weight_transfer.model.recording import RecordedCopy
from weight_transfer.model.strided import Strided

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.copying.boxes import Integers
    from weight_transfer.model.recording import TargetForm


_WIDE = 8  # bytes of int64
_Pairs = tuple[list["Tensor"], list["Tensor"]]


class Views(NamedTuple):
    """Which views of a target and of a source a copy is made of, in integers of one size.

    Attributes:
        to: of the target.
        frm: of the source; None if it is all of it, in the shape of ``to``.
        dense: whether both are contiguous.
    """

    to: Strided
    frm: Strided | None
    dense: bool


@attrs.frozen(eq=False)
class Move:
    """A recorded copy, made ready.

    Attributes:
        copy: the copy.
        layer: the layer of its target.
        number: of the copy, among those into its layer.
        itemsize: bytes of an element of the source.
        nbytes: of the whole source.
        plain: its views, in integers as large as its elements.
        wide: its views in integers of 8 bytes; None if it has none.
    """

    copy: RecordedCopy
    layer: str
    number: int
    itemsize: int
    nbytes: int
    plain: Views
    wide: Views | None

    @classmethod
    def of(
        cls, copy: RecordedCopy, layer: str, number: int, source: Sequence[int], form: TargetForm, itemsize: int
    ) -> Move:
        """Make a copy ready.

        Args:
            copy: the copy.
            layer: see `Move`.
            number: see `Move`.
            source: shape of its source.
            form: of its target.
            itemsize: bytes of an element of the source.
        """
        to, frm = copy.to, copy.frm
        plain = Views(to, frm, _is_contiguous(to) and _is_contiguous(frm))
        if plain.dense and not copy.casts and frm.offset == 0 and frm.numel == Strided.contiguous(source).numel:
            whole = Strided.contiguous(source)
            plain = Views(Strided(to.offset, whole.shape, whole.stride), None, dense=True)
        per, aslant = divmod(_WIDE, itemsize)
        nbytes = itemsize * math.prod(source)
        bases = (Strided.contiguous(source), form.strided)
        if copy.casts or aslant or per == 1 or not all(_divides(base, per) for base in bases):
            return cls(copy, layer, number, itemsize, nbytes, plain, None)
        if not (_divides(plain.to, per) and _divides(plain.frm or plain.to, per)):
            return cls(copy, layer, number, itemsize, nbytes, plain, None)
        wide = Views(_divided(plain.to, per), _divided(plain.frm, per) if plain.frm is not None else None, plain.dense)
        return cls(copy, layer, number, itemsize, nbytes, plain, wide)


class Landing:
    """A layer's tensors, and the views of them into which copies go.

    Args:
        moves: all into the layer, by their numbers.
        tensors: by name.
        forms: what each looked like when it was recorded.

    Attributes:
        tensors: those of the moves, by name.
        gpu: the CUDA device on which all of them lie; None if they lie elsewhere.

    Raises:
        TransferError: a tensor looks otherwise now; it is named.
    """

    def __init__(self, moves: Sequence[Move], tensors: Mapping[str, Tensor], forms: Mapping[str, TargetForm]) -> None:
        self.tensors = {name: tensors[name].detach() for name in dict.fromkeys(move.copy.target for move in moves)}
        for name, tensor in self.tensors.items():
            if not has_form(tensor, forms[name]):
                raise TransferError(
                    f"{name!r} was recorded as {forms[name]}, and is {dtype_name(tensor.dtype)} {list(tensor.shape)} "
                    f"with strides {list(tensor.stride())} now; the recording does not fit it: build the loader anew."
                )
        self.gpu = gpu_of(self.tensors.values())
        self._forms = forms
        self._views: list[Tensor | None] = [None] * len(moves)
        self._bits: dict[str, Tensor] = {}
        self._wide: dict[str, Tensor | None] = {}

    def view(self, move: Move) -> Tensor:
        """Return the part of its target that a copy fills: in integers, as wide as its `Move` and the address allow."""
        view = self._views[move.number]
        if view is None:
            view = self._views[move.number] = self._viewed(move)
        return view

    def narrow_view(self, move: Move) -> Tensor:
        """Return the same in integers as large as its elements."""
        return move.plain.to.on(self._bits_of(move.copy.target))

    def _viewed(self, move: Move) -> Tensor:
        name = move.copy.target
        if move.copy.casts:
            return move.plain.to.on(self.tensors[name])
        wide = self._wide_of(name) if move.wide is not None else None
        return self.narrow_view(move) if wide is None or move.wide is None else move.wide.to.on(wide)

    def _bits_of(self, name: str) -> Tensor:
        if name not in self._bits:
            self._bits[name] = as_bits(self.tensors[name])
        return self._bits[name]

    def _wide_of(self, name: str) -> Tensor | None:
        if name not in self._wide:
            tensor = self._bits_of(name)
            self._wide[name] = tensor.view(torch.int64) if _may_widen(tensor, self._forms[name]) else None
        return self._wide[name]


class Sources:
    """Weights that a loader is given at once, in the forms in which they are copied.

    Args:
        tensors: with memory; those that are not contiguous are copied.

    Attributes:
        tensors: contiguous.
        gpu: the CUDA device on which all of them lie; None if they lie elsewhere.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
        self.gpu = gpu_of(self.tensors)
        self._bits: dict[int, Tensor] = {}
        self._wide: dict[int, Tensor | None] = {}

    @cached_property
    def addresses(self) -> Integers:
        """Where they lie, int64 ``[weights]``."""
        return np.array([tensor.data_ptr() for tensor in self.tensors], dtype=np.int64)

    @cached_property
    def nbytes(self) -> Integers:
        """Bytes of each, int64 ``[weights]``."""
        return np.array([tensor.nbytes for tensor in self.tensors], dtype=np.int64)

    def bits(self, number: int) -> Tensor:
        """Return a weight in integers as large as its elements."""
        if number not in self._bits:
            self._bits[number] = as_bits(self.tensors[number].detach())
        return self._bits[number]

    def wide(self, number: int) -> Tensor | None:
        """Return it in integers of 8 bytes; None if its address does not allow it. Its shape is to."""
        if number not in self._wide:
            tensor = self.tensors[number]
            aslant = tensor.data_ptr() % _WIDE or tensor.storage_offset() * tensor.element_size() % _WIDE
            self._wide[number] = None if aslant else tensor.detach().view(torch.int64)
        return self._wide[number]


def make_copies(copies: Sequence[tuple[int, Move]], landings: Mapping[str, Landing], sources: Sources) -> None:
    """Make copies by torch's own operations, as many as possible at a time.

    Args:
        copies: numbers of sources, and what is copied of them.
        landings: by layer.
        sources: the weights.
    """
    dense: defaultdict[torch.dtype, _Pairs] = defaultdict(lambda: ([], []))
    strided: _Pairs = ([], [])
    for number, move in copies:
        landing = landings[move.layer]
        to, views = landing.view(move), move.plain
        if move.copy.casts:
            to.copy_(move.copy.frm.on(sources.tensors[number]))
            continue
        origin = sources.bits(number)
        if to.dtype is torch.int64 and move.wide is not None:
            wide = sources.wide(number)
            if wide is not None:
                origin, views = wide, move.wide
            else:  # the target's address would allow more than the source's
                to = landing.narrow_view(move)
        if views.frm is not None:
            origin = views.frm.on(origin)
        targets, origins = dense[origin.dtype] if views.dense else strided
        targets.append(to)
        origins.append(origin)
    for targets, origins in (*dense.values(), strided):
        if targets:
            torch._foreach_copy_(targets, origins)


def gpu_of(tensors: Iterable[Tensor]) -> torch.device | None:
    """Return the one CUDA device on which all of them lie; None if they lie elsewhere."""
    numbers = {tensor.get_device() for tensor in tensors}
    number = numbers.pop() if len(numbers) == 1 else -1
    return torch.device("cuda", number) if number >= 0 else None


def has_form(tensor: Tensor, form: TargetForm) -> bool:
    """Whether a tensor looks as one that was recorded."""
    return (tuple(tensor.shape), tensor.stride(), dtype_name(tensor.dtype)) == (form.shape, form.stride, form.dtype)


def _is_contiguous(view: Strided) -> bool:
    whole = Strided.contiguous(view.shape)
    return all(size == 1 or step == own for size, step, own in zip(view.shape, view.stride, whole.stride, strict=True))


def _divides(view: Strided, per: int) -> bool:
    """Whether the view's elements come in groups of ``per`` that lie side by side."""
    if not view.shape or view.stride[-1] != 1 or view.shape[-1] % per or view.offset % per:
        return False
    return not any(step % per for step in view.stride[:-1])


def _divided(view: Strided, per: int) -> Strided:
    steps = (step // per for step in view.stride[:-1])
    return Strided(view.offset // per, (*view.shape[:-1], view.shape[-1] // per), (*steps, 1))


def _may_widen(tensor: Tensor, form: TargetForm) -> bool:
    size = tensor.element_size()
    addresses = tensor.data_ptr() % _WIDE or tensor.storage_offset() * size % _WIDE
    return size < _WIDE and not addresses and _divides(form.strided, _WIDE // size)
