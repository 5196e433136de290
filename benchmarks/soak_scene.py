"""What an episode of the soak is played with: weights, layout, and configuration, all chosen by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import attrs

from weight_transfer.testing.models import Weight, combined, hashes, weight
from weight_transfer.testing.shards import WEIGHTS, Places, plain

TIMEOUT = 4.0  # seconds
INIT_TIMEOUT = 15.0  # seconds
_SHARDED = [row for row in WEIGHTS if not row[1].startswith("float8")]  # gloo gathers no float8


@attrs.frozen
class Scene:
    """One episode's.

    Attributes:
        config: of both sides.
        layout: of the trainer's ranks, as in `weight_transfer.testing.shards`, or ``"passing"`` for a single rank that
            yields copies, as one does that gathers.
        weights: of all ranks together; JSON-safe.
        ranks: of the trainer.
        workers: their number.
        in_place: whether the backend may write into the workers' tensors itself.
        salt: of the weights' bits.
    """

    config: dict[str, Any]
    layout: str
    weights: Sequence[Weight]
    ranks: int
    workers: int
    in_place: bool
    salt: int


def choose(backend: str, chance: random.Random) -> Scene:
    """Return a scene for a backend."""
    layout = chance.choice(["plain", "plain", "passing", "megatron", "fsdp"])
    ranks = 2 if layout in ("megatron", "fsdp") else 1
    every: dict[str, dict[str, Any]] = {
        "ipc": {"export": chance.choice(["adopt", "stage"])},
        "nccl": {"direct_bytes": chance.choice(["4KiB", "8MiB"])},
        "rdma": {"transport": chance.choice(["shm", "tcp"]), "adopt": chance.choice([True, False])},
    }
    options = every[backend]
    config = {
        "backend": backend,
        "timeout": TIMEOUT,
        "init_timeout": INIT_TIMEOUT,
        "bucket_bytes": chance.choice(["16KiB", "256KiB"]),
        "verify": "none" if chance.random() < 0.25 else "wire",
        "on_worker_failure": chance.choice(["abort", "abort", "continue"]),
        backend: options,
    }
    in_place = layout == "megatron" or chance.random() < 0.5  # nobody can gather those shards
    weights = _SHARDED if ranks > 1 else _stack(chance)
    return Scene(config, layout, weights, ranks, chance.choice([2, 2, 3]), in_place, chance.randrange(2**20))


def _stack(chance: random.Random) -> list[Weight]:
    """Return a small stack of linear layers, sometimes with many small tensors beside it."""
    width = chance.choice([8, 33, 128])
    layers = chance.randint(1, 8)
    weights = [weight(f"layer{index}", "bfloat16", width, width) for index in range(layers)]
    weights += [weight(f"bias{index}", "float32", width) for index in range(layers)]
    if chance.random() < 0.4:
        weights += [weight(f"small{index}", "bfloat16", 3) for index in range(chance.randint(100, 400))]
    if chance.random() < 0.4:
        weights.append(weight("large", "float32", 512, chance.choice([64, 512])))
    return weights


def digest_of(weights: Sequence[Weight], seed: int) -> str:
    """Return the digest that a model of these weights has with the bits of a seed; see `digest`."""
    source, places = plain(weights, 0, 1, "cpu")
    Places(weights, places).write(seed)
    return combined(hashes(source.module))  # type: ignore[attr-defined]  # that of a module


def seed_of(scene_salt: int, version: int) -> int:
    """Return the seed of a version's bits."""
    return scene_salt * 1_000_000 + version
