"""The shortest way to a sender."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ConfigError
from weight_transfer.plugins.read_config import load_config
from weight_transfer.session.sender import WeightSender

if TYPE_CHECKING:
    from weight_transfer.control import ControlChannel


def connect(*workers: str | ControlChannel, config: Any = None, **settings: Any) -> WeightSender:
    """Join workers, and return a sender to them; close it, or use it as a context manager.

        with wt.connect("http://127.0.0.1:8001", backend="ipc") as sender:
            sender.send(model)

    Args:
        workers: as those of `WeightSender`; waits until all of them are up.
        config: anything that `load_config` takes.
        settings: keys of the configuration, such as ``backend``.

    Raises:
        ConfigError: a key is wrong, there is no worker, or several came as one list.
        PeerLostError: a worker did not answer within ``init_timeout`` seconds.
        HandshakeError: a worker has another backend, or refuses the token.
    """
    for worker in workers:
        if isinstance(worker, (list, tuple)):
            raise ConfigError(
                f"connect takes each worker by itself; unpack the {type(worker).__name__}: connect(*workers)."
            )
    sender = WeightSender(load_config(config, **settings), workers)
    try:
        sender.connect()
    except BaseException:
        sender.close()
        raise
    return sender
