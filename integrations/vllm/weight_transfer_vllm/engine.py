"""The worker's half: vLLM calls it, our receiver moves and checks the bytes, the model's layers take them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

import weight_transfer as wt
from weight_transfer.control import Reply, send_reply
from weight_transfer.errors import embed, error_from_dict, error_to_dict
from weight_transfer_vllm import PREFIX
from weight_transfer_vllm.envelope import Envelope
from weight_transfer_vllm.layers import VllmLayers
from weight_transfer_vllm.layerwise import LayerwiseLoader
from weight_transfer_vllm.ranks import gathered

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

DRAFT = "draft"
_TIMEOUT = 60.0  # seconds for a call that brings no deadline of its own
_GRACE = 10.0  # seconds that the ranks wait for each other beyond the deadline of what each of them does


_Calls = Mapping[str, Callable[[dict[str, Any]], object]]


@dataclass
class Init(WeightTransferInitInfo):
    """A call that came by way of vLLM's init, or why it is none: see `_opened`."""

    envelope: Envelope | wt.ConfigError


@dataclass
class Update(WeightTransferUpdateInfo):
    """A call that came by way of vLLM's update, or why it is none."""

    envelope: Envelope | wt.ConfigError


class Engine(WeightTransferEngine[Init, Update]):
    """What vLLM knows as ``wt_<backend>``: a `WeightReceiver` around each rank's model.

    Options of weight-transfer come from ``additional_config["weight_transfer"]`` of vLLM's configuration, a dict or the
    path of a TOML file, and from the environment, as ever; the backend from ``weight_transfer_config``. With
    ``additional_config["weight_transfer_recorded"] = False`` the model's own loader runs at each update.

    Args:
        config: vLLM's configuration of weight transfer.
        vllm_config: all of vLLM's configuration.
        device: where this rank's model lies.
        model: the model.
    """

    init_info_cls = Init
    update_info_cls = Update

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        own = vllm_config.additional_config
        own = own if isinstance(own, dict) else {}
        self._recorded = own.get("weight_transfer_recorded", True)
        parallel = self.parallel_config
        self._loader = self._loader_of(model, self.model_config)
        self._receiver = wt.WeightReceiver(
            wt.load_config(own.get("weight_transfer"), backend=config.backend.removeprefix(PREFIX)),
            model,
            parallel_config=wt.ParallelConfig(
                rank=parallel.data_parallel_index * parallel.world_size + parallel.rank,
                world_size=parallel.world_size * parallel.data_parallel_size,
                tensor_parallel_size=parallel.tensor_parallel_size,
                pipeline_parallel_size=parallel.pipeline_parallel_size,
                data_parallel_size=parallel.data_parallel_size,
                device=str(device),
            ),
            load_weights=self._loader,
        )
        self._told: frozenset[str] = frozenset()
        self._unused: list[str] = []
        self._draft: nn.Module | None = None
        self._arrived: str | None = None  # the session of an update that is complete
        self._open = False
        self._session: str | None = None

    def set_weight_update_target(self, model: nn.Module, model_config: Any) -> None:
        """Take in the draft model, which vLLM shows when an update of it starts."""
        super().set_weight_update_target(model, model_config)
        if model is not self._draft:
            self._receiver.add_target(DRAFT, model, self._loader_of(model, model_config))
            self._draft = model

    def _loader_of(self, model: nn.Module, model_config: Any) -> wt.PlannedLoader | LayerwiseLoader:
        layers = VllmLayers(model, model_config)
        return wt.PlannedLoader(layers) if self._recorded else LayerwiseLoader(layers)

    def parse_init_info(self, init_dict: dict[str, Any]) -> Init:
        return Init(_opened(init_dict))

    def parse_update_info(self, update_dict: dict[str, Any]) -> Update:
        return Update(_opened(update_dict))

    def init_transfer_engine(self, init_info: Init) -> None:
        """Do what came by way of vLLM's init: join, or another call that vLLM has no route for."""
        calls: _Calls = {
            "init": self._join,
            "weight_needs": self._needs,
            "status": self._status,
            "leave": lambda _: self._receiver.leave(),
            "abort": self._abort,
        }
        with set_current_vllm_config(self.vllm_config):
            self._together(init_info.envelope, calls)

    def start_weight_update(self) -> None:
        """Touch nothing: layers are touched when the first bytes have arrived.

        It could not fail here either: vLLM's executor hears one rank's error only, and takes what the others have
        answered for the answers to its next call.
        """
        self._open, self._arrived = True, None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive all weights. Not the base's, which synchronises an accelerator that a CPU worker lacks."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Update) -> None:
        try:
            self._together(update_info.envelope, {"update": self._update})
        except BaseException:
            self._open = False  # so vLLM sees it, too
            raise

    def finish_weight_update(self) -> None:
        """Publish what has arrived on all ranks; after a failure there is nothing to publish."""
        arrived, self._arrived, self._open = self._arrived, None, False
        if arrived is not None:
            _, own = _caught(lambda: self._receiver.finish_weight_update(session=arrived or None))
            self._raise_on_the_last_rank(self._agreed(own, _TIMEOUT))

    def shutdown(self) -> None:
        """Leave the trainer; another one may join."""
        self._receiver.leave()

    def _status(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the receiver's, with this worker's standing, and whether it has joined whoever asks."""
        return self._receiver.status() | self._standing | {"yours": data.get("session") == self._session}

    @property
    def _standing(self) -> dict[str, bool]:
        """Whether vLLM's session of updates is open here, and whether the model may generate."""
        return {"open": self._open, "served": self._receiver.state is not wt.ReceiverState.FAILED}

    def _update(self, info: dict[str, Any]) -> dict[str, Any]:
        session = info.get("session")
        self._receiver.start_weight_update(session)
        report = self._receiver.update_weights(info)
        self._arrived = session or ""
        return report

    def _needs(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if request.get("target") == DRAFT and self._draft is None:  # not shown yet, so the first update goes whole
            return None
        return self._receiver.weight_needs(request)

    def _abort(self, data: dict[str, Any]) -> dict[str, bool]:
        self._receiver.abort_weight_update(str(data.get("reason", "")), data.get("session"))
        self._arrived = None
        return self._standing

    def _join(self, info: dict[str, Any]) -> dict[str, Any] | None:
        self._arrived = None  # what another trainer has left unfinished is not to be published
        self._session = info.get("session")
        return self._receiver.init_weight_transfer_engine(info)

    def _together(self, envelope: Envelope | wt.ConfigError, calls: _Calls) -> None:
        """Do one of some calls on all ranks, or leave none with an update that others lack, and tell the trainer."""
        if isinstance(envelope, wt.ConfigError):  # all ranks have been called so
            self._raise_on_the_last_rank(envelope)
            return
        result, own = _caught(lambda: calls[envelope.call](envelope.data))
        if own is not None:  # the others may wait for the trainer until it hears of this
            self._answer(envelope, error=own)
        error = self._agreed(own, _seconds(envelope.data.get("timeout")))
        if error is None and envelope.call == "update" and isinstance(result, dict):
            result = self._with_unused(result)
        if error is not None and envelope.call in ("init", "update"):
            with suppress(wt.SessionError):  # it is another trainer's by now
                self._abort({"reason": str(error), "session": envelope.data.get("session")})
        if own is None:
            self._answer(envelope, result, error)
        self._raise_on_the_last_rank(error)

    def _answer(self, envelope: Envelope, result: object = None, error: wt.WeightTransferError | None = None) -> None:
        parallel = self._receiver.parallel_config
        reply = Reply(rank=parallel.rank, workers=parallel.world_size, result=result, error=error)
        try:
            send_reply(envelope.reply, reply)
        except wt.WeightTransferError as unheard:  # the trainer has died, or cannot be reached
            logger.warning("%s could not be answered: %s", envelope.call, unheard)

    def _agreed(self, own: wt.WeightTransferError | None, timeout: float) -> wt.WeightTransferError | None:
        """Return the error of what all ranks of this replica have done: if it failed on one, it has failed on all.

        Args:
            own: this rank's.
            timeout: seconds that it may take on the others.
        """
        mine = {"error": None if own is None else error_to_dict(own), "unused": self._new_unused()}
        outcomes = gathered(mine, timeout + _GRACE)
        unused = [set(outcome["unused"]) for outcome in outcomes if outcome["unused"] is not None]
        if len(unused) == len(outcomes):
            self._unused = sorted(set.intersection(*unused))
        failed = next((outcome["error"] for outcome in outcomes if outcome["error"] is not None), None)
        return own or (None if failed is None else error_from_dict(failed))

    def _new_unused(self) -> list[str] | None:
        """Return what this rank keeps nothing of, if it has not told the others yet; all plan at the same time."""
        unused = self._loader.unused if isinstance(self._loader, wt.PlannedLoader) else frozenset()
        if unused is self._told:
            return None
        self._told = unused
        return sorted(unused)

    def _with_unused(self, report: dict[str, Any]) -> dict[str, Any]:
        """Add a warning of weights that no rank uses; experts may also be at home in another data-parallel replica."""
        parallel = self.parallel_config
        elsewhere = parallel.data_parallel_size > 1 and parallel.enable_expert_parallel
        if not self._unused or elsewhere or parallel.rank:
            return report
        warning = (
            f"{len(self._unused)} weights are used by no rank of vLLM, such as {self._unused[0]!r}: its model has no "
            "place for them."
        )
        return {**report, "warnings": [*report.get("warnings", ()), warning]}

    def _raise_on_the_last_rank(self, error: wt.WeightTransferError | None) -> None:
        """Raise where vLLM reads the answer last.

        Its multiprocess executor reads the workers' answers in order and stops at the first failure: what the later
        ones have said stays in their queues, and is taken for the answer to the next call.
        """
        if error is not None and self.parallel_config.rank == self.parallel_config.world_size - 1:
            raise RuntimeError(embed(error)) from error


def _seconds(timeout: object) -> float:
    """Return a call's timeout, or the default: nothing may raise here, on all ranks at once."""
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and 0 < timeout < math.inf:
        return float(timeout)
    return _TIMEOUT


def _opened(data: dict[str, Any]) -> Envelope | wt.ConfigError:
    """Open an envelope. A parser may not raise either: it would on all ranks."""
    try:
        return Envelope.from_wire(data)
    except wt.ConfigError as error:
        return error


def _caught(call: Callable[[], object]) -> tuple[object, wt.WeightTransferError | None]:
    try:
        return call(), None
    except Exception as error:  # told to the other ranks and to the trainer
        logger.exception("a call of the trainer failed")
        return None, error if isinstance(error, wt.WeightTransferError) else error_from_dict(error_to_dict(error))
