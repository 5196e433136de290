"""What the groups of tests share: the backend's description, and a cast of actors per test."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest
import torch

from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
from weight_transfer.plugins.backend import Capability
from weight_transfer.plugins.manager import LoadedBackend, load_backend
from weight_transfer.plugins.read_config import load_config
from weight_transfer.testing.actors import PATIENCE, Actor
from weight_transfer.testing.models import Weight, weight

if TYPE_CHECKING:
    from weight_transfer.errors import WeightTransferError


T = TypeVar("T")
_MOMENT = 1.0  # seconds; who pulls pays them in full

PLAIN: list[Weight] = [
    weight("embed", "float32", 300, 256),
    *(weight(f"layer{i}_weight", "bfloat16", 128, 128) for i in range(6)),
    *(weight(f"layer{i}_bias", "float32", 128) for i in range(6)),
]
"""Half a megabyte: several buckets, a weight that spans some of them, and several weights of one shape."""


def needs(*capabilities: Capability) -> Callable[[T], T]:
    """Mark a test that is skipped unless the backend's descriptor declares ``capabilities``."""

    def mark(test: T) -> T:
        test.needed_capabilities = capabilities  # type: ignore[attr-defined]  # functions take attributes
        return test

    return mark


class Member:
    """A worker or a trainer on the stage: an actor, and the name of its session there."""

    def __init__(self, actor: Actor, name: str, url: str = "") -> None:
        self.actor = actor
        self.url = url
        self._name = name
        self.kill = actor.kill

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command and return its reply."""
        return self.actor.ask(command, name=self._name, **arguments)

    def tell(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its reply."""
        self.actor.tell(command, name=self._name, **arguments)

    def reply(self, within: float = PATIENCE) -> Any:
        """Wait for a reply."""
        return self.actor.reply(within)

    def error(self, within: float = PATIENCE) -> WeightTransferError:
        """Wait for a reply, which must be an error."""
        return self.actor.error(within)

    def await_update(self) -> None:
        """Wait a moment until a worker is told of the update; a backend may prepare it before."""
        self.ask("await_update", seconds=_MOMENT)

    def stopped(self) -> AbstractContextManager[None]:
        """Freeze its process inside a ``with`` block."""
        return self.actor.stopped()

    @property
    def port(self) -> int:
        """The TCP port of a worker's control channel."""
        return int(self.url.rpartition(":")[2])


class Cast:
    """Starts the actors of one test and ends them with it.

    Args:
        config: of every member.
        device: the torch device of the member with a rank; the trainer has rank 0.
        in_process: whether actors are threads.
    """

    def __init__(self, config: dict[str, Any], device: Callable[[int], str], in_process: bool) -> None:
        self._config = config
        self._device = device
        self.in_process = in_process
        self._end = ExitStack()
        self._actors: list[Actor] = []
        self._names = 0
        if in_process:  # OpenMP would give every thread a team of its own
            self._end.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)

    def worker(
        self,
        weights: Sequence[Weight] = PLAIN,
        *,
        rank: int = 1,
        beside: Member | None = None,
        config: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> Member:
        """Start a worker, in a process of its own or ``beside`` another one; ``spec`` is that of `testing.worker`."""
        actor = beside.actor if beside else self._start("worker")
        name = self._name()
        spec = {"seed": 100 + rank, "device": self._device(rank), "config": self._config | dict(config or {})} | spec
        url = actor.ask("open", name=name, weights=weights, **spec)
        return Member(actor, name, url)

    def workers(self, count: int, weights: Sequence[Weight] = PLAIN, **spec: Any) -> list[Member]:
        """Start several workers."""
        return [self.worker(weights, rank=rank, **spec) for rank in range(1, count + 1)]

    def trainer(
        self,
        workers: Sequence[Member],
        weights: Sequence[Weight] = PLAIN,
        *,
        beside: Member | None = None,
        config: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> Member:
        """Start a trainer that sends to ``workers``; ``spec`` is that of `testing.trainer`."""
        actor = beside.actor if beside else self._start("trainer")
        name = self._name()
        spec = {"device": self._device(0), "config": self._config | dict(config or {})} | spec
        actor.ask("open", name=name, workers=[worker.url for worker in workers], weights=weights, **spec)
        return Member(actor, name)

    def inviter(self) -> Member:
        """Start a trainer's engine that nobody drives, which invites one worker."""
        name = self._name()
        actor = self._start("inviter")
        actor.ask("open", name=name, config=self._config, device=self._device(0))
        return Member(actor, name)

    def end(self) -> None:
        """End all actors."""
        for actor in self._actors:
            actor.hang_up()
        for actor in self._actors:
            actor.stop()
        self._end.close()

    def _start(self, role: str) -> Actor:
        threads = None if self.in_process else 1
        actor = Actor(f"weight_transfer.testing.{role}", in_process=self.in_process, threads=threads)
        self._actors.append(actor)
        return actor.ready()

    def _name(self) -> str:
        self._names += 1
        return f"session {self._names}"


class Kit:
    """The base of all groups; see `BackendConformance` for the attributes."""

    backend: ClassVar[str]
    worker_counts: ClassVar[tuple[int, ...]] = (1, 3)
    deadline: ClassVar[float] = 2.0
    grace: ClassVar[float] = 15.0

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
        return f"cuda:{rank % devices}"

    @pytest.fixture
    def cast(self) -> Iterator[Cast]:
        """Actors that end with the test; skips if the backend cannot work on this machine."""
        self.require_machine()
        result = Cast(self.settings(), self.device, in_process=Capability.CROSS_PROCESS not in self._capabilities())
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
        """Skip what the descriptor does not declare."""
        for capability in getattr(request.function, "needed_capabilities", ()):
            if capability not in self._capabilities():
                pytest.skip(f"{self.backend} does not declare Capability.{capability.name}")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests that ask for ``count`` with each number of workers."""
        if "count" in metafunc.fixturenames:
            metafunc.parametrize("count", self.worker_counts, ids=[f"{count} workers" for count in self.worker_counts])

    def loaded(self) -> LoadedBackend:
        """Load the backend by its entry point."""
        return load_backend(self.backend)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Return the configuration of a test as a dict."""
        common = {"backend": self.backend, "timeout": 30, "init_timeout": 20, "bucket_bytes": 65536, "buckets": 2}
        table = {self.backend: dict(self.options())} if self.options() else {}
        return {**common, **table, **self.config(), **changes}

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

    def _capabilities(self) -> frozenset[Capability]:
        return self.loaded().backend.capabilities

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name in {name for part in cls.__mro__ if _is_ours(part) for name in vars(part) if name.startswith("test_")}:
            owner = next(part for part in cls.__mro__ if name in vars(part))
            if not _is_ours(owner):
                _require_marker(owner, name)


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
