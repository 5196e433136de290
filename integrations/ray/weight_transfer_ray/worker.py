"""The worker's half: an actor that receives weights. Its control calls run beside its own methods."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from weight_transfer import WeightReceiver
from weight_transfer.errors import LifecycleError, WeightTransferError, error_to_dict
from weight_transfer_ray.names import INTERRUPTS, UPDATES

if TYPE_CHECKING:
    from torch import nn

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

_CALLS = {
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "weight_needs",
}
_INTERRUPTS = {"abort_weight_update", "status"}


def ray_worker(**options: Any) -> Callable[[type], Any]:
    """Make a class that inherits from `RayWorker` an actor's, as ``ray.remote`` does.

    Args:
        options: those of ``ray.remote``, such as ``num_gpus=1, max_restarts=-1``. Concurrency groups of your own stand
            beside those of the control calls.
    """
    groups = {UPDATES: 1, INTERRUPTS: 2, **options.pop("concurrency_groups", {})}

    def decorate(cls: type) -> Any:
        return ray.remote(concurrency_groups=groups, **options)(cls)

    return decorate


def _in_group(group: str) -> Callable[[F], F]:
    decorate: Callable[[F], F] = ray.method(concurrency_group=group)
    return decorate


class RayWorker:
    """Base of an actor's class that receives weights; decorate the class with `ray_worker`.

    An update takes place while methods of your own run: they sample inside ``self.receiver.serving()``. An actor that
    Ray has restarted runs its constructor again, and joins at the trainer's next ``send``.

    Attributes:
        receiver: made by `receive_weights`.
    """

    receiver: WeightReceiver | None = None

    def receive_weights(self, config: Any, model: nn.Module, **options: Any) -> WeightReceiver:
        """Receive into a model of this actor; call it once, in the constructor.

        Args:
            config: anything that ``load_config`` takes; no token is needed.
            model: the model that serves.
            options: further arguments of `WeightReceiver`.
        """
        self.receiver = WeightReceiver(config, model, **options)
        return self.receiver

    @_in_group(UPDATES)
    def weight_transfer_call(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer a control call of `RayChannel`; one after another."""
        return self._answer(method, arguments, _CALLS)

    @_in_group(INTERRUPTS)
    def weight_transfer_interrupt(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer a control call that does not wait for the others."""
        return self._answer(method, arguments, _INTERRUPTS)

    def _answer(self, method: str, arguments: dict[str, Any], known: set[str]) -> dict[str, Any]:
        answer: dict[str, Any] = {"node": _node()}
        try:
            if self.receiver is None or method not in known:
                raise LifecycleError(
                    f"{method}: this actor receives no weights, or no such call; call self.receive_weights(config, "
                    "model) in its constructor.",
                    method=method,
                )
            answer["result"] = getattr(self.receiver, method)(**arguments)
        except WeightTransferError as error:
            answer["error"] = error_to_dict(error)
        except Exception as error:  # a loader's, say; the trainer is told
            logger.exception("%s failed", method)
            answer["error"] = error_to_dict(error)
        return answer


def _node() -> str:
    """Return how messages call the node of this actor."""
    node_id = ray.get_runtime_context().get_node_id()
    return f"{ray.util.get_node_ip_address()} (node {node_id[:8]}, process {os.getpid()})"
