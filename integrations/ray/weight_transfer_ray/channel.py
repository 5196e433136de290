"""The trainer's half: a control channel to actors that are `RayWorker`s."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import ray

from weight_transfer.authoring import Deadline
from weight_transfer.control import joint_init, joint_needs, joint_report, joint_status
from weight_transfer.errors import ConfigError, PeerLostError, TransferError, WeightTransferError, error_from_dict
from weight_transfer_ray.failures import foreign

logger = logging.getLogger(__name__)

_MARGIN = 2.0  # seconds that an answer may take beyond the timeout that the call itself carries
_STATUS = 10.0  # seconds after which an actor counts as not up yet
_GIVING_UP = 10.0  # seconds for the others, when one actor of a replica has failed
_UNKNOWN = "a node that it has not told"


class RayChannel:
    """One actor as a worker of a `WeightSender`; or several, the ranks of a replica.

    The calls are Ray's, so whoever may call the actor may send it weights: no token is needed, and what is secret
    travels with the calls. An actor that Ray has restarted is joined again by the next ``send``. The channel may be
    handed to another actor.

    Args:
        actors: handles of actors whose class is a `RayWorker`, in the order of their ranks.
        name: how messages call them; default is the handles' own text.
        timeout: seconds that a call without a timeout of its own may take.

    Attributes:
        address: the name.
        workers: how many actors there are.

    Raises:
        ConfigError: there is no actor, or one is no handle of a `RayWorker`.
    """

    def __init__(self, *actors: Any, name: str | None = None, timeout: float = 300.0) -> None:
        if not actors:
            raise ConfigError("RayChannel needs at least one handle of an actor.")
        for actor in actors:
            if not hasattr(actor, "weight_transfer_interrupt"):
                raise ConfigError(
                    f"{actor!r} is no handle of a RayWorker; have its class inherit from RayWorker, and decorate it "
                    "with ray_worker()."
                )
        self._actors = actors
        self._names = [f"{name}[{rank}]" if name and actors[1:] else name or repr(a) for rank, a in enumerate(actors)]
        self._nodes = [_UNKNOWN] * len(actors)
        self._timeout = timeout
        self.address = name or ", ".join(self._names)
        self.workers = len(actors)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        """See `ControlChannel`."""
        return joint_init(self._call("init_weight_transfer_engine", {"init_info": dict(init_info)}))

    def start_weight_update(self, session: str | None = None) -> None:
        """See `ControlChannel`."""
        self._call("start_weight_update", {"session": session})

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """See `ControlChannel`; when one actor fails, the others give up."""
        return joint_report(self._call("update_weights", {"update_info": dict(update_info)}))

    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what each actor keeps, in the order of their ranks."""
        return joint_needs(self._call("weight_needs", {"request": dict(request)}))

    def finish_weight_update(
        self, weight_version: int | str | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        """See `ControlChannel`."""
        self._call("finish_weight_update", {"weight_version": weight_version, "session": session, "update": update})

    def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
        """Give up a running update; reaches an actor that is busy with it, or with methods of its own."""
        self._answers(self._submit("abort_weight_update", {"reason": reason, "session": session}), self._timeout)

    def status(self) -> dict[str, Any]:
        """See `ControlChannel`.

        Raises:
            PeerLostError: an actor is not up yet, is being restarted, or has died for good (``permanent``).
        """
        try:
            return joint_status(self._answers(self._submit("status", {}), min(_STATUS, self._timeout)))
        except TimeoutError as error:
            raise PeerLostError(
                f"An actor has not answered within {_STATUS:g} s: it is not placed yet, its constructor still runs, or "
                "its node is gone; `ray list actors` tells.",
                peer=self.address,
                cause=str(error),
            ) from error

    def _call(self, method: str, arguments: dict[str, Any]) -> list[Any]:
        """Call all actors side by side; after the first failure the others give up what is under way."""
        seconds = next((own["timeout"] for own in arguments.values() if _has_timeout(own)), self._timeout)
        calls = self._submit(method, arguments)
        try:
            return self._answers(calls, seconds + _MARGIN)
        except WeightTransferError as error:
            if method == "update_weights" and self.workers > 1:
                session = arguments["update_info"].get("session")
                self._stop(f"another worker of this replica failed: {error}", session)
            raise

    def _submit(self, method: str, arguments: dict[str, Any]) -> dict[Any, int]:
        """Call all actors; return their ranks by the calls' references."""
        calls: dict[Any, int] = {}
        for rank, actor in enumerate(self._actors):
            urgent = method in ("status", "abort_weight_update")
            remote = actor.weight_transfer_interrupt if urgent else actor.weight_transfer_call
            try:
                calls[remote.remote(method, arguments)] = rank
            except Exception as error:
                raise foreign(error, self._names[rank], self._nodes[rank], method) from error
        return calls

    def _answers(self, calls: Mapping[Any, int], seconds: float) -> list[Any]:
        """Wait for all; raise the first failure at once."""
        deadline = Deadline(seconds)
        results: dict[int, Any] = {}
        pending = list(calls)
        while pending:
            ready, pending = ray.wait(pending, timeout=deadline.remaining())
            if not ready:
                silent = ", ".join(f"{self._names[calls[call]]} on {self._nodes[calls[call]]}" for call in pending)
                raise deadline.timeout(f"waiting for {silent}", peer=silent)
            results[calls[ready[0]]] = self._result(calls[ready[0]], ready[0])
        return [results[rank] for rank in range(self.workers)]

    def _result(self, rank: int, call: Any) -> Any:
        name = self._names[rank]
        try:
            answer = ray.get(call, timeout=_MARGIN)
        except Exception as error:
            raise foreign(error, name, self._nodes[rank], "a control call") from error
        self._nodes[rank] = answer["node"]
        if "error" in answer:
            own = error_from_dict(answer["error"])
            if self.workers > 1 and isinstance(own, TransferError):
                own.peer = own.peer or name
            raise own
        return answer["result"]

    def _stop(self, reason: str, session: str | None) -> None:
        try:
            calls = self._submit("abort_weight_update", {"reason": reason, "session": session})
            ray.wait(list(calls), num_returns=len(calls), timeout=_GIVING_UP)
        except WeightTransferError as error:  # the failure itself is what is reported
            logger.warning("%s did not hear that another actor failed: %s", self.address, error)


def _has_timeout(own: object) -> bool:
    return isinstance(own, dict) and isinstance(own.get("timeout"), (int, float))
