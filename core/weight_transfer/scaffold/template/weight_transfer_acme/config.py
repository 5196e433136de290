"""Options of the ``acme`` backend: the table ``[weight_transfer.acme]``."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class AcmeOptions:
    """Options of the ``acme`` backend; the trainer's count, workers are told what they need when they join.

    Attributes:
        host: IPv4 address or name of the trainer's host, where it listens and the workers connect to.
    """

    host: str = attrs.field(default="127.0.0.1", validator=attrs.validators.instance_of(str))
