"""What the copies of a recording cost, beside one plain copy of the bytes that are kept.

    python benchmarks/recorded_copies.py --device cpu|cuda --shapes llama-8b|qwen3-30b-a3b [--layers N]
        [--tensor-parallel 2] [--expert-parallel 2] [--bucket MIB] [--rounds 7] [--json FILE]

There is no model and no vLLM: the loader is a plain one that fuses as vLLM's do (q, k and v; gate and up; all experts
of a layer), for rank 0 of tensor or expert parallelism, and no layer is written directly. `PlannedLoader` records it
and takes weights in buckets, as a receiver gets them; these lie in two buffers in turns. A layer's memory is used again
by the next one of its kind, and processing does nothing. So all of it fits anywhere.

* ``copies``: all calls of the loader for one update, until the device has done what they tell it;
* ``returned after``: the same until they have returned, which is Python's part on CUDA;
* ``copy``: the limit, `copy_` of as many bytes as are kept, in as many blocks as there are layers, which go back and
  forth between two buffers.

Rounds alternate, medians are compared. Before, one update is checked: one in seven of the weights of each layer is
compared, bit by bit, with what has become of it there.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import shapes
import torch
from torch import Tensor

from weight_transfer import Manifest, ParamMeta, PlannedLoader
from weight_transfer.model.regions import Region

SHAPES: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "llama-8b": shapes.llama_8b,
    "qwen3-30b-a3b": lambda: shapes.qwen_moe(48),
}
ITEMSIZE = 2  # bytes of bfloat16, which all weights are
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
BY_COLUMNS = ("o_proj", "down_proj")
MIB = 2**20
SAMPLES = 7  # of so many weights one is compared
Shape = tuple[int, ...]
Weights = list[tuple[str, Tensor]]


@attrs.frozen
class Place:
    """Where a rank keeps its part of a weight.

    Attributes:
        target: name of the fused weight.
        part: what is kept.
        row: of the target, or of one of its experts, where the part begins.
        expert: which one of the rank's; None if there are none.
    """

    target: str
    part: Region
    row: int
    expert: int | None

    def of(self, target: Tensor) -> Tensor:
        """Return the part's place in the target."""
        own = target if self.expert is None else target[self.expert]
        return own.narrow(0, self.row, self.part.shape[0])


class FusedModel:
    """Rank 0 of a model that fuses as vLLM's do.

    Args:
        full: shapes of the checkpoint, by name.
        tensor_parallel: ranks among which all but norms and routers is cut.
        expert_parallel: ranks among which experts are dealt out; more than one: these are not cut.
    """

    def __init__(self, full: Mapping[str, Shape], tensor_parallel: int, expert_parallel: int) -> None:
        self.tensor_parallel = tensor_parallel
        experts = 1 + max((found for found in map(expert_of, full) if found is not None), default=-1)
        own = experts // expert_parallel
        self.places: dict[str, Place] = {}
        self.forms: dict[str, Shape] = {}
        rows: defaultdict[tuple[str, int | None], int] = defaultdict(int)
        for name, shape in full.items():
            expert = expert_of(name)
            if expert is not None and expert >= own:
                continue
            target = target_of(name)
            is_whole = len(shape) == 1 or name.endswith("mlp.gate.weight")
            if is_whole or (expert is not None and expert_parallel > 1):
                part = Region.whole(shape)
            else:
                part = Region.split(shape, int(any(word in name for word in BY_COLUMNS)), 0, tensor_parallel)
            self.places[name] = Place(target, part, rows[target, expert], expert)
            rows[target, expert] += part.shape[0]
            form = (rows[target, expert], *part.shape[1:])
            self.forms[target] = form if expert is None else (own, *form)

    @property
    def nbytes(self) -> int:
        """Bytes that the rank keeps."""
        return ITEMSIZE * sum(place.part.volume for place in self.places.values())

    def load(self, targets: Mapping[str, Tensor], weights: Weights) -> None:
        """Do what the model's own loader does."""
        for name, tensor in weights:
            place = self.places.get(name)
            if place is not None:
                place.of(targets[place.target]).copy_(tensor[place.part.slices])


def expert_of(name: str) -> int | None:
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found is not None else None


def target_of(name: str) -> str:
    """Return the name of the fused weight."""
    short = re.sub(r"\.experts\.\d+\.(\w+)_proj\.weight", r".experts.\1_proj", name)
    return re.sub(r"\b(q|k|v|gate|up)_proj", lambda found: f"{FUSED[found[1]]}_proj", short)


def fill(tensor: Tensor, name: str) -> None:
    """Fill a weight with bits that tell its name and the place of each."""
    bits = torch.arange(tensor.numel(), dtype=torch.int32, device=tensor.device)
    bits.add_(zlib.crc32(name.encode()) % 2**24).mul_(-1640531527).bitwise_right_shift_(13)
    tensor.view(torch.int16).copy_(bits.view(tensor.shape))


class ReusedLayers:
    """`ServedLayers` of a `FusedModel`, of which one layer of each kind has memory at a time.

    Attributes:
        checked: how many weights have been compared.
        check: whether to compare some of those of a layer that has ended.
    """

    def __init__(self, model: FusedModel, device: str) -> None:
        self._model = model
        self._device = device
        self._free: defaultdict[object, list[dict[str, Tensor]]] = defaultdict(list)
        self._begun: dict[str, dict[str, Tensor]] = {}
        self._of: defaultdict[str, list[str]] = defaultdict(list)
        for target in model.forms:
            self._of[self.layer_of(target)].append(target)
        self._from: defaultdict[str, list[str]] = defaultdict(list)
        for name, place in model.places.items():
            self._from[self.layer_of(place.target)].append(name)
        self.full: Mapping[str, Shape] = {}
        self.check = False
        self.checked = 0

    @contextmanager
    def recorded(self) -> Iterator[tuple[Callable[[Weights], object], Mapping[str, Tensor]]]:
        targets = {
            name: torch.empty(form, dtype=torch.bfloat16, device="meta") for name, form in self._model.forms.items()
        }
        yield lambda weights: self._model.load(targets, weights), targets

    def layer_of(self, name: str) -> str:
        return name.rpartition(".")[0]

    def required(self) -> Collection[str]:
        return self._model.forms

    def optional(self) -> Collection[str]:
        return ()

    def split(self) -> tuple[int, int]:
        return 0, self._model.tensor_parallel

    def state(self) -> object:
        return None

    def by_loader(self) -> Mapping[str, str]:
        return {}

    def in_place(self) -> Mapping[str, Tensor]:
        return {}

    def open(self, directly: Collection[str]) -> None:
        pass

    def begin_layer(self, layer: str) -> Mapping[str, Tensor]:
        names = self._of[layer]
        free = self._free[self._kind(layer)]
        tensors = (
            free.pop()
            if free
            else {
                name.rpartition(".")[2]: torch.empty(self._model.forms[name], dtype=torch.bfloat16, device=self._device)
                for name in names
            }
        )
        self._begun[layer] = {name: tensors[name.rpartition(".")[2]] for name in names}
        if self.check:  # what an earlier layer has left here is not to pass for what should have come
            for tensor in tensors.values():
                tensor.view(torch.int16).fill_(-1)
        return self._begun[layer]

    def end_layer(self, layer: str) -> bool:
        tensors = self._begun.pop(layer)
        if self.check:
            for name in self._from[layer][::SAMPLES]:
                self._compare(name, tensors)
        self._free[self._kind(layer)].append({name.rpartition(".")[2]: tensor for name, tensor in tensors.items()})
        return False

    def load(self, weights: Weights) -> None:
        raise RuntimeError("something could not be recorded")

    def finish(self) -> None:
        if self._begun:
            raise RuntimeError(f"{next(iter(self._begun))} is not complete")

    def restore(self, reason: str) -> None:
        pass

    def _kind(self, layer: str) -> object:
        return tuple((name.rpartition(".")[2], self._model.forms[name]) for name in self._of[layer])

    def _compare(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        place = self._model.places[name]
        weight = torch.empty(self.full[name], dtype=torch.bfloat16, device=self._device)
        fill(weight, name)
        found, expected = place.of(tensors[place.target]), weight[place.part.slices]
        if not torch.equal(found.view(torch.int16), expected.contiguous().view(torch.int16)):
            raise SystemExit(f"{name}: other bits have arrived than were sent")
        self.checked += 1


def buckets_of(full: Mapping[str, Shape], size: int, device: str) -> list[Weights]:
    """Return all weights in buckets, which lie in two buffers in turns; none is filled."""
    sizes = {name: ITEMSIZE * Region.whole(shape).volume for name, shape in full.items()}
    room = max(size, *sizes.values())
    buffers = [torch.zeros(room, dtype=torch.uint8, device=device) for _ in range(2)]
    buckets: list[Weights] = [[]]
    used = 0
    for name, shape in full.items():
        if used + sizes[name] > room:
            buckets.append([])
            used = 0
        buffer = buffers[len(buckets) % 2]
        buckets[-1].append((name, buffer[used : used + sizes[name]].view(torch.bfloat16).view(shape)))
        used += -(-sizes[name] // 256) * 256
    return buckets


def quiet(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the milliseconds until a call has returned, and until the device has done it."""
    quiet(device)
    since = time.perf_counter()
    call()
    returned = time.perf_counter()
    quiet(device)
    return 1e3 * (returned - since), 1e3 * (time.perf_counter() - since)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = "cuda:0" if options.device == "cuda" else "cpu"
    full = SHAPES[options.shapes]()
    if options.layers is not None:
        full = {
            name: shape
            for name, shape in full.items()
            if (found := re.search(r"layers\.(\d+)\.", name)) is None or int(found[1]) < options.layers
        }
    manifest = Manifest([ParamMeta(name, "bfloat16", shape) for name, shape in full.items()])
    model = FusedModel(full, options.tensor_parallel, options.expert_parallel)
    layers = ReusedLayers(model, device)
    layers.full = full
    loader = PlannedLoader(layers)
    size = MIB * (options.bucket or (1024 if options.device == "cuda" else 64))
    buckets = buckets_of(full, size, device)

    recording, _ = timed(lambda: loader.begin(manifest), device)
    layers.check = True
    for bucket in buckets:
        for name, tensor in bucket:
            fill(tensor, name)
        loader(bucket)
    loader.finish()
    layers.check = False

    def copies() -> None:
        loader.begin(manifest)
        for bucket in buckets:
            loader(bucket)
        loader.finish()

    blocks = 1 + max(int(found[1]) for name in full if (found := re.search(r"layers\.(\d+)\.", name)))
    pair = [torch.ones(model.nbytes // blocks, dtype=torch.uint8, device=device) for _ in range(2)]

    def copy() -> None:
        for number in range(blocks):
            pair[number % 2].copy_(pair[1 - number % 2])

    took: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds + 1):
        returned, done = timed(copies, device)
        limit = timed(copy, device)[1]
        if number:  # the first one warms up
            took["python"].append(returned)
            took["copies"].append(done)
            took["copy"].append(limit)
    medians = {what: statistics.median(times) for what, times in took.items()}
    return {
        "shapes": options.shapes,
        "layers": blocks,
        "device": torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu",
        "tensor_parallel": options.tensor_parallel,
        "expert_parallel": options.expert_parallel,
        "weights": len(full),
        "copies": len(model.places),
        "bytes_kept": model.nbytes,
        "buckets": len(buckets),
        "checked": layers.checked,
        "recording_ms": recording,
        "ms": medians,
        "of_limit": medians["copy"] / medians["copies"],
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="only the first ones")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--expert-parallel", type=int, default=1)
    parser.add_argument("--bucket", type=int, help="MiB; 64, and 1024 on CUDA")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    ms = found["ms"]
    rate = found["bytes_kept"] / 1e6
    print(
        f"{found['shapes']}, {found['layers']} layers, TP {found['tensor_parallel']}, EP {found['expert_parallel']}, "
        f"on {found['device']}: {found['weights']} weights in {found['buckets']} buckets, {found['copies']} copies, "
        f"{found['bytes_kept'] / 1e9:.2f} GB kept, recorded in {found['recording_ms']:.0f} ms; bits of "
        f"{found['checked']} weights are right"
    )
    print(f"copies {ms['copies']:.1f} ms ({rate / ms['copies']:.1f} GB/s), returned after {ms['python']:.1f}")
    print(f"copy   {ms['copy']:.1f} ms ({rate / ms['copy']:.1f} GB/s); copies reach {found['of_limit']:.3f} of it")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
