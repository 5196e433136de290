"""A trainer that stands still in the middle of an update, says so, and waits to be killed: URL CHECKPOINT PHASE."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM

import weight_transfer as wt
from weight_transfer_vllm import VllmChannel

URL, CHECKPOINT, PHASE = sys.argv[1:]


def stand_still() -> None:
    print(json.dumps(PHASE), flush=True)
    threading.Event().wait()


class Slow(wt.WeightSource):
    """Stands still at its first weight, or in the middle."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._inner = wt.ModuleSource(model)

    def manifest(self) -> wt.Manifest:
        return self._inner.manifest()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        at = {"begun": 0, "half": len(self.manifest().params) // 2}.get(PHASE, -1)
        for number, weight in enumerate(self._inner):
            if number == at:
                stand_still()
            yield weight


class Channel(VllmChannel):
    """Stands still before it publishes."""

    def finish_weight_update(self, weight_version: int | str | None = None, session: str | None = None) -> None:
        if PHASE == "finish":
            stand_still()
        super().finish_weight_update(weight_version, session)


model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
config = {"backend": "ipc", "timeout": 30, "bucket_bytes": 65536}
with Channel(URL) as channel, wt.WeightSender(config, [channel]) as sender:
    sender.send(Slow(model))
