"""Fewer and larger reads: ranges that are neighbours on both sides become one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
from numpy.typing import NDArray

from weight_transfer.errors import ManifestMismatchError

if TYPE_CHECKING:
    from weight_transfer_rdma.nixl import Rows

Integers = NDArray[np.int64]


@attrs.frozen(eq=False)
class Regions:
    """Registered memory: first bytes and sizes, sorted."""

    addresses: Integers
    sizes: Integers

    @classmethod
    def of(cls, pairs: list[tuple[int, int]]) -> Regions:
        """Return the regions ``(address, nbytes)``."""
        table = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
        return cls(table[:, 0], table[:, 1])

    def index(self, addresses: Integers, sizes: Integers) -> Integers:
        """Return in which region each range lies wholly.

        Raises:
            ManifestMismatchError: one lies in none.
        """
        found: Integers = np.searchsorted(self.addresses, addresses, side="right") - 1
        inside = found >= 0
        if len(self.addresses):
            inside &= addresses + sizes <= self.addresses[found] + self.sizes[found]
        if not inside.all():
            raise ManifestMismatchError(
                "The trainer's table of addresses points beyond its regions.", backend="rdma", phase="update"
            )
        return found


def merge(
    local: Integers,
    remote: Integers,
    sizes: Integers,
    local_regions: Integers,
    remote_regions: Integers,
    padding: Integers,
) -> Rows:
    """Return the reads that bring ``sizes`` bytes each from ``remote`` to ``local``.

    Where one range follows another at the same distance on both sides, in the same regions, with nothing or padding
    between them, they become one; the padding is overwritten, too.

    Args:
        local: addresses here; at least one.
        remote: addresses there.
        sizes: bytes, all positive.
        local_regions: region of each range here.
        remote_regions: region of each range there.
        padding: bytes behind the end of a range here that nobody uses.

    Returns:
        Rows of local address, remote address and bytes, sorted by local address.
    """
    order = np.argsort(local, kind="stable")
    local, remote, sizes = local[order], remote[order], sizes[order]
    local_regions, remote_regions, padding = local_regions[order], remote_regions[order], padding[order]
    gap = local[1:] - (local[:-1] + sizes[:-1])
    joined = (
        (np.diff(local) == np.diff(remote))
        & (gap >= 0)
        & (gap <= padding[:-1])
        & (np.diff(local_regions) == 0)
        & (np.diff(remote_regions) == 0)
    )
    first = np.flatnonzero(np.concatenate([[True], ~joined]))
    last = np.concatenate([first[1:] - 1, [len(local) - 1]])
    length = local[last] + sizes[last] - local[first]
    rows: Rows = np.stack([local[first], remote[first], length], axis=1).astype(np.uint64)
    return rows


def cuts(sizes: Integers, limit: int) -> Integers:
    """Return where to cut a list so that no part is much larger than ``limit``."""
    found: Integers = np.flatnonzero(np.diff(np.cumsum(sizes) // limit)) + 1
    return found
