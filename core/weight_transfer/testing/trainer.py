"""The actor that plays trainers: each sender has a model of its own, which changes as soon as it was sent."""

from __future__ import annotations

import builtins
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

from weight_transfer.control.http_client import HttpChannel
from weight_transfer.model.source import ModuleSource, WeightSource
from weight_transfer.session.sender import WeightSender
from weight_transfer.testing.forked import Family
from weight_transfer.testing.models import Model, PassingSource, Weight, cast, hashes, inference_tensors, randomise
from weight_transfer.testing.outages import Outages
from weight_transfer.testing.resources import MemoryMark, Watch, held
from weight_transfer.testing.unpickling import watched_unpickling

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage
    from weight_transfer.values.events import Version

_AFTERWARDS = 999  # the seed of the bits that the model gets when it was sent


class RecordingChannel(HttpChannel):
    """Keeps what was sent to the worker, and calls ``before`` with the name of each call of an update."""

    def __init__(self, address: str, timeout: float, before: Callable[[str], None]) -> None:
        super().__init__(address, timeout=timeout)
        self._before = before
        self.init_infos: list[dict[str, Any]] = []
        self.update_infos: list[dict[str, Any]] = []
        self.questions: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        self.init_infos.append(init_info)
        self._before("init")
        return super().init_weight_transfer_engine(init_info)

    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any] | None:
        self.questions.append(request)
        return super().weight_needs(request)

    def start_weight_update(self, session: str | None = None) -> None:
        self._before("start")
        super().start_weight_update(session)

    def finish_weight_update(
        self, weight_version: Version | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        self._before("finish")
        super().finish_weight_update(weight_version, session, update)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        self._before("update")
        self.update_infos.append(update_info)
        return super().update_weights(update_info)

    def begin_weight_update(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        self._before("start")
        self._before("update")
        self.update_infos.append(update_info)
        return super().begin_weight_update(update_info)


class Trainer:
    """One sender with its model.

    Args:
        config: of the sender.
        workers: URLs.
        weights: the model's.
        device: the model's.
        passing: send copies that nobody keeps instead of the model's own tensors; only these can be armed.
        memory: what becomes of such a copy; see `PassingSource`.
        served: what the workers have, if the config casts; default is ``weights``.
        draft: the weights of a second model, for the workers' target of that name.
    """

    def __init__(
        self,
        stage: Stage,
        config: dict[str, Any],
        workers: Sequence[str],
        weights: Sequence[Weight],
        *,
        device: str = "cpu",
        passing: bool = False,
        memory: Literal["kept", "reused", "freed"] = "kept",
        served: Sequence[Weight] | None = None,
        draft: Sequence[Weight] = (),
    ) -> None:
        self._served = served
        self.model = Model(weights, 0, device)
        self.draft = Model(draft, 0, device) if draft else None
        self.family = Family(self.model)
        self._stage = stage
        self._block_at: int | None = None
        self._fail_at: int | None = None
        self._error = "RuntimeError"
        self._sizes: dict[str, int] = {}
        self._source: WeightSource = (
            PassingSource(self.model, self._before_each, memory) if passing else ModuleSource(self.model)
        )
        self._hold_at: str | None = None
        self._holding = threading.Lock()
        timeout = float(config.get("timeout", 300))
        self.channels = [RecordingChannel(url, timeout, self._before_call) for url in workers]
        self.sender = WeightSender(config, self.channels)

    def send(self, seed: int | None, version: int, inference: bool = False, scarce: bool = False) -> dict[str, Any]:
        """Randomise, send, and randomise again at once: the source may change as soon as ``send`` returns.

        Args:
            seed: of the bits; None to send the weights as they are.
            version: of the weights; it may go back, as the seed does.
            inference: call ``send`` in torch's inference mode.
            scarce: have no more memory meanwhile; see `Outages.limit_memory`.
        """
        if seed is not None:
            randomise(self.model, seed)
        before = hashes(self.model)
        meant = before if self._served is None else hashes(cast(self.model, self._served))
        with torch.inference_mode(inference), Outages().short_of_memory() if scarce else nullcontext():
            report = self.sender.send(self._source, version=version, allow_rollback=True)
        left = hashes(self.model)
        randomise(self.model, _AFTERWARDS)
        return {
            "hashes": meant,
            "changed": [name for name in before if left[name] != before[name]],
            "workers": report.workers,
            "lost": report.lost,
            "extra_memory": report.extra_memory,
        }

    def send_part(self, seed: int, version: int, only: list[str]) -> dict[str, str]:
        """Randomise everything, send some of it, and return the hashes of all as they were then."""
        randomise(self.model, seed)
        meant = hashes(self.model)
        self.sender.send(self._source, version=version, only=only, allow_rollback=True)
        randomise(self.model, _AFTERWARDS)
        return meant

    def send_draft(self, seed: int, version: int) -> dict[str, str]:
        """Send the second model, and return its hashes."""
        assert self.draft is not None
        randomise(self.draft, seed)
        meant = hashes(self.draft)
        self.sender.send(self.draft, version=version, target="draft", allow_rollback=True)
        randomise(self.draft, _AFTERWARDS)
        return meant

    def arm(self, block_at: int | None = None, fail_at: int | None = None, error: str = "RuntimeError") -> None:
        """Choose the weight at which the source says so and waits for ``release``, or fails; None for none.

        Args:
            block_at: index of the weight.
            fail_at: index of the weight.
            error: name of the built-in exception.
        """
        assert isinstance(self._source, PassingSource)
        self._block_at, self._fail_at, self._error = block_at, fail_at, error

    def hold(self, at: str | None = None) -> None:
        """Choose the call (``init``, ``start``, ``update`` or ``finish``) before which it says so and waits.

        One call to one worker waits, for ``release``; the calls to other workers go on.
        """
        self._hold_at = at

    def _before_call(self, call: str) -> None:
        with self._holding:  # workers are called by threads
            held = call == self._hold_at
            if held:
                self._hold_at = None
        if held:
            self._stage.say("held")
            self._stage.await_command("release")

    def _before_each(self, index: int) -> None:
        if index == self._block_at:
            self._stage.say("blocked")
            self._stage.await_command("release")
        if index == self._fail_at:
            raise vars(builtins)[self._error]("the source was told to fail")

    def infos(self) -> list[dict[str, Any]]:
        """Return, for each worker, all init and update infos that it was sent, and the size of the latter in bytes.

        Also what it was asked: the manifest travels with the question, if there was one, and then not with the update.
        """
        return [
            {
                "init": channel.init_infos,
                "update": channel.update_infos,
                "asked": channel.questions,
                "nbytes": [len(json.dumps(info)) for info in channel.update_infos],
            }
            for channel in self.channels
        ]

    def share(self) -> None:
        """Move the weights into memory that children share, as Hogwild does."""
        self.model.share_memory()

    def resize(self, away: bool) -> None:
        """Give the memory of all weights away, as trainers do that offload them, or take it back, empty."""
        for name, tensor in self.model.named_parameters():
            self._sizes.setdefault(name, tensor.untyped_storage().nbytes())
            tensor.untyped_storage().resize_(0 if away else self._sizes[name])
            if tensor.untyped_storage().nbytes() != (0 if away else self._sizes[name]):
                raise RuntimeError(f"the storage of {name} was not resized")

    def remains(self) -> list[str]:
        """Close, let go of everything but the engine, and return the weights that are still held."""
        engine, watch = self.sender._fleet.engines.own, Watch(self.model)  # noqa: SLF001  (what it holds is the question)
        self.close()
        vars(self).clear()
        return watch.remaining(engine)

    def close(self) -> None:
        """Close the sender and its channels, and end the children."""
        self.family.end()
        self.sender.close()
        for channel in self.channels:
            channel.close()


def main(stage: Stage, threads: int | None = None) -> None:
    """Serve commands; each names the sender that it is about, if there are several in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    trainers: dict[str, Trainer] = {}
    marks: list[MemoryMark] = []

    def open_(name: str, **spec: Any) -> None:
        trainers[name] = Trainer(stage, **spec)

    with watched_unpickling() as unpickled:
        stage.say("ready")
        stage.serve(
            {
                "open": open_,
                "close": lambda name: trainers.pop(name).close(),
                "close_sender": lambda name: trainers[name].sender.close(),
                "connect": lambda name: trainers[name].sender.connect(),
                "send": lambda name, **what: trainers[name].send(**what),
                "send_part": lambda name, **what: trainers[name].send_part(**what),
                "send_draft": lambda name, **what: trainers[name].send_draft(**what),
                "replace": lambda name, weight: trainers[name].model.replace(weight),
                "share": lambda name: trainers[name].share(),
                "hashes": lambda name: hashes(trainers[name].model),
                "inference_tensors": lambda name: inference_tensors(trainers[name].model),
                "resize": lambda name, away: trainers[name].resize(away),
                "fork": lambda name, child: trainers[name].family.fork(child),
                "child": lambda name, **order: trainers[name].family.ask(**order),
                "remains": lambda name: trainers.pop(name).remains(),
                "arm": lambda name, **at: trainers[name].arm(**at),
                "hold": lambda name, at: trainers[name].hold(at),
                "infos": lambda name: trainers[name].infos(),
                "held": lambda name: held(),
                "mark": lambda name: marks.append(MemoryMark()),
                "growth": lambda name: marks[-1].growth(),
                "unpickled": lambda name: list(unpickled),
                **Outages().commands(),
            }
        )
        for trainer in trainers.values():
            trainer.close()
