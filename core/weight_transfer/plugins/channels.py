"""Workers by address: a URL, or the name of an installed kind of channel and a URL, as in ``vllm+http://HOST:PORT``."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError
from weight_transfer.plugins.discovery import CHANNELS_GROUP, entry_points

if TYPE_CHECKING:
    from weight_transfer.control import ControlChannel


@contextmanager
def worker_at(address: str) -> Iterator[str | ControlChannel]:
    """Provide what a `WeightSender` takes for the worker at an address, and close it afterwards.

    Args:
        address: a URL, which is handed on as it is; or ``NAME+URL``, where NAME is an entry point of the group
            ``weight_transfer.channels``: a class that is called with the URL, and makes a `ControlChannel`.

    Raises:
        ConfigError: no installed distribution provides such channels, or several do, or what one provides fails to
            import.
    """
    name, plus, url = address.partition("+")
    if not plus or not name.isidentifier():
        yield address
        return
    found = entry_points(CHANNELS_GROUP, name)
    if len(found) != 1:
        known = ", ".join(sorted({ref.name for ref in entry_points(CHANNELS_GROUP)})) or "none"
        providers = " and ".join(str(ref.provider) for ref in found) or "no installed distribution"
        raise ConfigError(
            f"{address}: {providers} provides channels called {name!r}, and exactly one must; installed are {known}. "
            "For vLLM: pip install weight-transfer-vllm"
        )
    try:
        cls = pkgutil.resolve_name(found[0].value)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{address}: {found[0].provider} fails to import.", cause=str(error)) from error
    channel: ControlChannel = cls(url)
    try:
        yield channel
    finally:
        if hasattr(channel, "close"):
            channel.close()
