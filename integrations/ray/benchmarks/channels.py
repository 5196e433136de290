"""What a send costs over Ray's calls and over HTTP, with the same backend, model and actors, in turns.

python channels.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import ray
import torch

import weight_transfer as wt
from weight_transfer_ray import RayChannel, RayWorker, ray_worker

_CONFIG = {"backend": "ipc", "verify": "none", "timeout": 60}
_LAYERS = {"1 tensor, 4 KB": (1, 32), "400 tensors, 26 MB": (400, 128)}


def make_model(layers: int, width: int) -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))


class Worker(RayWorker):
    """Reached by Ray, or by HTTP."""

    def __init__(self, layers: int, width: int) -> None:
        torch.set_num_threads(1)
        self._server = wt.serve(self.receive_weights(_CONFIG, make_model(layers, width)), port=0)

    def url(self) -> str:
        return self._server.url


def measure(layers: int, width: int, workers: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a send, by channel."""
    actor = ray_worker(num_cpus=0)(Worker)
    model = make_model(layers, width)
    actors = {way: [actor.remote(layers, width) for _ in range(workers)] for way in ("HTTP", "Ray")}
    channels: dict[str, list[Any]] = {
        "HTTP": ray.get([each.url.remote() for each in actors["HTTP"]], timeout=60),
        "Ray": [RayChannel(each) for each in actors["Ray"]],
    }
    senders = {way: wt.WeightSender(_CONFIG, channels[way]) for way in channels}
    took: dict[str, list[float]] = {way: [] for way in senders}
    for turn in range(rounds + 3):
        for way, sender in senders.items():
            began = time.perf_counter()
            sender.send(model)
            if turn >= 3:  # the first ones join, and map memory
                took[way].append(1e3 * (time.perf_counter() - began))
    for way, sender in senders.items():
        sender.close()
        for each in actors[way]:
            ray.kill(each)
    return {way: statistics.median(times) for way, times in took.items()}


def main(rounds: int = 40) -> None:
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    print("| weights | workers | HTTP, lines | Ray | Ray costs |\n|---|---|---|---|---|")
    for name, (layers, width) in _LAYERS.items():
        for workers in (1, 2):
            cost = measure(layers, width, workers, rounds)
            more = cost["Ray"] - cost["HTTP"]
            print(f"| {name} | {workers} | {cost['HTTP']:.1f} ms | {cost['Ray']:.1f} ms | {more:+.1f} ms |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
