"""Options of the ``nccl`` backend: the table ``[weight_transfer.nccl]``."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class NcclOptions:
    """Options of the ``nccl`` backend; it has none yet."""
