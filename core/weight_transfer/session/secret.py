"""What the ranks of a trainer prove to each other to know."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from weight_transfer.errors import ConfigError

_BYTES = 32
_SET_TOKEN = "set a token, the same on all ranks"


def secret_of(token: str | None) -> str:
    """Return the configured token, or else this user's own secret, which a file of theirs keeps.

    The file is ``weight-transfer/secret`` in ``$XDG_STATE_HOME``, by default ``~/.local/state``; it is made when it is
    first needed.

    Raises:
        ConfigError: there is no token, and no such file either, or others may read it.
    """
    return token or _of_user()


def _of_user() -> str:
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        path = state / "weight-transfer" / "secret"
        if not path.exists():
            _make(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, encoding="ascii", errors="replace") as file:
            status, text = os.fstat(descriptor), file.read(4 * _BYTES)
    except (OSError, RuntimeError) as error:
        message = f"The secret that this user's trainer ranks share cannot be kept; {_SET_TOKEN}."
        raise ConfigError(message, cause=str(error)) from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or len(text) < 2 * _BYTES:
        raise ConfigError(f"{path} is no secret of this user's alone; delete it, or {_SET_TOKEN}.")
    return text


def _make(path: Path) -> None:
    """Write a new secret, whole or not at all, unless another process has just done so."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # for this user alone
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_BYTES))
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
