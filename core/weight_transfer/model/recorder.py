"""Records a model's own loader: runs it once over tensors without bytes, and writes down what it would do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.errors import ConfigError
from weight_transfer.model.lending import require_done, require_eager
from weight_transfer.model.manifest import dtype_name
from weight_transfer.model.recording import FAILS, RecordedCopy, RecordedFill, Recording, Refusal, TargetForm
from weight_transfer.model.strided import Strided
from weight_transfer.model.tracing import Trace
from weight_transfer.model.writes import Reach, reach_of

if TYPE_CHECKING:
    from weight_transfer.model.manifest import Manifest

    Targets = Mapping[str, torch.Tensor]

_RUNS = 8


def record(
    load_weights: Callable[[list[tuple[str, torch.Tensor]]], object],
    manifest: Manifest,
    targets: Targets | Callable[[], Targets],
) -> Recording:
    """Run a loader once over weights without bytes, and return what it would copy, and where to.

    Nothing is written into the targets, whether they have bytes or not, and nothing is read but what the loader has not
    written. What the loader does beside that, it does: one that replaces parameters (because it quantises while it
    loads, for instance) leaves the model damaged. Where that can be seen, the target is refused; the caller puts the
    original tensors back into the model, or unwraps such loaders before. Modules' tensors are best taken before::

        own = dict(model.named_parameters())
        recording = record(model.load_weights, manifest, lambda: dict(model.named_parameters()))
        # a name that recording.refused says was replaced: put own[name] back

    Args:
        load_weights: takes ``[(name, tensor), ...]``; the tensors are on the ``meta`` device. It is called again, over
            the other weights, if it fails at some.
        manifest: of the weights. Each is given once, under the name that it travels with.
        targets: the model's tensors by name, each memory once, as ``named_parameters()`` gives them: on ``meta``, or
            with bytes. A function is called before and after, so that tensors which the loader has put in their place
            are noticed; of a mapping, only that it has given a tensor other memory.

    Raises:
        ConfigError: the loader is one that does nothing when it is called, fails before it takes a weight, or fails at
            too many; or two targets are one memory.
    """
    require_eager(load_weights, "load_weights")
    read = targets if callable(targets) else lambda: targets
    with torch.inference_mode(False), torch.no_grad(), _uncollected():
        own = dict(read())
        _require_apart(own)
        before = {name: _Form.of(tensor) for name, tensor in own.items()}
        plain = {name: tensor for name, tensor in own.items() if before[name].storage is not None}
        failed: dict[str, str] = {}
        trace, found = _run(load_weights, manifest, plain, failed)
        runs = 1
        while found:
            failed |= found
            if runs == _RUNS:
                raise ConfigError(
                    f"load_weights cannot be recorded: it fails at {len(failed)} weights without bytes, such as "
                    f"{next(iter(failed))!r} ({next(iter(failed.values()))})."
                )
            trace, found = _run(load_weights, manifest, plain, failed)
            runs += 1
        kept = _kept(trace)
        after = dict(read())
    for name, tensor in own.items():
        if (reason := before[name].difference(tensor, after.get(name))) is not None:
            trace.refused[name] = reason, trace.refused.get(name, ("", set()))[1]
    return _recording(manifest, {name: before[name].form for name in own}, trace, failed, kept)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Put off garbage collection: of a hundred thousand values that are made none is garbage; looking takes as long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@attrs.frozen(eq=False)
class _Form:
    """A target as it was before the loader ran; its storage is held, so that no other one gets the address."""

    tensor: torch.Tensor
    storage: torch.UntypedStorage | None
    offset: int
    form: TargetForm

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Form:
        shape = tuple(tensor.shape)
        if not _is_plain(tensor):
            return cls(tensor, None, 0, TargetForm(dtype_name(tensor.dtype), shape, Strided.contiguous(shape).stride))
        form = TargetForm(dtype_name(tensor.dtype), shape, tensor.stride())
        return cls(tensor, tensor.untyped_storage(), int(tensor.storage_offset()), form)

    def difference(self, tensor: torch.Tensor, current: torch.Tensor | None) -> str | None:
        """Return what the loader has done to the target, or why it could not be recorded anyway."""
        if self.storage is None:
            return "it is sparse, or sharded over ranks"
        if current is not self.tensor:
            return "the loader replaces it in the model; put the original tensor back"
        now = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()  # noqa: SLF001
        if now != (self.storage._cdata, self.offset, self.form.shape, self.form.stride):  # noqa: SLF001
            return "the loader gives it other memory; restore its data"
        return None


class _Given(list[tuple[str, torch.Tensor]]):
    """The weights that a loader is given; knows how many it has taken."""

    taken = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(len(self)):
            self.taken = max(self.taken, number + 1)
            yield self[number]


def _run(
    load_weights: Callable[[list[tuple[str, torch.Tensor]]], object],
    manifest: Manifest,
    targets: Targets,
    failed: Mapping[str, str],
) -> tuple[Trace, dict[str, str]]:
    """Run the loader once, and over what is left after each weight at which it fails.

    Returns:
        What was seen, and at which weights it fails. If there are any, what was seen is worthless: weights that the
        loader had put aside may have been lost.
    """
    trace = Trace(targets)
    found: dict[str, str] = {}
    params = [param for param in manifest.params if param.name not in failed]
    while True:
        given = _Given((param.name, trace.source(param)) for param in params)
        try:
            with trace:
                done = load_weights(given)
        except Exception as error:
            if not (given.taken or trace.looked or found or failed):
                raise ConfigError(
                    "load_weights cannot be recorded: it fails before it takes a weight.",
                    cause=f"{type(error).__name__}: {error}",
                ) from error
            begins = "the loader needs its bytes: " if _wants_bytes(error) else FAILS
            reason = f"{begins}{type(error).__name__}: {error}"
            found |= trace.looked or {param.name: reason for param in params[: given.taken][-1:]}
            trace.looked.clear()
            if not given.taken:
                return trace, found
            params = params[given.taken :]
        else:
            require_done(done, load_weights, "load_weights")
            return trace, found | trace.looked


def _wants_bytes(error: Exception) -> bool:
    """Whether an exception is torch's about a tensor on ``meta``."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


def _kept(trace: Trace) -> dict[str, str]:
    """Return the sources that the loader holds on to, and how."""
    if trace.kept():
        gc.collect()  # a cycle holds nothing on purpose
    return trace.kept()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is elements in one storage, and not sparse or sharded."""
    return tensor.layout is torch.strided and not hasattr(tensor, "_local_tensor")


def _require_apart(targets: Targets) -> None:
    known: dict[object, str] = {}
    for name, tensor in targets.items():
        if not _is_plain(tensor) or not tensor.numel():
            continue
        storage = tensor.untyped_storage()._cdata  # noqa: SLF001
        other = known.setdefault((storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()), name)
        if other != name:
            raise ConfigError(f"Targets {other!r} and {name!r} are one tensor; give each memory under one name.")


def _recording(
    manifest: Manifest, targets: Mapping[str, TargetForm], trace: Trace, failed: dict[str, str], kept: Mapping[str, str]
) -> Recording:
    refused = dict(trace.refused)
    uncovered: dict[str, tuple[int, int]] = {}
    copies: list[RecordedCopy] = []
    fills: list[RecordedFill] = []
    for name, form in targets.items():
        writes = trace.writes.get(name, [])
        into = [write for write in writes if isinstance(write, RecordedCopy)]
        if name not in refused:
            reach = reach_of([write.to for write in writes], form.strided)
            reason = _reason_against(writes, reach, kept)
            if reason is not None:
                refused[name] = reason, set()
            elif reach.elements != form.strided.numel:
                uncovered[name] = reach.elements, form.strided.numel
        if name in refused:
            refused[name][1].update(copy.source for copy in into)
        else:
            copies += into
            fills += [write for write in writes if isinstance(write, RecordedFill)]
    refusals = {name: Refusal(name, tuple(sorted(refused[name][1])), refused[name][0]) for name in sorted(refused)}
    used = {copy.source for copy in copies}.union(*(refusal.sources for refusal in refusals.values()))
    failed = failed | {name: f"the loader keeps something of it: {reason}" for name, reason in kept.items()}
    unused = [param.name for param in manifest.params if param.name not in used and param.name not in failed]
    if failed:  # the loader may have waited for them in vain
        failed |= dict.fromkeys(unused, f"the loader may need it along with {next(iter(failed))!r}")
        unused = []
    return Recording(manifest, targets, tuple(copies), tuple(fills), refusals, failed, frozenset(unused), uncovered)


def _reason_against(writes: Sequence[RecordedCopy | RecordedFill], reach: Reach, kept: Mapping[str, str]) -> str | None:
    """Return why writes into a target cannot be repeated, or are not all that the loader does with their sources."""
    for write in writes:
        if isinstance(write, RecordedCopy) and write.source in kept:
            return f"the loader also keeps something of {write.source!r}: {kept[write.source]}"
    if reach.overlap is not None:
        one, two = (_called(writes[number]) for number in reach.overlap)
        return f"it is written twice in one place, from {one} and from {two}"
    return None


def _called(write: RecordedCopy | RecordedFill) -> str:
    return repr(write.source) if isinstance(write, RecordedCopy) else f"the value {write.value}"
