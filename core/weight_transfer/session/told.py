"""How a receiver stands, for whoever asks."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.session.sampled import Sampled

if TYPE_CHECKING:
    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.session.lifecycle import ReceiverState
    from weight_transfer.session.served_models import ServedModel
    from weight_transfer.values.events import Version


class Told(Sampled):
    """A receiver as those see it who watch it."""

    parallel_config: ParallelConfig

    def __init__(self, config: WeightTransferConfig) -> None:
        super().__init__(config)
        self._targets: Mapping[str, ServedModel] = {}
        self._id = secrets.token_hex(8)

    @property
    def state(self) -> ReceiverState:
        """Where this receiver stands now."""
        self._give_up_if_abandoned()
        return self._lifecycle.state

    @property
    def version(self) -> Version | None:
        """The model's version that is served; None before the first, during an update and after a failure."""
        self._give_up_if_abandoned()
        return self._served.current

    @property
    def versions(self) -> dict[str, Version | None]:
        """The version of each target, by its name; None as long as its weights are no whole version."""
        with self._changed:
            return {target: self._served.versions.get(target) for target in self._targets}

    @property
    def failed(self) -> bool:
        """Whether a failed update has spoiled the weights: then nothing is served until a good one."""
        self._give_up_if_abandoned()
        return bool(self._served.torn)

    def status(self) -> dict[str, Any]:
        """Return how this receiver stands, JSON-safe.

        | key | |
        |---|---|
        | ``state`` | see `ReceiverState` |
        | ``version`` | that is served; None as long as none is |
        | ``versions`` | by target, of those whose weights are whole |
        | ``published`` | when the model's version was, in seconds since 1970; None if none is served |
        | ``committed`` | by target, the last that was published, whether or not its weights are still whole |
        | ``updates`` | by target, the id of the update that brought the weights |
        | ``digests`` | by target, the digest of its receipt, if bytes were compared |
        | ``prepared`` | ``target``, ``version`` and ``update`` of what has arrived and is not published yet, or None |
        | ``lease`` | ``number`` and ``holder`` of the newest trainer; None if none has come with a lease |
        | ``backend`` | its name |
        | ``device`` | torch device that its weights lie on |
        | ``workers`` | 1 |
        | ``progress`` | ``done`` and ``total`` bytes of the update under way, or None |
        | ``error`` | of the time since the last good update, or None |
        | ``id`` | this receiver's own, by which a trainer knows a worker that it was given under two addresses |
        """
        version = self.version
        with self._changed:
            update, lease = self._update, self._lifecycle.lease
            prepared = update if update is not None and update.complete else None
            return {
                "state": str(self._lifecycle.state),
                "version": version,
                "versions": self.versions,
                "published": None if version is None else self._served.published,
                "committed": dict(self._served.committed),
                "updates": dict(self._served.updates),
                "digests": dict(self._served.digests),
                "prepared": None
                if prepared is None
                else {"target": prepared.target, "version": prepared.version, "update": prepared.id},
                "lease": None if lease is None else attrs.asdict(lease),
                "backend": self.config.backend,
                "device": self.parallel_config.device,
                "workers": 1,
                "progress": None if update is None else update.progress,
                "error": self._last_error,
                "id": self._id,
            }
