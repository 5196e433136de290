"""The demo: a small Llama learns six sonnets on the CPU, and inference workers receive its weights meanwhile.

Read in this order: `run` (what happens), `trainer`, `worker` (one inference worker), `workers` and
`process` (where they run), `proof` (bit equality). `view` and `live` show it.
"""

from __future__ import annotations

from weight_transfer.demo.run import run_demo

__all__ = ["run_demo"]
