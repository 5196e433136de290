"""Whether what workers say that they have received is what the trainer's ranks have sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from weight_transfer.config.structuring import brief
from weight_transfer.errors import HandshakeError, IntegrityError, TransferError
from weight_transfer.memory.chunks import SCHEME
from weight_transfer.memory.digest_table import DigestTable
from weight_transfer.model.manifest import Manifest, digest_json
from weight_transfer.session.region_plan import RegionPlan

if TYPE_CHECKING:
    from weight_transfer.session.peers import Peer
    from weight_transfer.values.report import Receipt

_NAMED = 3  # names in a message, at most


def incomparable(peer: Peer, answer: object) -> HandshakeError | None:
    """Return why nothing that a worker will receive could be compared; None if it can.

    Args:
        peer: the workers behind a channel.
        answer: theirs to ``init_weight_transfer_engine``.
    """
    scheme = answer.get("digests") if isinstance(answer, dict) else None
    if scheme == SCHEME:
        return None
    if scheme is None:
        why = (
            "Its answer to init_weight_transfer_engine does not say how it digests what arrives, so bytes cannot be "
            "compared: its server drops what workers answer, or it has another version of weight-transfer. Hand the "
            "answers on"
        )
    else:
        why = (
            f"It digests what arrives by {brief(scheme)} and the trainer by {SCHEME!r}, so bytes cannot be compared. "
            "Install the same version of weight-transfer on both sides"
        )
    return HandshakeError(f"{why}, or set verify = 'none' on the trainer.", peer=peer.address, phase="init")


@attrs.frozen
class SentTables:
    """What was sent in an update, as digests.

    Attributes:
        manifest: of what went whole.
        plan: what went by region.
        whole: the `DigestTable` of what went whole, as text.
        regions: by trainer rank, the tables of what each worker took, by its number as text; empty if all went whole.
    """

    manifest: Manifest
    plan: RegionPlan
    whole: str
    regions: Sequence[Mapping[str, str]]

    @property
    def digest(self) -> str:
        """The digest of the receipt of whoever has received all of it, which went whole; see `Receipt`."""
        return digest_json([self.manifest.digest, [self.whole]])

    def refusal(self, peer: Peer, receipts: Sequence[Receipt]) -> TransferError | None:
        """Return why the workers behind a channel must not publish; None if they have received what was sent."""
        numbers = range(peer.first_worker, peer.first_worker + peer.count)
        by_worker = {receipt.worker: receipt for receipt in receipts}
        places = 1 + len(self.regions)
        if by_worker.keys() != set(numbers) or any(len(receipt.tables) != places for receipt in receipts):
            return TransferError(
                "Its answer to update_weights does not say what has arrived, so there is nothing to compare; have its "
                "server hand that answer on, or set verify = 'none' on the trainer.",
                peer=peer.address,
                phase="update",
            )
        return next(filter(None, (self._unlike(peer, by_worker[number]) for number in numbers)), None)

    def _unlike(self, peer: Peer, receipt: Receipt) -> IntegrityError | None:
        sent = (self.whole, *(own.get(str(receipt.worker), "") for own in self.regions))
        place = next((place for place, table in enumerate(sent) if table != receipt.tables[place]), None)
        if place is None:
            return None
        names = self._names(receipt.worker, place, sent[place], receipt.tables[place])
        if len(names) == 1:
            what = f"Parameter {names[0]!r}"
        elif names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            what = f"Some of {', '.join(map(repr, names[:_NAMED]))}{more}"
        else:
            what = "Something"
        return IntegrityError(
            f"{what} arrived with other bytes than were sent; send the update again.",
            peer=peer.address,
            phase="update",
            param=names[0] if names else None,
            expected=digest_json(sent[place]),
            got=digest_json(receipt.tables[place]),
        )

    def _names(self, worker: int, place: int, sent: str, received: str) -> list[str]:
        """Return the names of weights of which some differ; none if the worker has counted otherwise."""
        try:
            mine, theirs = DigestTable.from_text(sent), DigestTable.from_text(received)
        except ValueError:
            return []
        if mine.count != theirs.count:
            return []
        numbers = mine.differing(theirs)
        if place == 0:
            return [self.manifest.params[number].name for number in numbers]
        return list(dict.fromkeys(self.plan.names_of(worker, place - 1, numbers)))
