"""Options of the ``rdma`` backend: the table ``[weight_transfer.rdma]``."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class RdmaOptions:
    """Options of the ``rdma`` backend; it has none yet."""
