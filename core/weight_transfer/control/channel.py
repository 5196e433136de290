"""The methods of a control channel, and the channel to receivers of the same process."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from weight_transfer.control.joining import joint_init, joint_needs, joint_report, joint_status
from weight_transfer.errors import ConfigError, WeightTransferError

if TYPE_CHECKING:
    from weight_transfer.session.receiver import WeightReceiver
    from weight_transfer.values.events import Version

T = TypeVar("T")


class ControlChannel(Protocol):
    """How a sender talks to one worker, or to a replica of several workers behind one address.

    The protocol is structural: the first four methods are those of vLLM's clients. Dicts are JSON-safe and carry their
    own ``timeout`` in seconds. A method returns when all workers behind the channel have done it, and raises a
    `WeightTransferError` otherwise. A sender may call ``abort_weight_update`` while
    ``update_weights`` is under way in another thread.

    Without ``status``, or with an empty answer, nobody can say how the workers are; without ``abort_weight_update`` a
    failed update ends when the next ``send`` joins them anew. Attributes may say more: ``address`` (text) is for
    messages, ``workers`` (a number) counts the workers behind the channel, as long as ``status`` does not. With
    ``text_versions = True``, for servers that keep versions as text, ``finish_weight_update`` is called with ``"7"``
    where the version is 7; a receiver behind it is told of that when it joins, and serves 7.

    ``start_weight_update``, ``finish_weight_update`` and ``abort_weight_update`` should also take
    ``session: str | None = None`` and hand it on to the receiver. If they all do, the sender names its session to the
    worker, which then refuses the calls of trainers that it has not joined last. Otherwise it names none; nor if the
    channel has an attribute ``carries_session`` that is False, since it cannot hand them on after all. If
    ``finish_weight_update`` takes ``update: str | None = None``, too, the sender names the update that is to be
    published.

    A channel may have a method ``begin_weight_update(update_info)``, which does what ``start_weight_update`` and
    ``update_weights`` do, with the session of ``update_info``. The sender calls it while an attribute ``begins`` of all
    its channels is True: the workers are surely those that have joined, and none of them has to wait for samplers.

    A channel may have a method ``expect_weight_update(session)``, which returns at once and never fails: an update is
    about to start, and the workers may prepare for it while the trainer looks at its weights. It may return a future
    that is done once that has been said, which the sender awaits for some milliseconds.

    A channel to a single worker may have a method ``decide_weight_update(update, digest, session)``, which returns at
    once and never fails: the update that is under way is to be published as soon as it has arrived, if its receipt has
    this digest. The answer to ``update_weights`` then says that it was published. The sender calls it while ``begins``
    is True. Of several workers none may publish before all have received; so nothing can be decided in advance.

    A channel may also have a method ``weight_needs(request)``, as `LocalChannel` and `HttpChannel` do; without it all
    weights go whole. It takes a `WeightNeeds` as a dict and returns ``{"needs": [...]}``: for each worker behind the
    channel, in the order of their ranks, what it keeps of the weights (`Regions.to_wire`), or None if it needs them
    whole. None instead of the dict says the same of all.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        """Join the trainer; return what the workers answer, or None if that does not come through.

        With ``verify`` the sender then refuses the channel.
        """

    def start_weight_update(self) -> None:
        """Begin an update."""

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        """Receive and load the weights; return a `WorkerReport` as a dict. None will do if nothing is compared."""

    def finish_weight_update(self, weight_version: Version | None = None) -> None:
        """Publish the version."""

    def abort_weight_update(self, reason: str = "") -> None:
        """Give up a running update."""

    def status(self) -> dict[str, Any]:
        """Return ``state``, ``version``, ``backend``, ``workers`` and ``error``, perhaps ``device`` and more."""


def takes_session(channel: object) -> bool:
    """Return whether the calls of a channel that may come too late all take a parameter ``session``, and hand it on."""
    methods = ("start_weight_update", "finish_weight_update", "abort_weight_update")
    carries = getattr(channel, "carries_session", True) is not False
    offered = (getattr(channel, method) for method in methods if hasattr(channel, method))
    return carries and all(_takes(method, "session") for method in offered)


def takes_update(channel: ControlChannel) -> bool:
    """Return whether a channel can name the update that is to be published."""
    return _takes(channel.finish_weight_update, "update")


def _takes(method: Callable[..., object], parameter: str) -> bool:
    try:
        return parameter in inspect.signature(method).parameters
    except (TypeError, ValueError):  # it is not written in Python
        return False


class LocalChannel:
    """The channel to one or more receivers of this process, such as the ranks of a tensor-parallel replica.

    A worker's rank in the transfer group is ``rank_offset + receiver.parallel_config.rank``.

    Args:
        receivers: called side by side, each on a thread of its own; their ranks count from 0.

    Raises:
        ConfigError: there is no receiver, or their ranks are not 0, 1, 2, ...
    """

    def __init__(self, *receivers: WeightReceiver) -> None:
        if not receivers:
            raise ConfigError("LocalChannel needs at least one receiver.")
        ranks = [receiver.parallel_config.rank for receiver in receivers]
        if sorted(ranks) != [*range(len(receivers))]:
            given, last = ", ".join(map(str, ranks)), len(receivers) - 1
            raise ConfigError(
                f"LocalChannel needs receivers of the ranks 0 to {last}, each once, got {given}; give each its "
                f"parallel_config=ParallelConfig(rank=..., world_size={len(receivers)})."
            )
        self._receivers = receivers

    def __repr__(self) -> str:
        return f"<LocalChannel to {', '.join(map(repr, self._receivers))}>"

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        return joint_init(self._each(lambda receiver: receiver.init_weight_transfer_engine(init_info)))

    def start_weight_update(self, session: str | None = None) -> None:
        self._each(lambda receiver: receiver.start_weight_update(session))

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        def fail(other: WeightReceiver, reason: str) -> None:
            other.abort_weight_update(reason, update_info.get("session"))

        answers = self._each(lambda receiver: receiver.update_weights(update_info), fail)
        return joint_report(answers)

    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what each receiver keeps, in the order of their ranks."""
        answers = self._each(lambda receiver: (receiver.parallel_config.rank, receiver.weight_needs(request)))
        return joint_needs([answer for _, answer in sorted(answers, key=lambda answer: answer[0])])

    def finish_weight_update(
        self, weight_version: Version | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        self._each(lambda receiver: receiver.finish_weight_update(weight_version, session, update))

    def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
        self._each(lambda receiver: receiver.abort_weight_update(reason, session))

    def status(self) -> dict[str, Any]:
        """Return the first receiver's status; a version is None unless all have the same one."""
        return joint_status([receiver.status() for receiver in self._receivers])

    @property
    def failed(self) -> bool:
        """Whether one of the receivers has failed; see `WeightReceiver.failed`."""
        return any(receiver.failed for receiver in self._receivers)

    def when_sampled(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Have ``tell`` called when somebody samples from one of the receivers; see `WeightReceiver.when_sampled`."""
        forgetting = [receiver.when_sampled(tell) for receiver in self._receivers]

        def forget() -> None:
            for each in forgetting:
                each()

        return forget

    def _each(
        self, call: Callable[[WeightReceiver], T], fail: Callable[[WeightReceiver, str], None] | None = None
    ) -> list[T]:
        """Call for each receiver and return the results; after the first failure ``fail`` is called for the others."""
        if len(self._receivers) == 1:
            return [call(self._receivers[0])]
        errors: list[BaseException] = []
        results: dict[WeightReceiver, T] = {}

        def run(receiver: WeightReceiver) -> None:
            try:
                results[receiver] = call(receiver)
            except BaseException as error:  # noqa: BLE001  (re-raised below, in the caller's thread)
                errors.append(error)
                if fail is not None and len(errors) == 1:
                    for other in self._receivers:
                        if other is not receiver:
                            with suppress(WeightTransferError):  # the failure itself is what is reported
                                fail(other, f"another worker of this replica failed: {error}")

        threads = [threading.Thread(target=run, args=(receiver,), daemon=True) for receiver in self._receivers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[receiver] for receiver in self._receivers]
