"""Options of the ``ipc`` backend: the table ``[weight_transfer.ipc]``."""

from __future__ import annotations

from typing import Literal

import attrs


@attrs.frozen(kw_only=True)
class IpcOptions:
    """Options of the ``ipc`` backend. The trainer's count.

    Attributes:
        export: ``"adopt"`` lets workers copy straight from the trainer's parameters, so that each byte is copied once;
            CPU parameters move into shared memory for that at the first update, CUDA parameters stay where they are.
            ``"stage"`` copies through the ring of buckets at each update, so that each byte is copied twice.
        unexportable: what to do with CUDA tensors in memory that CUDA cannot export, such as torch's expandable
            segments: ``"stage"`` sends them through the ring and says so, ``"refuse"`` fails the update.
        keep_mapped: whether workers keep the trainer's GPU memory mapped between updates. As long as they do, memory
            that the trainer gives back stays taken; set it to False if the trainer offloads its weights between
            updates. Then each update maps the memory anew, about 0.3 ms for each of torch's blocks.
    """

    export: Literal["adopt", "stage"] = attrs.field(default="adopt", validator=attrs.validators.in_(("adopt", "stage")))
    unexportable: Literal["stage", "refuse"] = attrs.field(
        default="stage", validator=attrs.validators.in_(("stage", "refuse"))
    )
    keep_mapped: bool = attrs.field(default=True, validator=attrs.validators.instance_of(bool))
