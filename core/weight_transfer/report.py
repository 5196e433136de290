"""What one update cost."""

from __future__ import annotations

import attrs

from weight_transfer.events import Version


@attrs.frozen(kw_only=True)
class TransferReport:
    """The result of :meth:`WeightSender.send <weight_transfer.WeightSender.send>`.

    Attributes:
        backend: the backend's name.
        version: the version that the workers now serve.
        nbytes: bytes of one full copy of the weights.
        params: number of parameters.
        workers: addresses of the workers that serve the version.
        lost: ``(address, error)`` of workers that failed, if ``on_worker_failure = "continue"``.
        seconds: wall time by phase (``init``, ``start``, ``update``, ``finish``).
        extra_memory: bytes of staging memory that the trainer's engine holds.
    """

    backend: str
    version: Version
    nbytes: int
    params: int
    workers: tuple[str, ...]
    lost: tuple[tuple[str, str], ...] = ()
    seconds: dict[str, float]
    extra_memory: int

    @property
    def total_seconds(self) -> float:
        """Wall time of all phases."""
        return sum(self.seconds.values())

    @property
    def gbps(self) -> float:
        """GB/s (10**9 bytes) that each worker received in the update phase."""
        return self.nbytes / self.seconds["update"] / 1e9 if self.seconds.get("update") else 0.0

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds * 1e3:.1f} ms" for phase, seconds in self.seconds.items())
        lost = f", lost {', '.join(peer for peer, _ in self.lost)}" if self.lost else ""
        return (
            f"version {self.version}: {self.nbytes / 1e9:.3f} GB to {len(self.workers)} workers over {self.backend} "
            f"at {self.gbps:.2f} GB/s ({phases}){lost}"
        )
