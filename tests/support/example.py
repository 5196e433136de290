"""Runs examples of one page in one process, as an actor: ``[[line, code, whole], ...]``.

A whole script is given nothing; the others share their names, and are given some. When the last one has ended the
process says so, and lives until it is told to end, so that what it serves stays up.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.actors import Stage


def given() -> dict[str, Any]:
    """Return what the examples take as given: a model and something that trains it."""
    import torch
    from torch import nn

    def train(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)

    return {
        "__name__": "__main__",
        "model": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)),
        "train": train,
        "steps": 2,
    }


def main(
    stage: Stage, page: str, folder: str, code: list[tuple[int, str, bool]], log: str, environ: dict[str, str]
) -> None:
    import torch

    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environ)
    os.chdir(folder)
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    names, scopes = given(), []
    for line, text, whole in code:
        compiled = compile("\n" * line + text, page, "exec")  # tracebacks then speak of the page's own lines
        scopes.append({"__name__": "__main__"} if whole else names)  # kept, so that what serves goes on
        exec(compiled, scopes[-1])
    stage.say("done")
    stage.serve({})
