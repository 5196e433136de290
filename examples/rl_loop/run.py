"""Learn to sort digits, from nothing but whether an answer is right.

python run.py                  two worker processes
python run.py --ray            the same on actors: of a cluster that runs, or of a local one
python run.py --ray --nodes 3  on a local cluster of three nodes, one of which is killed on the way
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loop import Loop, Settings
from plot import plot
from pools import Processes

_WORKERS = 2
Step = Callable[[], dict[str, Any]]


@contextmanager
def on_processes(settings: Settings) -> Iterator[Step]:
    """Yield what goes one step on."""
    torch.set_num_threads(1)
    loop = Loop(settings, Processes(_WORKERS, settings.backend))
    try:
        yield loop.step
    finally:
        loop.close()


@contextmanager
def on_ray(settings: Settings, nodes: int) -> Iterator[tuple[Step, Callable[[], None]]]:
    """Yield what goes one step on, and what kills the node of a worker."""
    import ray
    from ray.cluster_utils import Cluster

    from weight_transfer_ray import TrainerGroup

    folder = str(Path(__file__).parent)
    quiet: dict[str, Any] = {"runtime_env": {"working_dir": folder}, "log_to_driver": False}
    killed: dict[str, Any] = {}
    where: dict[str, Any] = {}
    cluster = None
    if nodes > 1:  # the trainer on the first one, which is never killed, and the workers on the others
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        added = (cluster.add_node(num_cpus=0, resources={"worker": _WORKERS}) for _ in range(nodes - 1))
        killed = {node.node_id: node for node in added}
        where = {"num_cpus": 0, "resources": {"worker": 1}}
        ray.init(address=cluster.address, **quiet)
    else:
        ray.init(**quiet, **({} if "RAY_ADDRESS" in os.environ else {"num_cpus": 1 + _WORKERS}))
    try:
        from ray_pool import Trainer, WorkerActor

        workers = [WorkerActor.options(**where).remote(settings.config, seed) for seed in range(_WORKERS)]
        ray.get([worker.node.remote() for worker in workers], timeout=120)

        def kill() -> None:
            assert cluster is not None
            node = ray.get(workers[0].node.remote(), timeout=60)
            print(f"killing node {node[:8]}", flush=True)
            cluster.remove_node(killed.pop(node), allow_graceful=False)

        with TrainerGroup(Trainer, 1, arguments=(settings, workers)) as group:
            yield (lambda: group.each("step", timeout=300)[0]), kill
            group.each("close", timeout=60)
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()


def main() -> None:
    """Run, and write the run down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--target", type=float, default=0.65, help="reward, over five steps, at which it is done")
    parser.add_argument("--backend", default="ipc")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of a local cluster; one is killed")
    parser.add_argument("--out", type=Path, default=Path("run"), help="writes OUT.json, OUT.svg and OUT.html")
    options = parser.parse_args()
    settings = Settings(backend=options.backend, report=options.out.with_suffix(".html").resolve())
    rows: list[dict[str, Any]] = []

    def go(step: Step, kill: Callable[[], None] | None = None) -> None:
        for number in range(options.steps):
            if kill is not None and number == options.steps // 4:
                kill()
            rows.append(step())
            print(" ".join(f"{key}={value:.3g}" for key, value in rows[-1].items()), flush=True)
            last = [row.get("reward", 0.0) for row in rows[-5:]]
            if len(rows) >= 5 and sum(last) / 5 >= options.target:
                break

    if options.ray:
        with on_ray(settings, options.nodes) as (step, kill):
            go(step, kill if options.nodes > 1 else None)
    else:
        with on_processes(settings) as step:
            go(step)
    where = f"{_WORKERS} {'actors' if options.ray else 'processes'}"
    options.out.with_suffix(".json").write_text(json.dumps({"workers": where, "steps": rows}, indent=1))
    options.out.with_suffix(".svg").write_text(plot(rows, f"Reward of a policy whose samples come from {where}"))


if __name__ == "__main__":
    main()
