"""A worker process: prompts come as lines of JSON, samples go back as others; weights come by weight-transfer.

python worker.py BACKEND SEED
"""

from __future__ import annotations

import json
import sys

import torch

import weight_transfer as wt
from policy import Policy
from rollouts import draw


def main(backend: str, seed: int) -> None:
    """Serve until the trainer closes the pipe."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    policy = Policy()
    receiver = wt.WeightReceiver({"backend": backend}, policy)
    with wt.serve(receiver) as server:
        print(json.dumps({"url": server.url}), flush=True)
        for line in sys.stdin:
            print(json.dumps(draw(receiver, policy, torch.tensor(json.loads(line))).to_lists()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
