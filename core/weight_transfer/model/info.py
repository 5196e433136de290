"""The typed contents of init and update requests. On the wire they are plain JSON dicts.

A field marked with `sent_once` (the manifest, a backend's table of addresses) travels in full only when it
changed; otherwise its digest goes in its place. `WireEncoder` and `WireDecoder` do that for every
backend, so that the control traffic of a steady-state update does not grow with the number of parameters.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, Self, TypeVar

import attrs

from weight_transfer.config.settings import to_seconds
from weight_transfer.config.structuring import brief, register, structure, unstructure
from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.manifest import Manifest, digest_json
from weight_transfer.values.lease import Lease

_ONCE = "weight_transfer_sent_once"
_PLAIN = (str, int, float, bool)

TRAINER_LEFT = "the trainer closed its connection"
"""The reason of an abort that a control channel orders because nobody waits for the answer any more."""

MODEL = "model"
"""The target that every receiver has: its model."""

TInfo = TypeVar("TInfo", bound="WeightTransferUpdateInfo | WeightNeeds")

register(Manifest, Manifest.from_wire, Manifest.to_wire)


def sent_once(**arguments: Any) -> Any:
    """Declare an attrs field that travels in full only when its value changed.

    Return the *same object* from update to update while the value is unchanged: its digest is computed once per object.
    """
    return attrs.field(**arguments, metadata={_ONCE: True})


@attrs.frozen(kw_only=True)
class WeightTransferInitInfo:
    """What a worker needs to join; backends add fields.

    Attributes:
        rank_offset: rank, in the transfer group, of the first worker behind this channel. The trainer has rank 0;
            a worker's rank is ``rank_offset + parallel_config.rank``.
        world_size: members of the transfer group: the trainer and all workers.
        timeout: seconds that joining may take.
        session: the trainer's name for this join; the worker then refuses calls that do not carry it.
        report_dtypes: the format, ``"checkpoint"`` or ``"kernel"``, of whose weights the worker is to answer the
            dtypes; None, and then not sent at all, if nobody asks.
        trainer_ranks: how many trainer ranks have an engine; see `Capability.REGIONS`.
        ranks: of the trainer ranks 1 and higher, what their engines said to be joined.
        text_versions: whether the control channel turns versions into text, so that ``finish_weight_update`` names 7 as
            ``"7"``; not sent at all otherwise.
        lease: the trainer's, which a worker refuses once it has seen a newer one; sent to workers whose status tells
            theirs.
    """

    rank_offset: int
    world_size: int
    timeout: float = attrs.field(converter=to_seconds)
    session: str | None = None
    report_dtypes: Literal["checkpoint", "kernel"] | None = None
    trainer_ranks: int = 1
    ranks: tuple[dict[str, Any], ...] = ()
    text_versions: bool = False
    lease: Lease | None = None

    def of_ranks(self) -> list[Self]:
        """Return the init info of each trainer rank: this one, which is rank 0's, and the others'.

        Raises:
            ValueError: a rank's engine said something that does not fit the class; the key is named.
        """
        common = {field.name: getattr(self, field.name) for field in attrs.fields(WeightTransferInitInfo)}
        common |= {"ranks": (), "trainer_ranks": self.trainer_ranks}
        infos = [structure({**common, **own}, type(self), "init_info of a trainer rank") for own in self.ranks]
        return [self, *infos]


@attrs.frozen(kw_only=True)
class WeightTransferUpdateInfo:
    """One update; backends add fields.

    Attributes:
        manifest: what is sent, in order.
        timeout: seconds that the update may take from now.
        version: the version that will be published if all goes well.
        is_checkpoint_format: see `WeightTransferConfig`.
        target: which of the receiver's models they are for.
        update: an id of these weights. A version may be used again for others, and by another trainer.
        allow_rollback: whether the version may be lower than the last one that the worker has published.
        base: if they are some of the weights (``manifest.partial``): the id of those whose others are kept.
        verify: see `WeightTransferConfig`; not sent at all if nothing is compared.
        session: that of the init info.
        layout: of the weights that go by region, a `Layout`'s `to_wire`; None if all go whole.
        shares: by trainer rank, what its engine said of its shards.
        kept: digest of what each worker keeps, by its number, as the trainer knows it.
    """

    manifest: Manifest = sent_once()
    timeout: float = attrs.field(converter=to_seconds)
    version: int | str | None = None
    is_checkpoint_format: bool = True
    target: str = MODEL
    update: str | None = None
    allow_rollback: bool = False
    base: str | None = None
    verify: Literal["wire", "loaded"] | None = None
    session: str | None = None
    layout: dict[str, Any] | None = sent_once(default=None)
    shares: tuple[dict[str, Any], ...] | None = sent_once(default=None)
    kept: tuple[str, ...] | None = sent_once(default=None)


@attrs.frozen(kw_only=True)
class WeightNeeds:
    """What a worker is asked by ``weight_needs``: which regions it keeps of some weights.

    Attributes:
        manifest: the weights; it travels once for this call and the updates that follow.
        is_checkpoint_format: see `WeightTransferConfig`.
        target: which of the receiver's models they are for.
        session: that of the init info.
        timeout: seconds that the answer may take; None for as long as a channel waits for others.
    """

    manifest: Manifest = sent_once()
    is_checkpoint_format: bool = True
    target: str = MODEL
    session: str | None = None
    timeout: float | None = attrs.field(default=None, converter=attrs.converters.optional(to_seconds))


def redefined_fields(cls: type[Any]) -> list[str]:
    """Return the fields that an info class of a backend declares though the core's own class has them."""
    own = {field.name for field in attrs.fields(cls) if not field.inherited}
    bases = [base for base in (WeightTransferInitInfo, WeightTransferUpdateInfo) if issubclass(cls, base)]
    return sorted(field.name for base in bases for field in attrs.fields(base) if cls is not base and field.name in own)


@attrs.frozen
class WeightTransferInitRequest:
    """Body of ``/init_weight_transfer_engine``."""

    init_info: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class WeightTransferDecisionRequest:
    """That an update is to be published once it has arrived: ``{"update": "...", "digest": "..."}``.

    Attributes:
        update: its id.
        digest: of the receipt that it has to bring; empty if nothing is compared.
        session: see `WeightTransferStartRequest`.
    """

    update: str
    digest: str = ""
    session: str | None = None


@attrs.frozen
class WeightTransferStartRequest:
    """Body of ``/start_weight_update``."""

    session: str | None = None


@attrs.frozen
class WeightTransferUpdateRequest:
    """Body of ``/update_weights``."""

    update_info: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class WeightNeedsRequest:
    """Body of ``/weight_needs``."""

    request: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class WeightTransferFinishRequest:
    """Body of ``/finish_weight_update``."""

    weight_version: int | str | None = None
    session: str | None = None
    update: str | None = None


@attrs.frozen
class WeightTransferAbortRequest:
    """Body of ``/abort_weight_update``."""

    reason: str = "the trainer aborted the update"
    session: str | None = None


@attrs.define
class _Sent:
    value: Any
    digest: str
    data: Any


class WireEncoder:
    """The trainer's side: turns update infos into dicts for workers that may know some fields already."""

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}

    def encode(self, info: WeightTransferUpdateInfo | WeightNeeds, known: dict[str, str]) -> dict[str, Any]:
        """Return ``info`` as JSON-safe data.

        Args:
            info: the update.
            known: digest by field name of what the worker has; update it with `digests` once the worker answered.
        """
        cls: Any = type(info)
        values = ((name, getattr(info, name)) for name in _fields(cls, False))
        data = {
            name: value if type(value) in _PLAIN else unstructure(value) for name, value in values if value is not None
        }
        for name, sent in self._current(info).items():
            if sent.value is None:
                continue
            data[name] = {"digest": sent.digest}
            if known.get(name) != sent.digest:
                data[name]["value"] = sent.data
        return data

    def digests(self, info: WeightTransferUpdateInfo | WeightNeeds) -> dict[str, str]:
        """Return the digest of each field that is sent once."""
        return {name: sent.digest for name, sent in self._current(info).items()}

    def _current(self, info: WeightTransferUpdateInfo | WeightNeeds) -> dict[str, _Sent]:
        for name in _once_fields(type(info)):
            value = getattr(info, name)
            if name not in self._sent or self._sent[name].value is not value:
                data = unstructure(value)
                self._sent[name] = _Sent(value, digest_json(data), data)
        return {name: self._sent[name] for name in _once_fields(type(info))}


class WireDecoder:
    """The worker's side: puts what it was sent once back into the dict of an update."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, Any]] = {}

    def decode(self, data: dict[str, Any], cls: type[Any]) -> dict[str, Any]:
        """Return ``data`` with a value in place of each digest; a dict without digests passes through.

        Raises:
            ManifestMismatchError: a digest is unknown here, or a value does not have the digest it came with.
        """
        result = dict(data)
        for name in _once_fields(cls):
            wire = data.get(name)
            if not isinstance(wire, dict) or "digest" not in wire:
                continue
            if "value" in wire:
                if _digest_of(wire["value"], name) != wire["digest"]:
                    raise ManifestMismatchError(
                        f"Field {name!r} of the update does not have the digest it came with; send it again."
                    )
                result[name] = wire["value"]
            elif self._known.get(name, ("", None))[0] == wire["digest"]:
                result[name] = self._known[name][1]
            else:
                raise ManifestMismatchError(
                    f"Field {name!r} of the update came as a digest that is unknown here; initialise this worker again."
                )
        return result

    def restored(self, data: dict[str, Any], info: TInfo) -> TInfo:
        """Return ``info`` with the very objects that were remembered, where ``data`` names them by digest.

        So whoever keeps something that was made of them knows by the object whether it has changed.
        """
        known = {
            name: self._known[name][1]
            for name in _once_fields(type(info))
            if name in self._known
            and isinstance(data.get(name), dict)
            and data[name].get("digest") == self._known[name][0]
            and getattr(info, name) is not self._known[name][1]  # parsing takes over what it need not make
        }
        return attrs.evolve(info, **known) if known else info

    def remember(self, data: dict[str, Any], info: WeightTransferUpdateInfo | WeightNeeds) -> None:
        """Keep the parsed fields of ``info``, so that the next update can name them by digest."""
        for name in _once_fields(type(info)):
            wire = data.get(name)
            if isinstance(wire, dict) and "digest" in wire:
                self._known[name] = (wire["digest"], getattr(info, name))


def _digest_of(value: Any, name: str) -> str:
    try:
        return digest_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestMismatchError(
            f"Field {name!r} of the update is no JSON data.", cause=brief(str(error))
        ) from error


def _once_fields(cls: Any) -> tuple[str, ...]:
    return _fields(cls, True)


@cache
def _fields(cls: Any, once: bool) -> tuple[str, ...]:
    return tuple(field.name for field in attrs.fields(cls) if (_ONCE in field.metadata) is once)
