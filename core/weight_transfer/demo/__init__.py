"""The demo: a small Llama learns ten sonnets on the CPU, and inference workers receive its weights meanwhile.

Read in this order: `run` (what happens), `trainer`, `worker` (one inference worker), `workers` (their processes),
`proof` (bit equality). `view` and `live` show it.
"""

from __future__ import annotations

from weight_transfer.demo.run import run

__all__ = ["run"]
