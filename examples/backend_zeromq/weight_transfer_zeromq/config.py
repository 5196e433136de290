"""Options of the ``zeromq`` backend: the table ``[weight_transfer.zeromq]``."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class ZeroMqOptions:
    """Options of the ``zeromq`` backend; the trainer's count, workers are told what they need when they join.

    Attributes:
        host: IPv4 address at which the trainer listens and the workers connect.
        encrypt: encrypt with CURVE, under a key that is made for each session. Without it a stranger who can read the
            network can read the weights; he cannot join either way.
    """

    host: str = attrs.field(default="127.0.0.1", validator=attrs.validators.instance_of(str))
    encrypt: bool = attrs.field(default=True, validator=attrs.validators.instance_of(bool))
