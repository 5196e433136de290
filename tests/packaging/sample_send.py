"""Send one version over the backend ``files`` from this process to another one, each with the observer ``jsonlines``.

Run by a clean environment's own interpreter: ``sample_send.py DIRECTORY LOG``. Prints version and sums of both sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

import weight_transfer as wt


def config(directory: str) -> wt.WeightTransferConfig:
    settings = {"backend": "files", "observers": ["jsonlines"], "files": {"directory": directory}, "timeout": 30}
    return wt.load_config({**settings, "bucket_bytes": 4096})


def model(value: float) -> torch.nn.Module:
    layer = torch.nn.Linear(100, 100)
    with torch.no_grad():
        layer.weight.fill_(value)
        layer.bias.copy_(torch.arange(100))
    return layer


def worker(directory: str) -> None:
    layer = torch.nn.Linear(100, 100)
    with wt.WeightReceiver(config(directory), layer) as receiver, wt.serve(receiver, port=0) as server:
        print(server.url, flush=True)
        sys.stdin.readline()
        print(json.dumps([receiver.version, [float(weight.sum()) for weight in layer.parameters()]]), flush=True)


def trainer(directory: str) -> None:
    command = [sys.executable, "-I", __file__, directory, "worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        layer = model(0.5)
        with wt.WeightSender(config(directory), workers=[process.stdout.readline().strip()]) as sender:
            sender.send(layer, version=7)
            received = json.loads(process.communicate("\n", timeout=30)[0])
    print(json.dumps({"received": received, "sent": [7, [float(weight.sum()) for weight in layer.parameters()]]}))


if sys.argv[2:] == ["worker"]:
    worker(sys.argv[1])
else:
    os.environ["SAMPLE_LOG"] = sys.argv[2]  # the worker inherits it
    trainer(sys.argv[1])
