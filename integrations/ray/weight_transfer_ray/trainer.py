"""A trainer of several ranks, each an actor in a bundle of a placement group."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from weight_transfer.authoring import Deadline
from weight_transfer.errors import PeerLostError, TransferTimeoutError, WeightTransferError
from weight_transfer_ray.failures import foreign
from weight_transfer_ray.place import Place

_ECHOES = (PeerLostError, TransferTimeoutError)
_FETCHING = 30.0  # seconds to fetch a result that is there
_AFTER_FAILURE = 10.0  # seconds for the other ranks to say what they know, when one has failed


class TrainerGroup:
    """Actors of one class, a rank per bundle of a placement group. Use it as a context manager, or call `close`.

    Each rank is made as ``trainer(place, *arguments)``; `Place.sender` gives it its sender, and all ranks call
    ``send``: with ``group.each("send")``, say. With a backend that moves regions each gives its own shards.

    Args:
        trainer: the class of the actors.
        ranks: how many.
        arguments: for its constructor, behind the place.
        bundle: resources of one rank, as Ray names them.
        strategy: how Ray places the bundles: ``"PACK"`` (few nodes), ``"SPREAD"``, ``"STRICT_PACK"`` or
            ``"STRICT_SPREAD"`` (a node each).
        timeout: seconds until all ranks must have been made.

    Attributes:
        actors: the handles, by rank.
        nodes: the ids of the nodes of the ranks.

    Raises:
        TransferTimeoutError: the cluster has no room, or a constructor goes on.
        PeerLostError: a constructor has failed.
    """

    def __init__(
        self,
        trainer: type,
        ranks: int,
        *,
        arguments: tuple[Any, ...] = (),
        bundle: Mapping[str, float] | None = None,
        strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK",
        timeout: float = 120.0,
    ) -> None:
        needs = dict(bundle or {"CPU": 1.0})
        deadline = Deadline(timeout)
        self._group = placement_group([needs] * ranks, strategy=strategy)
        self.actors: list[Any] = []
        self.nodes: list[str] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            if not self._group.wait(deadline.remaining()):
                raise deadline.timeout(
                    f"waiting for {ranks} bundles of {needs}, {strategy}; `ray status` tells what is free"
                )
            address, port, group_port = self._meeting(deadline)
            own = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU")}
            cls = ray.remote(num_cpus=needs.get("CPU", 0), num_gpus=needs.get("GPU", 0), resources=own)(trainer)
            token = secrets.token_hex(16)
            for rank in range(ranks):
                place = Place(
                    rank=rank, world_size=ranks, address=address, port=port, group_port=group_port, token=token
                )
                actor = cls.options(scheduling_strategy=self._bundle(rank)).remote(place, *arguments)
                self.actors.append(actor)
            made = [actor.__ray_call__.remote(_node_id) for actor in self.actors]
            self.nodes = self._wait(made, "its constructor", deadline)
            undo.pop_all()

    def each(self, method: str, *arguments: Any, timeout: float = 300.0) -> list[Any]:
        """Call a method of all ranks side by side; return what they return, by rank.

        Args:
            method: its name.
            arguments: the same for all.
            timeout: seconds for all of them.

        Raises:
            PeerLostError: a rank has died; ``peer`` names it.
            TransferTimeoutError: a rank has not answered.
            WeightTransferError: what a rank has raised. Of several that which the others follow from. Any other
                exception of the method is raised as Ray raises it.
        """
        calls = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        return self._wait(calls, method, Deadline(timeout))

    def close(self) -> None:
        """End the actors, and give their bundles back."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
        remove_placement_group(self._group)

    def __enter__(self) -> TrainerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bundle(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)

    def _meeting(self, deadline: Deadline) -> tuple[str, int, int]:
        """Return the address of rank 0's node, and two ports that are free there."""
        ask = ray.remote(num_cpus=0, max_retries=0)(_free_ports)
        found = ask.options(scheduling_strategy=self._bundle(0)).remote()
        try:
            meeting: tuple[str, int, int] = ray.get(found, timeout=deadline.remaining())
        except Exception as error:
            raise foreign(error, _name(0), "its node", "where the ranks can meet") from error
        return meeting

    def _wait(self, calls: list[Any], what: str, deadline: Deadline) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[Exception, Exception]] = []
        pending = list(calls)
        while pending:
            ready, pending = ray.wait(pending, timeout=deadline.remaining())
            if not ready:
                break
            rank = calls.index(ready[0])
            try:
                results[rank] = ray.get(ready[0], timeout=_FETCHING)
            except Exception as error:  # noqa: BLE001  (raised below)
                if not failures:
                    deadline = Deadline(min(deadline.remaining(), _AFTER_FAILURE))
                failures.append((_known(error, rank, what), error))
        if failures:
            known, cause = next((each for each in failures if not isinstance(each[0], _ECHOES)), failures[0])
            raise known from (None if known is cause else cause)
        if pending:
            silent = ", ".join(_name(calls.index(call)) for call in pending)
            raise deadline.timeout(f"waiting for {silent} to end {what}", peer=silent)
        return [results[rank] for rank in range(len(calls))]


def _known(error: Exception, rank: int, what: str) -> Exception:
    """Return an error of this library, if it is one of Ray's own, or carries one."""
    is_the_methods = isinstance(error, RayTaskError) and not isinstance(error.cause, WeightTransferError)
    return error if is_the_methods else foreign(error, _name(rank), "its node", what)


def _name(rank: int) -> str:
    return f"trainer rank {rank}"


def _node_id(_actor: object) -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node


def _free_ports() -> tuple[str, int, int]:
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as first, socket.socket(family) as second:
        for sock in (first, second):
            sock.bind((address, 0))
        return address, first.getsockname()[1], second.getsockname()[1]
