"""An ``LLM`` object of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from weight_transfer_vllm.calling import Caller
from weight_transfer_vllm.failures import foreign

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline
    from weight_transfer_vllm.servers import PauseMode

T = TypeVar("T")


class LlmServer:
    """vLLM's ``LLM``, for offline inference. Do not generate while an update runs: an ``LLM`` takes one call at a time.

    Its calls know no deadline. One that is late goes on, on a thread of its own, and the next one waits for it. While
    generation is paused, after an update that spoiled the weights, ``llm.generate`` waits for ever; send again first.

    Args:
        llm: the object.
    """

    def __init__(self, llm: Any) -> None:
        self.address = f"LLM {id(llm):#x}"
        self._llm = llm
        self._caller = Caller(f"weight-transfer {self.address}")

    def world_size(self, deadline: Deadline) -> int | None:
        count: int = self._call(self._llm.get_world_size, deadline)
        return count

    def init(self, info: dict[str, Any], deadline: Deadline) -> None:
        self._call(lambda: self._llm.init_weight_transfer_engine({"init_info": info}), deadline)

    def start(self, draft: bool, deadline: Deadline) -> None:
        self._call(self._llm.start_draft_weight_update if draft else self._llm.start_weight_update, deadline)

    def update(self, info: dict[str, Any], deadline: Deadline) -> None:
        self._call(lambda: self._llm.update_weights({"update_info": info}), deadline)

    def finish(self, version: str | None, deadline: Deadline) -> None:
        self._call(lambda: self._llm.finish_weight_update(version), deadline)

    def pause(self, mode: PauseMode, deadline: Deadline) -> None:
        self._call(lambda: self._llm.sleep(level=0, mode=mode), deadline)

    def resume(self, deadline: Deadline) -> None:
        self._call(lambda: self._llm.wake_up(tags=["scheduling"]), deadline)

    def reset_caches(self, recompute: bool, deadline: Deadline) -> bool:
        done = self._call(lambda: self._llm.reset_prefix_cache(recompute, True), deadline)
        self._call(self._llm.llm_engine.reset_encoder_cache, deadline)
        return bool(done)

    def close(self) -> None:
        self._caller.close()

    def _call(self, call: Callable[[], T], deadline: Deadline) -> T:
        try:
            return self._caller(call, deadline)
        except Exception as error:
            raise foreign(error, self.address) from error
