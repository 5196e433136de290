"""Asking the workers what they keep of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.session.calls import gone_in
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.session.calls import Lost
    from weight_transfer.session.fleet import Fleet
    from weight_transfer.session.peers import Peer
    from weight_transfer.session.sharing import Keeper


class Asking:
    """Knows what each worker keeps, and asks those of which it does not.

    Args:
        fleet: the workers.
        config: the trainer's.
        target: of the update; see `WeightSender.send`.
        lost: takes in the workers that could not join again, or whose models the weights do not fit.
    """

    def __init__(self, fleet: Fleet, config: WeightTransferConfig, target: str, lost: Lost) -> None:
        self._fleet = fleet
        self._config = config
        self._target = target
        self._lost = lost

    def __call__(self, manifest: Manifest) -> list[Keeper]:
        """Return what each worker that has joined keeps of the weights of a manifest.

        A worker that has left since it joined, for another trainer, say, joins again first.

        Raises:
            ManifestMismatchError: the weights do not fit a worker's model, and no failure is allowed, or none is left.
        """
        fleet, lost = self._fleet, self._lost
        if self._strangers(manifest):
            self._ask_all(manifest)
        fleet.require_one(lost)
        return [keeper for peer in fleet.peers if peer.joined for keeper in peer.kept[self._target][1]]

    def _ask_all(self, manifest: Manifest) -> None:
        fleet, lost = self._fleet, self._lost
        deadline = Deadline(self._config.timeout)
        failures = self._ask(manifest, deadline)
        gone = gone_in(failures)
        lost |= fleet.settle({peer: error for peer, error in failures.items() if peer not in gone})
        if gone:
            for peer in gone:
                peer.forget()
            lost |= fleet.join()
            fleet.require_one(lost)
            lost |= fleet.settle(self._ask(manifest, deadline))

    def _strangers(self, manifest: Manifest) -> list[Peer]:
        """Return those that have joined and not been asked."""
        return [
            peer
            for peer in self._fleet.peers
            if peer.joined and peer.kept.get(self._target, (None,))[0] is not manifest
        ]

    def _ask(self, manifest: Manifest, deadline: Deadline) -> Lost:
        """Ask those that have not been asked; return those that failed."""
        strangers = self._strangers(manifest)
        asking = [peer for peer in strangers if hasattr(peer.channel, "weight_needs")]
        request = {
            "is_checkpoint_format": self._config.is_checkpoint_format,
            "target": self._target,
            "timeout": max(deadline.remaining(), 1e-3),
        }
        calls = self._fleet.call(asking, lambda peer: peer.needs(request, manifest), "weight_needs", deadline)
        failures = calls.wait(deadline)
        for peer in strangers:
            if peer not in failures:
                peer.keep(self._target, manifest, calls.results.get(peer))
        return failures
