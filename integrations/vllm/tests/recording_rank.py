"""One of two ranks: records the loader of vLLM's class of each architecture, and compares replays with it.

    python recording_rank.py RANK FOLDER

Reads a checkpoint of each in FOLDER, and writes ``rank-RANK.json`` there: by architecture, what was found.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, two_ranks, vllm_model
from safetensors.torch import load_file
from vllm.distributed.parallel_state import get_tp_group

from weight_transfer import Manifest, ParamMeta, Recording, record
from weight_transfer.model.load_plan import LoadPlan

UNTOUCHED = 3


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def random_bits(like: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Any bits: NaNs with payloads among them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in like.items():
        size = (*tensor.shape, tensor.element_size())
        found[name] = (
            torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(tensor.dtype).reshape(tensor.shape)
        )
    return found


def examine(name: str, folder: Path) -> dict[str, Any]:
    architecture = ARCHITECTURES[name]
    checkpoint = load_file(folder / "model.safetensors")
    manifest = Manifest(
        ParamMeta(key, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for key, value in checkpoint.items()
    )
    model = vllm_model(folder, "cpu", expert_parallel=architecture.expert_parallel)
    own = dict(model.named_parameters())
    for tensor in own.values():
        tensor.data.fill_(UNTOUCHED)
    since = time.perf_counter()
    recording = record(model.load_weights, manifest, lambda: dict(model.named_parameters()))
    seconds = time.perf_counter() - since
    touched = [key for key, tensor in own.items() if not bool((tensor == UNTOUCHED).all())]

    on_meta = vllm_model(folder, "meta", expert_parallel=architecture.expert_parallel)
    again = record(on_meta.load_weights, manifest, lambda: dict(on_meta.named_parameters()))
    wired = Recording.from_wire(json.loads(json.dumps(recording.to_wire())), manifest)

    unequal = []
    for seed in (1, 2, 1):
        weights = random_bits(checkpoint, seed)
        model.load_weights([(key, tensor.clone()) for key, tensor in weights.items()])
        loaded = {key: tensor.detach().clone() for key, tensor in own.items()}
        for tensor in own.values():
            tensor.data.fill_(UNTOUCHED)
        wired.replay(weights, own)
        unequal += [key for key in own if not torch.equal(bits(own[key]), bits(loaded[key]))]
    plan = LoadPlan.of(recording, lambda key: key.rpartition(".")[0])
    plan.require(manifest, (), own, lambda key: key.rpartition(".")[0], split=(get_tp_group().rank_in_group, 2))
    moved = sum(copy.frm.numel * checkpoint[copy.source].element_size() for copy in recording.copies)
    return {
        "class": type(model).__name__,
        "parameters": len(own),
        "sources": len(checkpoint),
        "copies": len(recording.copies),
        "dims": max(len(copy.to.shape) for copy in recording.copies),
        "kept": moved / manifest.nbytes,
        "seconds": seconds,
        "refused": {key: [list(refusal.sources), refusal.reason] for key, refusal in recording.refused.items()},
        "failed": dict(recording.failed),
        "uncovered": list(recording.uncovered),
        "unused": sorted(recording.unused),
        "cast": [copy.source for copy in recording.copies if copy.casts],
        "whole": [key for key in checkpoint if recording.boxes(key) is None],
        "touched": touched,
        "unequal": sorted(set(unequal)),
        "digests": [recording.digest, again.digest, wired.digest],
    }


def main(rank: int, root: Path) -> None:
    found: dict[str, Any] = {}
    with two_ranks(rank, root / "meeting"):
        for name in ARCHITECTURES:
            try:
                found[name] = examine(name, root / name)
            except Exception:  # noqa: BLE001  (a test shows it)
                found[name] = {"error": traceback.format_exc()}
    (root / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
