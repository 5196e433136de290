"""Speed of the ``nccl`` backend, beside the raw broadcast and other schemes over the same communicator in the same run.

    python benchmarks/nccl.py --device cuda --workers 1 --case dense --case moe
    python benchmarks/nccl.py --device cpu --workers 2 --case small [--layers N] [--json FILE]

One trainer and the workers are processes of one host; on CUDA each has a GPU of its own. The schemes:

* ``limit``: broadcasts of one buffer (1 GiB on CUDA, all bytes on the CPU), again and again, until all bytes have gone;
* ``ours``: the two engines with the receiver's checks and loader, told to begin as the other schemes are;
* ``ours, send``: ``WeightSender.send``, all phases, with the control channel over HTTP;
* ``per tensor``: one broadcast per parameter, from and into its own storage;
* ``packed``: two buffers of 1 GiB: concatenate, broadcast, split, copy into the parameters (vLLM's scheme, written
  afresh from its description).

Rounds alternate between the schemes; medians are compared. The bits of every worker are compared with the trainer's
after A, then B, then A again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shapes
import torch
from nccl_schemes import BASELINES
from torch import nn

import weight_transfer as wt
from weight_transfer.config.structuring import unstructure
from weight_transfer.memory.integrity import tensor_digest
from weight_transfer.model.loading import KernelFormatLoader
from weight_transfer.model.manifest import digest_json
from weight_transfer.session.update import Update
from weight_transfer.values.deadline import Deadline
from weight_transfer_nccl.group import Group
from weight_transfer_nccl.meeting_place import MeetingPlace

if TYPE_CHECKING:
    from weight_transfer_nccl.rendezvous import Rendezvous

CASES = {
    "dense": shapes.llama_8b,
    "moe": shapes.qwen_moe,
    "small": shapes.qwen_half_billion,
    "toy": shapes.toy,
    "toy-moe": shapes.toy_moe,
}
SCHEMES = ("limit", "ours", "ours, send", "per tensor", "packed")
Shapes = dict[str, tuple[int, ...]]


def digest(weights: nn.Module) -> str:
    return digest_json([tensor_digest(parameter) for parameter in weights.parameters()])


def quiet(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Memory:
    """Watches the memory that torch allocates on a CUDA device, beyond what it holds now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._held = torch.cuda.memory_allocated(device) if self._device else 0

    def watch(self) -> None:
        """Forget the peak so far."""
        if self._device:
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def extra(self) -> int:
        """Bytes at the peak, beyond what was held in the beginning; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self._device) - self._held if self._device else 0


class Receiver:
    """A worker's engine with the checks and the loader of a `WeightReceiver`, without its control channel."""

    def __init__(self, config: Any, weights: nn.Module, device: str, init_info: dict[str, Any]) -> None:
        loaded = wt.load_config(config)
        self._engine = wt.load_backend("nccl").create_worker_engine(loaded, wt.ParallelConfig(device=device))
        self._engine.init_transfer_engine(self._engine.parse_init_info(init_info))
        self._loader = KernelFormatLoader(weights)

    def receive(self, info: Any) -> None:
        update = Update(600)
        self._loader.begin(info.manifest)
        update.loader = self._loader
        update.begin(info, lambda _event: None, "nccl")
        self._engine.receive_weights(info, update)
        update.finish()

    def close(self) -> None:
        self._engine.shutdown()


class Sender:
    """The trainer's engine without a control channel."""

    def __init__(self, config: Any, weights: nn.Module, device: str, pipes: list[Connection]) -> None:
        loaded = wt.load_config(config)
        self._engine = wt.load_backend("nccl").create_trainer_engine(loaded, wt.ParallelConfig(device=device))
        self._source = wt.ModuleSource(weights)
        size = len(pipes) + 1
        slots = [wt.WorkerSlot(peer=str(rank), rank_offset=rank, count=1, world_size=size) for rank in range(1, size)]
        for slot, pipe, fields in zip(slots, pipes, self._engine.open_endpoint(slots, Deadline(60)), strict=True):
            common = {"rank_offset": slot.rank_offset, "world_size": size, "timeout": 60.0}
            pipe.send({"init": unstructure({**fields, **common})})
        self._engine.join_workers(Deadline(60))
        manifest = self._source.manifest()
        fields = self._engine.describe_update(self._source, manifest, Deadline(60))
        info = self._engine.update_info_cls(manifest=manifest, timeout=600.0, version=1, **fields)
        for pipe in pipes:
            pipe.send({"info": info})
            pipe.recv()

    def send(self) -> None:
        manifest = self._source.manifest()
        self._engine.describe_update(self._source, manifest, Deadline(60))
        self._engine.send_weights(self._source, manifest, Deadline(600), lambda _nbytes: None)

    def close(self) -> None:
        self._engine.shutdown()


def work(
    pipe: Connection, rank: int, size: int, device_name: str, named: Shapes, meeting: Rendezvous, config: Any
) -> None:
    """Be a worker: serve a receiver, and take part in the baselines when told to."""
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    weights = shapes.Weights(named, torch.bfloat16, device_name)
    deadline = Deadline(120)
    group = Group(meeting, rank, size, device)
    group.join(deadline, str)
    memory = Memory(device)
    with wt.WeightReceiver(config, weights) as receiver, wt.serve(receiver) as server:
        pipe.send(server.url)
        while (command := pipe.recv()) != "stop":
            if command == "digest":
                pipe.send(digest(weights))
            elif isinstance(command, dict) and "init" in command:
                engine = Receiver(config, weights, device_name, command["init"])
            elif isinstance(command, dict):
                info = command["info"]
                pipe.send("done")
            elif command == "ours":
                engine.receive(info)
                pipe.send("done")
            elif command == "watch":
                memory.watch()
                pipe.send(None)
            elif command == "extra":
                pipe.send(memory.extra)
            else:
                BASELINES[command](group, weights, False)
                quiet(device)
                pipe.send("done")
        engine.close()
    group.abort()


def measure(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case; print its table, and return its figures, JSON-safe."""
    named = shapes.first_layers(CASES[case](), arguments.layers)
    cuda = arguments.device == "cuda"
    devices = [f"cuda:{i}" if cuda else "cpu" for i in range(arguments.workers + 1)]
    device = torch.device(devices[0])
    if cuda:
        torch.cuda.set_device(device)
    place = MeetingPlace("127.0.0.1", 0)
    meeting = place.meeting("nccl" if cuda else "gloo")
    config = {"backend": "nccl", "bucket_bytes": arguments.bucket, "nccl": {"direct_bytes": arguments.direct}}
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(1, arguments.workers + 1):
        pipe, theirs = context.Pipe()
        args = (theirs, rank, arguments.workers + 1, devices[rank], named, meeting, config)
        processes.append(context.Process(target=work, args=args, daemon=True))
        processes[-1].start()
        theirs.close()  # so that a worker that dies is noticed
        pipes.append(pipe)
    weights = shapes.Weights(named, torch.bfloat16, devices[0])
    nbytes = sum(parameter.nbytes for parameter in weights.parameters())
    group = Group(meeting, 0, arguments.workers + 1, device)
    group.join(Deadline(120), str)
    urls = [pipe.recv() for pipe in pipes]
    memory = Memory(device)
    times: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
    updates: list[float] = []
    report: wt.TransferReport
    extra: list[int] = []
    with wt.WeightSender(config, urls) as sender:

        def ask(command: str) -> list[Any]:
            for pipe in pipes:
                pipe.send(command)
            return [pipe.recv() for pipe in pipes]

        def baseline(scheme: str) -> float:
            for pipe in pipes:
                pipe.send(scheme)
            since = time.perf_counter()
            if scheme == "ours":
                engine.send()
            else:
                BASELINES[scheme](group, weights, True)
                quiet(device)
            if any(pipe.recv() != "done" for pipe in pipes):
                raise SystemExit(f"{scheme}: a worker failed")
            return time.perf_counter() - since

        def whole_send() -> float:
            since = time.perf_counter()
            nonlocal report
            report = sender.send(weights)
            updates.append(report.seconds["update"])
            return time.perf_counter() - since

        def require_bits() -> None:
            for pipe in pipes:
                pipe.send("digest")
            own = digest(weights)
            if any(pipe.recv() != own for pipe in pipes):
                raise SystemExit(f"{case}: a worker's bytes differ from the trainer's")

        for seed in (1, 2, 1):
            weights.randomise(seed)
            ask("watch")
            memory.watch()
            whole_send()
            extra = [memory.extra, *ask("extra")] if cuda else [report.extra_memory]
            require_bits()
        engine = Sender(config, weights, devices[0], pipes)
        for seed in (2, 1):
            weights.randomise(seed)
            baseline("ours")
            require_bits()
        schemes = [scheme for scheme in SCHEMES if scheme not in arguments.skip]
        for _ in range(arguments.rounds + 1):
            for scheme in schemes:
                times[scheme].append(whole_send() if scheme == "ours, send" else baseline(scheme))
        for pipe in pipes:
            pipe.send("stop")
        engine.close()
    group.abort()
    for process in processes:
        process.join(30)
    medians = {scheme: statistics.median(times[scheme][1:]) for scheme in schemes}
    held = " ".join(f"{nbytes / 2**20:.1f}" for nbytes in extra)
    print(f"{case}: {report.params} tensors, {nbytes / 1e9:.2f} GB, 1 -> {arguments.workers}, bits equal after A, B, A")
    print(f"  ours, extra memory of the trainer and the workers: {held} MiB")
    medians["its update phase"] = statistics.median(updates[-arguments.rounds :])
    rows = {}
    for scheme, seconds in medians.items():
        rate, ratio = nbytes / seconds / 1e9, medians["limit"] / seconds
        print(f"  {scheme:16} {seconds * 1e3:9.1f} ms {rate:8.2f} GB/s   ratio {ratio:5.3f}", flush=True)
        rows[scheme] = {"median_s": seconds, "GBps": rate, "of_limit": ratio}
    return {
        "case": case,
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "torch": torch.__version__,
        "workers": arguments.workers,
        "rounds": arguments.rounds,
        "tensors": report.params,
        "nbytes": nbytes,
        "extra_bytes": extra,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--case", choices=sorted(CASES), action="append", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bucket", default="256MiB")
    parser.add_argument("--direct", default="8MiB")
    parser.add_argument("--skip", choices=SCHEMES, action="append", default=[])
    parser.add_argument("--layers", type=int, help="of the model, all by default")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    found = [measure(case, arguments) for case in arguments.case]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
