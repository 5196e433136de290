"""What ``weight-transfer bench --json`` writes, with invented figures."""

from __future__ import annotations

from typing import Any

LIMIT = 0.046


def figures(median: float, **more: Any) -> dict[str, Any]:
    seconds = [median * 1.04, median, median * 0.97]
    return {"median": median, "min": seconds[2], "max": seconds[0], "gbps": 0.24 / median, "seconds": seconds, **more}


def against(median: float) -> dict[str, Any]:
    return figures(median, of_limit=LIMIT / median)


def measured(send: float) -> dict[str, Any]:
    limit = figures(LIMIT, what="one plain copy of as many bytes, in each worker")
    return {"limit": limit, "engine": against(send * 0.9), "update": against(send * 0.95), "send": against(send)}


def spans(*parts: tuple[str, float, float]) -> list[dict[str, Any]]:
    return [{"phase": phase, "begin": begin, "seconds": seconds} for phase, begin, seconds in parts]


def timeline(send: float, workers: int) -> dict[str, Any]:
    trainer = spans(
        ("start", 0.0, 0.05 * send), ("update", 0.05 * send, 0.9 * send), ("finish", 0.95 * send, 0.05 * send)
    )
    rows = [{"who": "trainer 0", "spans": trainer}]
    for worker in range(workers):
        check, receive = 0.02 * send, (0.8 - 0.05 * worker) * send
        own = spans(("check", 0.06 * send, check), ("receive", 0.08 * send, receive), ("commit", 0.95 * send, 0.0))
        rows.append({"who": f"worker {worker}", "spans": own})
    return {"seconds": send, "rows": rows}


def case(backend: str, shape: str, seconds: float, **changes: Any) -> dict[str, Any]:
    common = {"backend": backend, "provider": f"weight-transfer-{backend} 0.1.0", "shape": shape, "layers": 4}
    common |= {"published_layers": 32, "width": 4, "tensors": 39, "bytes": 239_600_640, "device": "cpu", "trainers": 1}
    common |= {"workers": 2, "tensor_parallel": 1, "trainer_devices": ["cpu"], "worker_devices": ["cpu", "cpu"]}
    common |= {"kept": [239_600_640] * 2, "rounds": 3, "verify": "none", "transport": "shared memory", "warnings": []}
    told = {"error": None, "bits_equal": True, **measured(seconds), "timeline": timeline(seconds, 2)}
    return {**common, **told, **changes}


def failed(backend: str, shape: str, error: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("limit", "engine", "update", "send", "timeline", "bits_equal"))
    return case(backend, shape, 1.0, error=error, kept=[], **nothing)


def sweep(over: str, backend: str, slower: float) -> dict[str, Any]:
    points = [
        {
            "tensors": 10**power if over == "tensors" else 100,
            "bytes": 64_000_000 if over == "tensors" else 10 ** (power + 5),
            "error": None,
            "bits_equal": True,
            **measured(slower * (0.011 + 2e-6 * 10**power)),
        }
        for power in range(4)
    ]
    common = {"over": over, "backend": backend, "provider": f"weight-transfer-{backend} 0.1.0", "device": "cpu"}
    return {**common, "trainers": 1, "workers": 2, "verify": "none", "rounds": 3, "points": points}


def results(**changes: Any) -> dict[str, Any]:
    backends = {"ipc": 1.1, "nccl": 1.4, "zeromq": 9.0}
    shapes = ("llama-3.1-8b", "qwen3-30b-a3b")
    cases = [case(backend, shape, slower * LIMIT) for shape in shapes for backend, slower in backends.items()]
    cases.append(failed("rdma", shapes[1], "worker 1 died of SIGKILL; its stderr says why"))
    cases[1]["warnings"] = ["http://127.0.0.1:41231: reads run at 3.1 GB/s, this host copies at 7.5"]
    cases[2]["engine"] = None
    machine = {"system": "Linux 6.1 x86_64", "cpu": "AMD EPYC 9R14", "cores": 2, "memory_bytes": 25 * 10**9, "gpus": []}
    made = {
        "schema": 1,
        "made": "2026-11-26T13:01:22+00:00",
        "options": {"backends": list(backends), "shapes": list(shapes), "rounds": 3},
        "machine": machine,
        "versions": {"weight-transfer": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu"},
        "left_out": [{"backend": "broken", "reason": "no wheel is installed.", "fix": "Install one: pip install it"}],
        "cases": cases,
        "sweeps": [
            sweep(over, backend, slower) for over in ("tensors", "bytes") for backend, slower in backends.items()
        ],
    }
    return {**made, **changes}
