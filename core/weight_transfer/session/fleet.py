"""The sender's workers as a whole, through the phases of an update: started, and told to publish."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import CommitError, ReplacedError, WeightTransferError
from weight_transfer.model.dtypes import common_dtypes
from weight_transfer.session.calls import Lost, gone_in
from weight_transfer.session.joining_workers import JoiningWorkers
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.versions import require_forward

if TYPE_CHECKING:
    from weight_transfer.session.peers import Peer
    from weight_transfer.values.events import Version

_SAYING = 0.01  # seconds


class Fleet(JoiningWorkers):
    """The workers, and the trainer's engine that they have joined.

    Each phase returns the workers that it lost, or raises the first failure: ``on_worker_failure`` decides.
    """

    @property
    def started(self) -> list[Peer]:
        """The workers on which the update is open."""
        return [peer for peer in self.peers if peer.started]

    def versions(self, target: str) -> list[Version]:
        """Return the versions of ``target`` that the workers have; waits until they answer."""
        self.greet(Deadline(self._config.init_timeout))
        statuses = [peer.status for peer in self.peers if peer.greeted or peer.joined]
        served = [_version_in(status, target) for status in statuses]
        return [version for version in served if isinstance(version, (int, str))]

    def dtypes(self, called: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Return the dtypes that the workers, which must have joined, have for weights of these names.

        Raises:
            HandshakeError: a worker does not know, lacks one, or differs from another; they are named.
        """
        return common_dtypes({peer.address: peer.dtypes for peer in self.peers if peer.joined}, called)

    @property
    def may_begin(self) -> bool:
        """Whether all workers take the start of an update and its weights in one call."""
        return all(peer.begins for peer in self.peers if peer.joined)

    def expect(self) -> None:
        """Let those that have joined prepare for an update while the trainer does.

        Whoever says that to them gets the interpreter for a moment: the trainer's look at its weights may not let go of
        it until it is over.
        """
        said = [peer.expect() for peer in self.peers]
        wait([each for each in said if each is not None], _SAYING)

    def begin(self) -> None:
        """Leave it to the call that brings the weights to open the update."""
        for peer in self.peers:
            peer.started = peer.joined

    def start(self, deadline: Deadline, replan: Callable[[Lost], object]) -> Lost:
        """Open the update; a worker that was restarted since the last one joins again first.

        Args:
            deadline: of the update.
            replan: called when workers have joined again, which may keep something else, or have other numbers.
        """
        lost: Lost = {}
        failures = self._start_joined(deadline)
        gone = gone_in(failures)
        lost |= self.settle({peer: error for peer, error in failures.items() if peer not in gone})
        if gone:
            for peer in gone:
                peer.forget()
            lost |= self.join()
            self.require_one(lost)
            replan(lost)
            lost |= self.settle(self._start_joined(deadline))
        return lost

    def _start_joined(self, deadline: Deadline) -> Lost:
        peers = [peer for peer in self.peers if peer.joined and not peer.started]
        failures = self.call(peers, lambda peer: peer.start(), "start_weight_update", deadline).wait(deadline)
        for peer in peers:
            peer.started = peer not in failures
        return failures

    def require_forward(self, target: str, version: Version) -> None:
        """Refuse a version that another trainer has brought a worker beyond, before any of them is touched.

        Raises:
            RollbackError: it has published a higher one.
        """
        for peer in self.peers:
            if peer.joined:
                require_forward(version, peer.committed.get(target), phase="init", peer=peer.address)

    def decide(self, update: str, digest: str) -> None:
        """Have an update published as soon as it has arrived, if there is a single worker, which takes that."""
        only = self.started
        if len(only) == 1 and only[0].takes_decisions:
            only[0].decide(update, digest)

    def finish(
        self, version: Version, target: str, update: str | None, deadline: Deadline, done: Collection[Peer] = ()
    ) -> Lost:
        """Have the version of ``target`` published that an update has brought: all workers have it now.

        Args:
            version: the version.
            target: of the receivers' models.
            update: the update's id.
            deadline: of the update.
            done: those that have published it already.

        Raises:
            CommitError: some have published it, and one failure is too many.
        """
        started = self.started
        peers = [peer for peer in started if peer not in done]
        calls = self.call(peers, lambda peer: peer.finish(version, update), "finish_weight_update", deadline)
        try:
            lost = self.settle(calls.wait(deadline)) if peers else {}
        except WeightTransferError as error:
            published = [peer for peer in started if peer in done or peer in calls.results]
            if not published or isinstance(error, ReplacedError):
                raise
            raise self.half_committed(error, version, started, published) from error
        finally:
            for peer in started:
                peer.started = False
                peer.committed.pop(target, None)
        return lost

    def half_committed(
        self, error: WeightTransferError, version: Version, all_: Collection[Peer], done: Collection[Peer]
    ) -> CommitError:
        """Return the error that says which of all have published a version, and which have not."""
        published = [peer.address for peer in done]
        unpublished = [peer.address for peer in all_ if peer not in done]
        others = f", but was not published by {', '.join(unpublished)}" if unpublished else ""
        return CommitError(
            f"Version {version!r} is served by {', '.join(published)}{others}; send again: that brings all to one "
            "version.",
            backend=self._config.backend,
            phase="finish",
            version=version,
            peer=getattr(error, "peer", None),
            cause=str(error),
            published=published,
            unpublished=unpublished,
        )


def _version_in(status: dict[str, Any], target: str) -> object:
    """Return the last version of a target: published, or else served, as far as the status tells."""
    tables = [table for table in (status.get("committed"), status.get("versions")) if isinstance(table, dict)]
    found = (table[target] for table in tables if table.get(target) is not None)
    return next(found, None if tables else status.get("version"))
