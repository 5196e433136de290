"""What it costs to take new weights into a model of vLLM's own classes, on the CPU: vLLM's reload, and ours.

    python apply.py [--model qwen3-moe|llama] [--tensor-parallel 2] [--plain-linear] [--rounds 5] [--json FILE]

In one process, round by round:

* ``vllm``: vLLM's layerwise reload as its engines do it, of copies of the weights, as its packed ``ipc`` engine does;
* ``vllm, kept``: the same, without making the copies;
* ``layerwise``: our `LayerwiseLoader`, which runs the same reload part by part, with copies;
* ``recorded``: our `PlannedLoader`, no layer being written directly;
* ``directly``: our `PlannedLoader`, and layers written directly where the list of `in_place` allows it;
* ``copy``: the limit, one `copy_` of as many bytes as the worker keeps.

Weights come in parts of 64 MiB. The best of the rounds counts, and ``begin`` is measured by itself, too. After weights
A, B, and A again, each way has to leave the bits that vLLM's own has left, which is compared by ``serving_of``.

With ``--tensor-parallel 2`` rank 0 of two is measured; the other one only helps it to make its groups. vLLM packs
linear layers for oneDNN on the CPU; with ``--plain-linear`` it falls back to `torch.nn.functional.linear`, whose
weights may be written directly, as those of GPUs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import models
import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from weight_transfer import Manifest, PlannedLoader
from weight_transfer_vllm.layers import VllmLayers
from weight_transfer_vllm.layerwise import LayerwiseLoader

PART = 64 * 2**20  # bytes
Weights = list[tuple[str, Tensor]]


class NothingDirectly(VllmLayers):
    """A model of which no layer is written directly."""

    def in_place(self) -> Mapping[str, Tensor]:
        return {}


def parts_of(weights: Weights) -> Iterator[Weights]:
    """Yield the weights in parts, as a receiver gets them."""
    part: Weights = []
    size = 0
    for name, tensor in weights:
        if part and size + tensor.nbytes > PART:
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += tensor.nbytes
    yield part


class Vllm:
    """vLLM's own reload.

    Args:
        model: the model.
        config: vLLM's configuration of it.
        copies: whether it is given copies.
    """

    def __init__(self, model: nn.Module, config: Any, copies: bool) -> None:
        self._model = model
        self._config = config
        self._copies = copies

    def __call__(self, weights: Weights) -> None:
        initialize_layerwise_reload(self._model)
        for part in parts_of(weights):
            own = [(name, tensor.clone()) for name, tensor in part] if self._copies else part
            self._model.load_weights(own)
        finalize_layerwise_reload(self._model, self._config)


class Ours:
    """A loader of ours, as a receiver calls it.

    Args:
        loader: the loader.
        manifest: of the weights.
    """

    def __init__(self, loader: Any, manifest: Manifest) -> None:
        self.loader = loader
        self._manifest = manifest

    def begin(self) -> None:
        self.loader.begin(self._manifest)

    def __call__(self, weights: Weights) -> None:
        self.begin()
        copies = getattr(self.loader, "retains", False)
        for part in parts_of(weights):
            self.loader([(name, tensor.clone()) for name, tensor in part] if copies else part)
        self.loader.finish()


def seconds(call: Callable[[], object]) -> float:
    since = time.perf_counter()
    call()
    return time.perf_counter() - since


def require_equal(way: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found[name], tensor)]
        if not torch.equal(*bits):
            raise SystemExit(f"{way}: {name} has other bits than vLLM's own reload has left")


def kept_bytes(loader: PlannedLoader) -> int:
    """Return the bytes of the weights that are copied; all are bfloat16."""
    plan = loader._plan
    assert plan is not None
    return 2 * sum(copy.to.numel for copy in plan.recording.copies)


def measure(options: argparse.Namespace, store: str) -> dict[str, Any]:
    config = models.config_of(options.model, options.tensor_parallel)
    manifest = models.manifest_of(options.model)
    with models.rank_of(config, 0, store):
        model = models.build(config)
        planned = PlannedLoader(NothingDirectly(model, config.model_config))
        direct = PlannedLoader(VllmLayers(model, config.model_config))
        ways: dict[str, Callable[[Weights], None]] = {
            "vllm": Vllm(model, config.model_config, copies=True),
            "vllm, kept": Vllm(model, config.model_config, copies=False),
            "layerwise": Ours(LayerwiseLoader(VllmLayers(model, config.model_config)), manifest),
            "recorded": Ours(planned, manifest),
            "directly": Ours(direct, manifest),
        }
        one, other = models.weights_of(manifest, 1), models.weights_of(manifest, 2)
        recording = seconds(lambda: planned.begin(manifest))
        for way, run in ways.items():
            for weights in (one, other, one):
                run(weights)
            if way == "vllm":
                expected = models.serving_of(model)
            require_equal(way, models.serving_of(model), expected)
        source = torch.ones(kept_bytes(planned), dtype=torch.uint8)
        target = torch.zeros_like(source)
        best = dict.fromkeys([*ways, "copy"], float("inf"))
        begin = float("inf")
        for number in range(options.rounds):
            for way, run in ways.items():
                weights = one if number % 2 else other
                best[way] = min(best[way], seconds(lambda run=run, weights=weights: run(weights)))
            best["copy"] = min(best["copy"], seconds(lambda: target.copy_(source)))
            begin = min(begin, seconds(ways["directly"].begin))
    return {
        "model": options.model,
        "tensor_parallel": options.tensor_parallel,
        "plain_linear": options.plain_linear,
        "weights": len(manifest.params),
        "bytes_kept": len(source),
        "layers_directly": len(direct._offer.landings) if direct._offer is not None else 0,
        "layers": len(direct._plan.into) if direct._plan is not None else 0,
        "recording_ms": 1e3 * recording,
        "begin_ms": 1e3 * begin,
        "ms": {way: 1e3 * took for way, took in best.items()},
        "threads": torch.get_num_threads(),
    }


def help_rank(options: argparse.Namespace, rank: int, store: str) -> None:
    """Be another rank, which makes the groups and waits: rank 0 ends it."""
    use_plain_linear(options)
    with models.rank_of(models.config_of(options.model, options.tensor_parallel), rank, store):
        multiprocessing.parent_process().join()


def use_plain_linear(options: argparse.Namespace) -> None:
    if options.plain_linear:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers import utils

        ops._supports_onednn = False  # vLLM's own switch
        utils.check_cpu_sgl_kernel = lambda *_: False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.CONFIGS, default="qwen3-moe")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--plain-linear", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    use_plain_linear(options)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        os.environ["VLLM_DIST_IDENT"] = Path(folder).name  # as vLLM's executor does, for the ranks' shared memory
        start = multiprocessing.get_context("spawn").Process
        for rank in range(1, options.tensor_parallel):
            start(target=help_rank, args=(options, rank, store), daemon=True).start()
        found = measure(options, store)
    print(
        f"{found['model']}: {found['weights']} weights, {found['bytes_kept'] / 1e9:.2f} GB kept, recorded in "
        f"{found['recording_ms']:.0f} ms; begin takes {found['begin_ms']:.3f} ms; {found['layers_directly']} of "
        f"{found['layers']} layers directly; bits equal"
    )
    print(f"{'way':<12} {'ms':>8} {'of vllm':>8} {'of copy':>8}")
    for way, took in found["ms"].items():
        print(f"{way:<12} {took:>8.1f} {took / found['ms']['vllm']:>8.3f} {took / found['ms']['copy']:>8.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
