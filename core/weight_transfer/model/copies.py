"""Recorded copies made ready, and made together: in integers as wide as they allow, and in as few launches.

What limits them, and what follows:

* Python: each tensor operation takes 0.5 to 1.3 us (two cores, torch 2.13). So all geometry is worked out once for a
  recording, views of targets once for a layer, and a source that goes whole into one place is viewed once.
* Threads: torch divides a copy among threads by elements, not by bytes, and on a busy machine they wait for each other.
  Bits go as integers of 8 bytes where sizes, steps and addresses allow it; then less than 256 KiB stay on one thread.
* Launches, on CUDA: `torch._foreach_copy_` batches a list only if every pair in it is dense, with equal strides and the
  list's dtypes; a single other one has all of them copied one by one. So dense pairs stand in a list for each integer
  type. Strided ones whose targets follow each other, such as the experts of a layer, are one `torch.cat` into these,
  which takes 64 of them a launch, from anywhere. What is left is copied one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import attrs
import torch

from weight_transfer.errors import TransferError
from weight_transfer.model.manifest import dtype_name
from weight_transfer.model.recording import RecordedCopy
from weight_transfer.model.strided import Strided
from weight_transfer.model.targets import as_bits

if TYPE_CHECKING:
    from torch import Tensor

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
        plain: its views, in integers as large as its elements.
        wide: its views in integers of 8 bytes; None if it has none.
    """

    copy: RecordedCopy
    layer: str
    number: int
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
        bases = (Strided.contiguous(source), form.strided)
        if copy.casts or aslant or per == 1 or not all(_divides(base, per) for base in bases):
            return cls(copy, layer, number, plain, None)
        if not (_divides(plain.to, per) and _divides(plain.frm or plain.to, per)):
            return cls(copy, layer, number, plain, None)
        wide = Views(_divided(plain.to, per), _divided(plain.frm, per) if plain.frm is not None else None, plain.dense)
        return cls(copy, layer, number, plain, wide)


class Landing:
    """A layer's tensors, and the views of them into which copies go.

    Args:
        moves: all into the layer, by their numbers.
        tensors: by name.
        forms: what each looked like when it was recorded.

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
        bits = {name: as_bits(tensor) for name, tensor in self.tensors.items()}
        wide = {
            name: tensor.view(torch.int64) if _may_widen(tensor, forms[name]) else None for name, tensor in bits.items()
        }
        self.is_wide: list[bool] = []
        self.views: list[Tensor] = []
        for move in moves:
            name = move.copy.target
            base, to = wide[name], move.wide
            if base is None or to is None:
                self.is_wide.append(False)
                self.views.append(
                    (self.tensors if move.copy.casts else bits)[name].as_strided(*_on(bits[name], move.plain.to))
                )
            else:
                self.is_wide.append(True)
                self.views.append(base.as_strided(*_on(base, to.to)))


class Batch:
    """Copies that are made together.

    Args:
        grouped: whether strided copies are put together, which pays where each is a launch; None: on CUDA.
    """

    def __init__(self, grouped: bool | None = None) -> None:
        self._grouped = grouped
        self._dense: defaultdict[torch.dtype, _Pairs] = defaultdict(lambda: ([], []))
        self._strided: _Pairs = ([], [])

    def add(self, moves: Sequence[Move], landings: Mapping[str, Landing], source: Tensor) -> None:
        """Add copies of one source; those that convert are made at once.

        Args:
            moves: the copies.
            landings: of their layers.
            source: a tensor with memory.
        """
        if not source.is_contiguous():
            source = source.contiguous()
        source = source.detach()
        wide = bits = None
        aligned = not source.data_ptr() % _WIDE and not source.storage_offset() * source.element_size() % _WIDE
        for move in moves:
            landing = landings[move.layer]
            to, views = landing.views[move.number], move.wide
            if move.copy.casts:
                to.copy_(move.copy.frm.on(source))
                continue
            if views is not None and aligned and landing.is_wide[move.number]:
                if wide is None:
                    wide = source.view(torch.int64)
                origin = wide
            else:
                if bits is None:
                    bits = as_bits(source)
                origin, views = bits, move.plain
                if landing.is_wide[move.number]:  # the target's address would allow more than the source's
                    to = views.to.on(as_bits(landing.tensors[move.copy.target]))
            if views.frm is not None:
                origin = origin.as_strided(*_on(origin, views.frm))
            targets, origins = self._dense[origin.dtype] if views.dense else self._strided
            targets.append(to)
            origins.append(origin)

    def make(self) -> None:
        """Make them."""
        for targets, origins in self._dense.values():
            torch._foreach_copy_(targets, origins)
        targets, origins = self._strided
        if targets:
            if self._grouped or (self._grouped is None and targets[0].is_cuda):
                for some in adjacent(targets):
                    _copy_together([targets[number] for number in some], [origins[number] for number in some])
            else:
                torch._foreach_copy_(targets, origins)
        self._dense.clear()
        self._strided = ([], [])


def has_form(tensor: Tensor, form: TargetForm) -> bool:
    """Whether a tensor looks as one that was recorded."""
    return (tuple(tensor.shape), tensor.stride(), dtype_name(tensor.dtype)) == (form.shape, form.stride, form.dtype)


def adjacent(targets: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of contiguous targets that follow each other in memory, each group in the order of addresses.

    All of a group are in one storage, and of one dtype and shape. Others are alone.
    """
    alike: defaultdict[object, list[tuple[int, int]]] = defaultdict(list)
    for number, tensor in enumerate(targets):
        if tensor.is_contiguous():
            key = tensor.untyped_storage()._cdata, tensor.dtype, tensor.shape  # noqa: SLF001  (torch's own identity)
            alike[key].append((int(tensor.storage_offset()), number))
        else:
            yield [number]
    for rows in alike.values():
        rows.sort()
        size, group, end = targets[rows[0][1]].numel(), list[int](), -1
        for offset, number in rows:
            if group and offset != end:
                yield group
                group = []
            group.append(number)
            end = offset + size
        yield group


def _copy_together(targets: list[Tensor], origins: list[Tensor]) -> None:
    first = targets[0]
    if len(targets) == 1 or not first.dim():
        torch._foreach_copy_(targets, origins)
        return
    shape = (first.shape[0] * len(targets), *first.shape[1:])
    torch.cat(origins, out=first.as_strided(shape, first.stride()))


def _on(base: Tensor, view: Strided) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return view.shape, view.stride, int(base.storage_offset()) + view.offset


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
