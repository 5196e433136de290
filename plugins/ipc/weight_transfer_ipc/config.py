"""Options of the ``ipc`` backend: the table ``[weight_transfer.ipc]``."""

from __future__ import annotations

from typing import Literal

import attrs


@attrs.frozen(kw_only=True)
class IpcOptions:
    """Options of the ``ipc`` backend.

    Attributes:
        export: ``"adopt"`` moves the trainer's parameters into shared memory at the first update, so that workers
            copy straight from them and each byte is copied once; ``"stage"`` leaves them where they are and copies
            through the ring of buckets at each update, so that each byte is copied twice.
    """

    export: Literal["adopt", "stage"] = attrs.field(default="adopt", validator=attrs.validators.in_(("adopt", "stage")))
