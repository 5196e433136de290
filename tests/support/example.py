"""Runs examples of one page in one process: ``python -m support.example PAGE`` takes ``[[line, code, whole], ...]``.

They come on stdin, as JSON. A whole script is given nothing; the others share their names, and are given some.
After the last one the process lives until stdin ends, so that what it serves stays up.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def given() -> dict[str, Any]:
    """Return what the examples take as given: a model and something that trains it."""
    import torch
    from torch import nn

    def train(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)

    torch.set_num_threads(1)
    return {
        "__name__": "__main__",
        "model": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)),
        "train": train,
        "steps": 2,
    }


def main(page: str) -> None:
    names, scopes = given(), []
    for line, code, whole in json.loads(sys.stdin.readline()):
        compiled = compile("\n" * line + code, page, "exec")  # tracebacks then speak of the page's own lines
        scopes.append({"__name__": "__main__"} if whole else names)  # kept, so that what serves goes on
        exec(compiled, scopes[-1])
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
