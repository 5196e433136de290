"""Speed of updates by region, beside gathering, plain copies, and the limit, in the same run.

    python benchmarks/shards.py --device cuda|cpu --backend ipc|nccl|rdma [--trainers 2] [--workers 2]
        [--case dense|moe] [--repeat 9] [--json FILE] [--quick]

Trainer ranks and workers are processes. The trainer's weights are sharded by FSDP2, which cuts every weight along its
first dimension; the workers' model is cut by tensor parallelism, experts go whole to one worker. Trainer rank i and
worker i share GPU i, as in colocated training. ``nccl`` on GPUs needs one for each process: where there are too few,
one trainer rank sends to one worker, which keeps half of the model, and the output says so. Shapes are Llama-3.1-8B's
and those of 24 layers of Qwen3-30B-A3B; on CPUs Qwen2.5-0.5B's, and a small mixture of experts.

Rows:

* ``limit``: the same bytes without anything around them. ``ipc`` on GPUs: local copies and reads of the peers, side by
  side; on CPUs: one contiguous copy by each worker. ``nccl``: grouped sends and receives. ``rdma``: one NIXL read of
  each rank, one descriptor each. All workers at once; the slowest counts.
* ``plain copies``: one ``copy_`` for each piece, strided as it is, from mapped shards (on CPUs from shards that the
  worker's process holds itself) into the worker's weights; all workers at once, the slowest counts.
* ``engine``: the slowest worker's ``receive_regions``: the method is wrapped in the worker's process by a timer that
  also waits for the GPU.
* ``update``: that phase of the report; ``send``: wall time of ``WeightSender.send`` on rank 0, all its phases, with the
  control calls over HTTP.
* ``gathered``: the same ``send`` of a source that does not say where its shards lie: all ranks gather every weight in
  lockstep, rank 0 sends all to all workers, and each takes its part. ``gathered, engine``: ``receive_weights`` in that.

All but the last two take turns, in another order in each round, so that a noisy machine disturbs them alike; medians
are compared. Rates are bytes kept by a worker per second. Before, whatever moves weights brings version A, then B, then
A again to weights that were zero, and every element of every worker is compared. ``send`` must have moved as many bytes
as each worker keeps, from the ranks that hold them. On CPUs each process computes with one thread, and CPU seconds of
the thread stand beside wall time: where other programs take the cores, they are the ones to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
from actors import Actor, ask, ask_each, end
from parts import Parts
from shards_roles import Scene, Trainer, Worker

CASES = {
    ("cuda", "dense"): shapes.llama_8b,
    ("cuda", "moe"): shapes.qwen_moe,
    ("cpu", "dense"): shapes.qwen_half_billion,
    ("cpu", "moe"): shapes.small_moe,
}
QUICK = {
    "dense": lambda: shapes.llama(2, 256, 1024, 8, 2, 4096),
    "moe": lambda: shapes.llama(1, 256, 1024, 8, 2, 4096) | shapes.routed("model.layers.0.mlp", 8, 256, 128),
}
VERSIONS = (1, 2, 1)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Run:
    """One run of the benchmark.

    Args:
        scene: who takes part.
        seconds: that one step may take.
        life: seconds that the run may take.
        repeat: rounds that count.
    """

    def __init__(self, scene: Scene, seconds: float, life: float, repeat: int) -> None:
        self.scene, self.seconds, self.repeat = scene, seconds, repeat
        self.times: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.facts: dict[str, Any] = {"bits_equal": [], "memory": {}}
        self.has_copies = False
        self.trainers: list[Actor] = []
        self.workers: list[Actor] = []
        try:
            for rank in range(len(scene.trainers)):
                self.trainers.append(Actor(f"trainer rank {rank}", life, Trainer, scene, rank))
            for number in range(len(scene.workers)):
                self.workers.append(Actor(f"worker {number}", life, Worker, scene, number))
            self._measure()
        finally:
            end([*self.trainers, *self.workers])

    @property
    def everyone(self) -> list[Actor]:
        return [*self.trainers, *self.workers]

    def ask(self, actors: Sequence[Actor], method: str, *arguments: Any) -> list[Any]:
        return ask(actors, self.seconds, method, *arguments)

    def _measure(self) -> None:
        tell("starting processes")
        self.ask(self.everyone, "tidy")
        self._connect()
        self.ask(self.workers, "forget")
        for version in VERSIONS:
            tell(f"bits of version {version}: ours, plain copies")
            self._bring(version, self._send, "ours")
            if not self.has_copies:
                self._prepare_copies()
            if not self.on_gpu:
                self.ask(self.workers, "hold_seed", version)
            self.ask(self.workers, "forget")
            self._copy()
            self._require_bits("plain copies", version)
        meeting, self._store = new_meeting(self.scene)
        calls = [(actor, "make_limit", (member, meeting)) for member, actor in enumerate(self.everyone)]
        offers = ask_each(calls, self.seconds)[: len(self.trainers)]
        self.ask(self.everyone, "join_limit", offers)
        self.times.clear()
        self.cpu.clear()
        steps = (self._send, self._copy, self._reach_limit)
        for number in range(self.repeat + 1):
            tell(f"round {number} of {self.repeat}")
            for step in range(len(steps)):  # a system that is busy favours whoever has rested
                steps[(number + step) % len(steps)]()
        self.times = {name: values[1:] for name, values in self.times.items()}
        self.cpu = {name: values[1:] for name, values in self.cpu.items()}
        self.ask(self.workers, "forget")
        self.ask(self.trainers, "send")
        self._require_bits("ours after the rounds", VERSIONS[-1])
        self.ask(self.everyone, "end_limit")
        self.ask(self.workers, "unpair")
        self._measure_gathering()

    def _measure_gathering(self) -> None:
        self.ask(self.trainers, "disconnect")
        self._connect()
        self.ask(self.workers, "forget")
        for version in VERSIONS:
            tell(f"bits of version {version}: gathered")
            self._bring(version, self._gather, "gathered")
        for name in ("gathered", "gathered, engine"):
            self.times[name].clear()
        for number in range(max(2, self.repeat // 3)):
            tell(f"gathered: round {number + 1}")
            self._gather()

    def _bring(self, version: int, move: Callable[[], None], what: str) -> None:
        """Fill the trainer's shards, move them, and compare all bits; the first time, watch the memory."""
        self.ask(self.trainers, "fill", version)
        is_first = what not in self.facts["memory"]
        if is_first:
            self.ask(self.everyone, "tidy")
            self.ask(self.everyone, "before")
        move()
        if is_first:
            memory = self.ask(self.everyone, "memory")
            self.facts["memory"][what] = dict(zip([actor.name for actor in self.everyone], memory, strict=True))
        self._require_bits(what, version)

    def _connect(self) -> None:
        urls = self.ask(self.workers, "serve")
        self.ask(self.trainers, "connect", urls)

    def _prepare_copies(self) -> None:
        self.has_copies = True
        if self.on_gpu:
            self.ask(self.workers, "map", self.ask(self.trainers, "where"))
        else:
            self.ask(self.workers, "hold")

    @property
    def on_gpu(self) -> bool:
        return self.scene.trainers[0] != "cpu"

    def _require_bits(self, what: str, version: int) -> None:
        wrong = self.ask(self.workers, "wrong", version)
        if any(wrong):
            raise SystemExit(f"{what}: {wrong} elements of the workers differ from version {version}")
        if what not in self.facts["bits_equal"]:
            self.facts["bits_equal"].append(what)

    def _note(self, row: str, seconds: float, cpu: float | None = None) -> None:
        self.times.setdefault(row, []).append(seconds)
        if cpu is not None:
            self.cpu.setdefault(row, []).append(cpu)

    def _note_slowest(self, row: str, taken: Sequence[tuple[float, float]]) -> None:
        self._note(row, max(wall for wall, _ in taken), max(cpu for _, cpu in taken))

    def _send(self) -> None:
        report = self.ask(self.trainers, "send")[0]
        taken = [each["receive_regions"] for each in self.ask(self.workers, "engine_seconds")]
        self._note("send", report["send"])
        self._note("update", report["seconds"]["update"])
        self._note_slowest("engine", taken)
        for phase, seconds in report["seconds"].items():
            self._note(f"phase {phase}", seconds)
        self._require_counts(report)
        self.facts["report"] = report

    def _require_counts(self, report: dict[str, Any]) -> None:
        """See that exactly what the workers keep was moved, and from where it lies."""
        parts = self.scene.parts
        taken = [parts.by_rank(worker) for worker in range(len(self.workers))]
        kept, given = [sum(sizes) for sizes in taken], [sum(sizes) for sizes in zip(*taken, strict=True)]
        if list(report["kept"].values()) != kept or list(report["given"]) != given or report["gathered"]:
            raise SystemExit(
                f"workers keep {kept}, of which the ranks hold {given}; the report says {report['kept']} were kept, "
                f"{report['given']} given, {report['gathered']} gathered"
            )
        self.facts |= {"kept": kept, "given": given, "taken": taken}

    def _gather(self) -> None:
        report = self.ask(self.trainers, "send", True)[0]
        taken = [each["receive_weights"] for each in self.ask(self.workers, "engine_seconds")]
        self._note("gathered", report["send"])
        self._note_slowest("gathered, engine", taken)
        if report["kept"] or report["gathered"] != self.scene.parts.nbytes:
            raise SystemExit(f"gathering was to move all {self.scene.parts.nbytes} bytes whole: {report}")

    def _copy(self) -> None:
        self._note_slowest("plain copies", self.ask(self.workers, "copy_plainly"))

    def _reach_limit(self) -> None:
        self._note_slowest("limit", self.ask(self.everyone, "run_limit"))


def new_meeting(scene: Scene) -> tuple[Any, Any]:
    """Return where the members of ``nccl``'s limit meet, and the store there; None for other backends."""
    if scene.backend != "nccl":
        return None, None
    from weight_transfer_nccl.rendezvous import Rendezvous, new_secret, open_store

    store, port = open_store("127.0.0.1", 0)
    transport = "gloo" if scene.trainers[0] == "cpu" else "nccl"
    return Rendezvous(address="127.0.0.1", port=port, secret=new_secret(), transport=transport), store


ROWS = ("limit", "plain copies", "engine", "update", "send", "gathered", "gathered, engine")


def summary(run: Run) -> dict[str, Any]:
    """Return the figures of a run, JSON-safe."""
    medians = {name: statistics.median(values) for name, values in run.times.items()}
    most = max(run.facts["kept"])
    rows = {}
    for name in ROWS:
        seconds, cpu = medians[name], run.cpu.get(name)
        rows[name] = {
            "median_s": seconds,
            "best_s": min(run.times[name]),
            "GBps": most / seconds / 1e9,
            "of_limit": medians["limit"] / seconds,
            "of_copies": medians["plain copies"] / seconds,
            "cpu_s": statistics.median(cpu) if cpu else None,
        }
    phases = {name.removeprefix("phase "): value for name, value in medians.items() if name.startswith("phase ")}
    facts = {name: value for name, value in run.facts.items() if not name.startswith("report")}
    last = run.facts["report"]
    return {
        "rows": rows,
        "phases_s": phases,
        **facts,
        "gathered_bytes": last["gathered"],
        "transports": sorted(set(last["transports"].values())),
        "warnings": last["warnings"],
    }


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(found["title"])
    for note in found["notes"]:
        print(f"  {note}")
    kept, given = (" + ".join(f"{nbytes / 1e9:.3f}" for nbytes in found[name]) for name in ("kept", "given"))
    print(f"  bits equal after A, B, A: {', '.join(found['bits_equal'])}")
    gathered = found["gathered_bytes"]
    print(f"  kept by the workers {kept} GB, as much moved; given by the ranks {given} GB; gathered {gathered} bytes")
    for name, memory in found["memory"].items():
        sides = [f"{who} {in_mib(counts)}" for who, counts in memory.items()]
        print(f"  extra MiB ({'/'.join(next(iter(memory.values())))}), {name}: {', '.join(sides)}")
    phases = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in found["phases_s"].items())
    print(f"  phases of send, ms: {phases}; over {', '.join(found['transports'])}")
    for warning in found["warnings"]:
        print(f"  warning: {warning}")
    print(f"  {'':18}{'median':>12}{'best':>12}{'GB/s':>8}{'of limit':>10}{'of copies':>10}{'CPU':>12}")
    for name, row in found["rows"].items():
        cpu = f"{row['cpu_s'] * 1e3:9.2f} ms" if row["cpu_s"] is not None and found["device"] == "cpu" else ""
        print(
            f"  {name:18}{row['median_s'] * 1e3:9.2f} ms{row['best_s'] * 1e3:9.2f} ms{row['GBps']:8.1f}"
            f"{row['of_limit']:10.3f}{row['of_copies']:10.3f}{cpu:>12}",
            flush=True,
        )


def in_mib(counts: dict[str, int]) -> str:
    return "/".join(f"{nbytes / 2**20:.0f}" for nbytes in counts.values())


def devices(options: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Return the devices of trainer ranks and workers, and what the reader must know of them."""
    trainers, workers = options.trainers, options.workers
    if options.device == "cpu":
        return ["cpu"] * trainers, ["cpu"] * workers, []
    gpus = torch.cuda.device_count()
    if options.backend != "nccl":
        notes = [] if gpus >= max(trainers, workers) else [f"{gpus} GPUs, so ranks share them"]
        first, second = ([f"cuda:{number % gpus}" for number in range(count)] for count in (trainers, workers))
        return first, second, notes
    if gpus >= trainers + workers:
        every = [f"cuda:{number}" for number in range(trainers + workers)]
        return every[:trainers], every[trainers:], []
    if gpus < 2:
        raise SystemExit("nccl needs at least two GPUs: one for a trainer rank and one for a worker")
    note = f"nccl needs a GPU per process and there are {gpus}: one trainer rank holds all, one worker keeps half"
    return ["cuda:0"], ["cuda:1"], [note]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("ipc", "nccl", "rdma"), default="ipc")
    parser.add_argument("--trainers", type=int, default=2, help="trainer ranks")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", choices=("dense", "moe"), default="dense")
    parser.add_argument("--repeat", type=int, default=9, help="rounds, after one that does not count")
    parser.add_argument("--quick", action="store_true", help="tiny weights and two rounds")
    parser.add_argument("--step", type=float, default=120, help="seconds that any one step may take")
    parser.add_argument("--life", type=float, default=600, help="seconds that the run may take")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(arguments)
    trainers, workers, notes = devices(options)
    named = QUICK[options.case]() if options.quick else CASES[options.device, options.case]()
    parts = Parts(named, len(trainers), max(len(workers), 2))
    config = {"backend": options.backend, "timeout": options.step, "init_timeout": options.step}
    if options.quick:
        options.repeat = min(options.repeat, 2)
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        scene = Scene(
            parts=parts, backend=options.backend, config=config, trainers=trainers, workers=workers, store=store
        )
        run = Run(scene, options.step, options.life, options.repeat)
    machine = torch.cuda.get_device_name(0) if options.device == "cuda" else f"{os.cpu_count()} cores, load {load:.1f}"
    title = (
        f"{options.case}, {options.backend}: {len(named)} tensors, {parts.nbytes / 1e9:.2f} GB, trainer ranks "
        f"{len(trainers)} -> {len(workers)} workers; {machine}, torch {torch.__version__}; medians of "
        f"{options.repeat} rounds"
    )
    found = {
        "title": title,
        "device": options.device,
        "machine": machine,
        "torch": torch.__version__,
        "backend": options.backend,
        "case": options.case,
        "quick": options.quick,
        "devices": {"trainers": trainers, "workers": workers},
        "notes": notes,
        "tensors": len(named),
        "nbytes": parts.nbytes,
        "repeat": options.repeat,
        "wall_s": round(time.monotonic() - began, 1),
        **summary(run),
    }
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
