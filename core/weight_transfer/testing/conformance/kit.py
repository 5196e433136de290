"""What the groups of tests share: the backend's description, and what a test may use."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest
import torch

from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
from weight_transfer.errors import WeightTransferError
from weight_transfer.plugins.backend import Capability
from weight_transfer.plugins.manager import LoadedBackend, load_backend
from weight_transfer.plugins.read_config import load_config
from weight_transfer.testing.conformance.cast import Cast, cast_size
from weight_transfer.testing.gpus import OWN, OwnGpus, visible_gpus

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Member


T = TypeVar("T")


def needs(*capabilities: Capability) -> Callable[[T], T]:
    """Mark a test that is skipped unless the backend's descriptor declares ``capabilities``."""

    def mark(test: T) -> T:
        test.needed_capabilities = capabilities  # type: ignore[attr-defined]  # functions take attributes
        return test

    return mark


class Kit:
    """The base of all groups; see `BackendConformance` for the attributes."""

    backend: ClassVar[str]
    worker_counts: ClassVar[tuple[int, ...]] = (1, 3)
    deadline: ClassVar[float] = 2.0
    grace: ClassVar[float] = 15.0

    _own_gpus: tuple[int, ...] = ()
    _members = 2

    def options(self) -> Mapping[str, object]:
        """Return the backend's own table of the configuration, JSON-safe."""
        return {}

    def config(self) -> Mapping[str, object]:
        """Return further keys of the configuration, such as ``bucket_bytes``, JSON-safe."""
        return {}

    def device(self, rank: int) -> str:
        """Return the torch device of the member with this rank; the trainer has rank 0, workers count from 1."""
        if Capability.CUDA not in self._capabilities() or not torch.cuda.is_available():
            return "cpu"
        devices, one_each = torch.cuda.device_count(), self.loaded().backend.one_device_each
        if one_each and devices < 2 and Capability.CPU in self._capabilities():
            return "cpu"
        if one_each and rank >= devices:
            pytest.skip(f"{self.backend} needs a device for each process, and this machine has {devices}")
        others = [device for device in range(devices) if device not in self._own_gpus]
        return f"cuda:{[*self._own_gpus, *others][rank % devices]}"

    def device_of(self, rank: int) -> str:
        """Return the torch device of one of the processes that the test has; see `plays`."""
        assert rank < self._members, f"the test has {self._members} processes; let `plays` say how many it needs"
        return self.device(rank)

    @pytest.fixture
    def cast(self) -> Iterator[Cast]:
        """Actors that end with the test; skips if the backend cannot work on this machine."""
        self.require_machine()
        result = Cast(self.settings(), self.device_of, in_process=Capability.CROSS_PROCESS not in self._capabilities())
        try:
            yield result
        finally:
            result.end()

    def require_machine(self) -> None:
        """Skip if the backend cannot work on this machine."""
        answer = self.loaded().probe()
        if not answer.available:
            pytest.skip(f"{self.backend} does not work here: {answer.reason}")
        if Capability.CPU not in self._capabilities() and self.device(0) == "cpu":
            pytest.skip(f"{self.backend} moves no CPU tensors, and there is no CUDA device")

    @pytest.fixture(autouse=True)
    def _declared(self, request: pytest.FixtureRequest) -> None:
        """Skip what the descriptor does not declare; know what the test may use."""
        self._own_gpus = request.node.stash.get(OWN, ())
        self._members = sum(cast_size(request.node))
        for capability in getattr(request.function, "needed_capabilities", ()):
            if capability not in self._capabilities():
                pytest.skip(f"{self.backend} does not declare Capability.{capability.name}")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests that ask for ``count`` with each number of workers, or ``most``; have GPUs shared out."""
        for name, counts in (("count", self.worker_counts), ("most", [max(self.worker_counts)])):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, counts, ids=[f"{count} workers" for count in counts])
        if not metafunc.config.pluginmanager.has_plugin(OwnGpus.__name__):
            names = visible_gpus(torch.cuda.device_count())
            metafunc.config.pluginmanager.register(OwnGpus(_gpus_wanted, names), OwnGpus.__name__)

    def loaded(self) -> LoadedBackend:
        """Load the backend by its entry point."""
        return load_backend(self.backend)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Return the configuration of a test as a dict."""
        common = {"backend": self.backend, "timeout": 30, "init_timeout": 20, "bucket_bytes": 65536, "buckets": 2}
        table = {self.backend: dict(self.options())} if self.options() else {}
        return {**common, **table, **self.config(), **changes}

    def hasty(self) -> dict[str, Any]:
        """Return the keys by which an update is meant to miss its deadline.

        On GPUs it is longer, for good updates come before: the first one loads kernels.
        """
        return {"timeout": self.deadline * (1 if self.device(0) == "cpu" else 2)}

    def engines(self) -> tuple[Any, Any]:
        """Create a worker engine and a trainer engine in this process."""
        config: WeightTransferConfig = load_config(self.settings())
        worker = self.loaded().create_worker_engine(config, ParallelConfig(device=self.device(1)))
        return worker, self.loaded().create_trainer_engine(config, ParallelConfig(device=self.device(0)))

    def settled(self, worker: Member) -> dict[str, Any]:
        """Wait until no update is open any more, which the deadline of the update bounds; return the status."""
        since = time.monotonic()
        while (status := worker.ask("status"))["state"] == "updating":
            assert time.monotonic() - since < self.deadline + self.grace, "the worker's update has not ended"
        result: dict[str, Any] = status
        return result

    @classmethod
    def gpus_of_its_own(cls, item: pytest.Item) -> int:
        """Return how many GPUs a test must not share: those between which its processes use NCCL.

        A trainer's ranks gather by it, and backends do that need a device for each process.
        """
        devices = torch.cuda.device_count()
        if devices < 2 or not {"cast", "company"}.intersection(getattr(item, "fixturenames", ())):
            return 0
        try:
            backend = load_backend(cls.backend).backend
        except WeightTransferError:  # the test says so itself
            return 0
        ranks, workers = cast_size(item)
        wanted = ranks + workers if backend.one_device_each else ranks
        return wanted if Capability.CUDA in backend.capabilities and 1 < wanted <= devices else 0

    def _capabilities(self) -> frozenset[Capability]:
        return self.loaded().backend.capabilities

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name in {name for part in cls.__mro__ if _is_ours(part) for name in vars(part) if name.startswith("test_")}:
            owner = next(part for part in cls.__mro__ if name in vars(part))
            if not _is_ours(owner):
                _require_marker(owner, name)


def _gpus_wanted(item: pytest.Item) -> int:
    kit = getattr(item, "cls", None)
    return kit.gpus_of_its_own(item) if isinstance(kit, type) and issubclass(kit, Kit) else 0


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(f"{__package__}.") or cls.__module__ == __package__


def _require_marker(cls: type, name: str) -> None:
    """Refuse a class that overrides a test of the kit without saying so in the report."""
    marks = getattr(vars(cls)[name], "pytestmark", ())
    if not any(mark.name in ("skip", "xfail") and mark.kwargs.get("reason") for mark in marks):
        raise TypeError(
            f"{cls.__name__} overrides {name} silently; mark it with pytest.mark.xfail(reason=...) or "
            "pytest.mark.skip(reason=...), so that reports show what is left out."
        )


def assert_same(sent: Mapping[str, str], *received: Mapping[str, str]) -> None:
    """Fail, and name the weights, unless what was received has the bytes that were sent."""
    for index, got in enumerate(received, 1):
        wrong = [name for name in sent if got.get(name) != sent[name]]
        assert not wrong, f"worker {index} has other bytes in {len(wrong)} of {len(sent)} weights: {wrong[:5]}"


def within(seconds: float, call: Callable[[], T]) -> T:
    """Run ``call`` on a thread, and fail if it takes longer; what it raises is raised."""
    outcome: list[Callable[[], T]] = []

    def run() -> None:
        try:
            result = call()
            outcome.append(lambda: result)
        except BaseException as error:  # noqa: BLE001  (raised by the caller)
            outcome.append(functools.partial(_raise, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"the call did not return within {seconds:g} s: it hangs"
    return outcome[0]()


def _raise(error: BaseException) -> Any:
    raise error
