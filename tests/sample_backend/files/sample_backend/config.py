"""Options of the ``files`` backend: the table ``[weight_transfer.files]``."""

from __future__ import annotations

import tempfile

import attrs


@attrs.frozen(kw_only=True)
class FilesOptions:
    """Options of the ``files`` backend.

    Attributes:
        directory: a directory that trainer and workers share, each by its own path. It needs room for all weights.
    """

    directory: str = attrs.field(factory=tempfile.gettempdir, validator=attrs.validators.instance_of(str))
