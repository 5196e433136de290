"""Records the loader of vLLM's own class for Qwen3-30B-A3B, cut to a number of layers, without a byte of its weights.

    python benchmarks/record_scale.py [--layers 48] [--repeat 3]

Needs vLLM; no GPU, and less than a gigabyte: the model is built on ``meta``, on each of two ranks as tensor-parallel
workers have it, with experts shared out (EP) and cut (TP). Rank 0 measures, in seconds of its own processor time, which
other processes disturb less:

* ``loader``: ``load_weights`` over tensors without bytes, unrecorded;
* ``record``: the same, recorded; ``more`` is the difference;
* ``boxes``: `Recording.boxes` of all sources; ``wire``: to JSON and back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import shapes
import torch

from weight_transfer import Manifest, ParamMeta, Recording, record

sys.path.append(str(Path(__file__).parents[1] / "integrations" / "vllm" / "tests"))

CONFIG: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "tie_word_embeddings": False,
    "architectures": ["Qwen3MoeForCausalLM"],
}


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time that a call takes, and what it returns."""
    since = time.process_time()
    result = call()
    return time.process_time() - since, result


def unrecorded(load_weights: Callable[..., Any], manifest: Manifest) -> None:
    """Load weights without bytes into a model without bytes."""
    load_weights([(p.name, torch.empty(p.shape, dtype=torch.bfloat16, device="meta")) for p in manifest.params])


def boxes_of(recording: Recording) -> None:
    """Work out the boxes of all sources."""
    for param in recording.manifest.params:
        recording.boxes(param.name)


def wired(recording: Recording) -> Recording:
    """Return what arrives on the other side."""
    return Recording.from_wire(json.loads(json.dumps(recording.to_wire())), recording.manifest)


def measure(rank: int, root: Path, layers: int, repeat: int) -> None:
    """Be one of two ranks."""
    import transformers
    from architectures import two_ranks, vllm_model

    folder = root / str(rank)
    transformers.Qwen3MoeConfig(num_hidden_layers=layers, **CONFIG).save_pretrained(folder)
    manifest = Manifest(ParamMeta(name, "bfloat16", shape) for name, shape in shapes.qwen_moe(layers).items())
    with two_ranks(rank, root / "meeting"):
        for expert_parallel in (True, False):
            model = vllm_model(folder, "meta", expert_parallel=expert_parallel)
            if rank == 0:
                report("EP" if expert_parallel else "TP", model, manifest, repeat)
            del model


def report(title: str, model: Any, manifest: Manifest, repeat: int) -> None:
    """Print a row for each repetition."""
    for _ in range(repeat):
        alone, _ = seconds(lambda: unrecorded(model.load_weights, manifest))
        whole, recording = seconds(lambda: record(model.load_weights, manifest, lambda: dict(model.named_parameters())))
        boxes, _ = seconds(partial(boxes_of, recording))
        wire, _ = seconds(partial(wired, recording))
        assert not (recording.refused or recording.failed or recording.uncovered)
        times = " ".join(f"{value:7.2f}" for value in (alone, whole, whole - alone, boxes, wire))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{title} {len(manifest.params):8} {len(recording.copies):8} {times} {memory:7.2f}", flush=True)


def main() -> None:
    """Start both ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"VLLM_DIST_IDENT": uuid.uuid4().hex[:8], "VLLM_LOGGING_LEVEL": "ERROR"}
    print("    sources   copies  loader  record    more   boxes    wire  RSS GB")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        arguments = Path(root), options.layers, options.repeat
        ranks = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(600)
        for rank in ranks:
            rank.kill()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
