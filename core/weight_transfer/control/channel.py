"""The methods of a control channel, and the channel to receivers of the same process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from weight_transfer.dtypes import joint_answer
from weight_transfer.errors import WeightTransferError
from weight_transfer.report import WorkerReport

if TYPE_CHECKING:
    from weight_transfer.events import Version
    from weight_transfer.receiver import WeightReceiver

T = TypeVar("T")


class ControlChannel(Protocol):
    """How a sender talks to one worker, or to a replica of several workers behind one address.

    The protocol is structural: the first four methods are those of vLLM's clients. Dicts are JSON-safe and carry their
    own ``timeout`` in seconds. A method returns when all workers behind the channel have done it, and raises a
    `WeightTransferError` otherwise. A sender may call ``abort_weight_update`` while
    ``update_weights`` is under way in another thread. ``address`` (text) may be given as an attribute, for messages.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        """Join the trainer; return the names of the model's weights by dtype, as ``{"dtypes": ...}``, if it asks."""

    def start_weight_update(self) -> None:
        """Begin an update."""

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        """Receive and load the weights; return a `WorkerReport` as a dict, or None."""

    def finish_weight_update(self, weight_version: Version | None = None) -> None:
        """Publish the version."""

    def abort_weight_update(self, reason: str = "") -> None:
        """Give up a running update."""

    def status(self) -> dict[str, Any]:
        """Return ``state``, ``version``, ``backend``, ``workers`` and ``error``."""


class LocalChannel:
    """The channel to one or more receivers of this process, such as the ranks of a tensor-parallel replica.

    A worker's rank in the transfer group is ``rank_offset + receiver.parallel_config.rank``.

    Args:
        receivers: called side by side, each on a thread of its own.
    """

    def __init__(self, *receivers: WeightReceiver) -> None:
        if not receivers:
            raise ValueError("LocalChannel needs at least one receiver")
        self._receivers = receivers

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        return joint_answer(self._each(lambda receiver: receiver.init_weight_transfer_engine(init_info)))

    def start_weight_update(self) -> None:
        self._each(lambda receiver: receiver.start_weight_update())

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        answers = self._each(lambda receiver: receiver.update_weights(update_info), together=True)
        return WorkerReport.joint([WorkerReport.of(answer) for answer in answers]).to_dict()

    def finish_weight_update(self, weight_version: Version | None = None) -> None:
        self._each(lambda receiver: receiver.finish_weight_update(weight_version))

    def abort_weight_update(self, reason: str = "") -> None:
        self._each(lambda receiver: receiver.abort_weight_update(reason))

    def status(self) -> dict[str, Any]:
        """Return the first receiver's status; ``version`` is None unless all serve the same one."""
        members = [receiver.status() for receiver in self._receivers]
        versions = {member["version"] for member in members}
        states = {member["state"] for member in members}
        return {
            "state": states.pop() if len(states) == 1 else "mixed",
            "version": versions.pop() if len(versions) == 1 else None,
            "backend": members[0]["backend"],
            "workers": len(members),
            "error": next((member["error"] for member in members if member["error"]), None),
        }

    def _each(self, call: Callable[[WeightReceiver], T], together: bool = False) -> list[T]:
        """Call for each receiver and return the results; ``together``: a failure aborts the update of the others."""
        if len(self._receivers) == 1:
            return [call(self._receivers[0])]
        errors: list[BaseException] = []
        results: dict[WeightReceiver, T] = {}

        def run(receiver: WeightReceiver) -> None:
            try:
                results[receiver] = call(receiver)
            except BaseException as error:  # noqa: BLE001  (re-raised below, in the caller's thread)
                errors.append(error)
                if together and len(errors) == 1:
                    self._abort_others(receiver, f"another worker of this replica failed: {error}")

        threads = [threading.Thread(target=run, args=(receiver,), daemon=True) for receiver in self._receivers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[receiver] for receiver in self._receivers]

    def _abort_others(self, failed: WeightReceiver, reason: str) -> None:
        for receiver in self._receivers:
            if receiver is not failed:
                with suppress(WeightTransferError):  # the failure itself is what is reported
                    receiver.abort_weight_update(reason)
