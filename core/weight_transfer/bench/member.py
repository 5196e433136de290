"""What trainer ranks and workers have in common: who takes part, memory, the limit, and what is set beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch
from torch import nn

from weight_transfer.bench.parts import Parts
from weight_transfer.bench.schemes import Scheme, SchemeSide
from weight_transfer.limit import settle
from weight_transfer.plugins.manager import load_backend
from weight_transfer.plugins.read_config import load_config

if TYPE_CHECKING:
    from weight_transfer.limit import Limit, Seconds
    from weight_transfer.testing.actors import Stage


@attrs.frozen(kw_only=True)
class Scene:
    """Who takes part.

    Attributes:
        parts: what lies where.
        config: of both sides, with a backend.
        trainers: devices of the trainer's ranks.
        workers: devices of the workers.
        ways: what each of several senders has in its configuration beside ``config``, by its name.
        schemes: what is set beside them, by name: ``"module:function"``, see `weight_transfer.bench.schemes`.
        store: file in which the trainer's ranks meet; whoever starts them makes it.
    """

    parts: Parts
    config: dict[str, Any]
    trainers: Sequence[str]
    workers: Sequence[str]
    ways: Mapping[str, Mapping[str, Any]] = attrs.field(factory=lambda: {"send": {}})
    schemes: Mapping[str, str] = attrs.field(factory=dict)
    store: str = ""

    @property
    def backend(self) -> str:
        """The backend's name."""
        return str(self.config["backend"])

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        return attrs.asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """Read what `to_dict` gave."""
        parts = fields["parts"]
        shapes = {name: tuple(shape) for name, shape in parts["shapes"].items()}
        return cls(**{**fields, "parts": Parts(**{**parts, "shapes": shapes})})


class Tree(nn.Module):
    """A module that has its children and parameters by dotted names, and no forward pass."""

    def plant(self, name: str, parameter: nn.Parameter) -> None:
        """Put a parameter where its name says."""
        first, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(first, parameter)
            return
        if first not in self._modules:
            self.add_module(first, Tree())
        child = self._modules[first]
        assert isinstance(child, Tree)
        child.plant(rest, parameter)


class Member:
    """A process that takes part: an actor.

    Its ``engine`` is that of a worker's last update; a trainer rank shows none.

    Args:
        scene: who takes part.
        number: of this member; the trainer's ranks come first.
        device: of its weights.
        sizes: see `LimitSide`.
    """

    def __init__(self, scene: Scene, number: int, device: str, sizes: Sequence[int]) -> None:
        self.scene, self.parts = scene, scene.parts
        self.member = number
        self.device = torch.device(device)
        self.sizes = sizes
        self.stack = ExitStack()
        self.limits: dict[str, Limit] = {}
        self.engine: Any = None

    def enter(self) -> None:
        """Take the device, and make the model: the first that is asked."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            beside = self.scene.trainers if self.member < len(self.scene.trainers) else self.scene.workers
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // len(beside)))  # the other side waits meanwhile

    @staticmethod
    def dtype(name: str) -> torch.dtype:
        """Return the dtype of a weight."""
        return torch.bfloat16

    def perform(self, stage: Stage) -> None:
        """Do what is asked, until nobody asks any more."""
        with self.stack:
            self.stack.callback(self.end_limits)
            stage.serve(self.commands())

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return what may be asked, by name: every public method."""
        names = [name for name in dir(self) if not name.startswith("_") and name not in ("perform", "commands")]
        return {name: method for name in names if callable(method := getattr(self, name))}

    def tidy(self) -> None:
        """Be there, and give the GPU back what torch keeps for later."""
        settle(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def before(self) -> None:
        """Take note of the memory that is held now, when all processes are tidy."""
        self._held = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device)
            self._free = torch.cuda.mem_get_info(self.device)[0]

    def memory(self) -> dict[str, int]:
        """Return bytes beyond those that were held `before`: the engine's own count, torch's peak, and the whole GPU's.

        The last one counts all processes on this GPU, with kernels that were loaded and what torch keeps for later.
        """
        found = {"engine": self.engine_memory()}
        if self.device.type == "cuda":
            found["torch_peak"] = torch.cuda.max_memory_allocated(self.device) - self._held
            found["gpu"] = self._free - torch.cuda.mem_get_info(self.device)[0]
        return found

    def engine_memory(self) -> int:
        """Return the bytes of staging memory that this member's engine holds."""
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """Return this member's tensors by the names of the weights that they are, or are parts of."""
        raise NotImplementedError

    def make_limit(self, scheme: str | None) -> Any:
        """Make this side of a scheme, or for None of the limit; return what the others need of it."""
        side = SchemeSide(
            config=load_config(self.scene.config),
            member=self.member,
            trainers=list(map(torch.device, self.scene.trainers)),
            device=self.device,
            sizes=self.sizes,
            alike=self.parts.all_alike,
            process=self,
        )
        if scheme is None:
            limit = load_backend(self.scene.backend).create_limit(side)
        else:
            limit = resolve_name(self.scene.schemes[scheme])(side)
        self.limits[scheme or ""] = limit
        return limit.offer() if side.is_trainer else None

    def join_limit(self, scheme: str | None, offers: Sequence[Any]) -> tuple[str, bool]:
        """Get ready, together with all members; return what is moved, in words, and whether it is the weights."""
        limit = self.limits[scheme or ""]
        limit.join(offers)
        return limit.what, isinstance(limit, Scheme)

    def run_limit(self, scheme: str | None) -> Seconds:
        """Move all bytes once, together with all members."""
        return self.limits[scheme or ""].run()

    def end_limits(self) -> None:
        """Give back what the limit and all schemes hold."""
        while self.limits:
            self.limits.popitem()[1].close()
