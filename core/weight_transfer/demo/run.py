"""What happens in the demo, in order. Imports torch only when something can be seen on the screen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from weight_transfer.demo.proof import prove
from weight_transfer.demo.view import Facts, Sample, View
from weight_transfer.demo.workers import Worker, check_workers, start_workers
from weight_transfer.errors import ConfigError, WeightTransferError
from weight_transfer.plugins.backend import Capability
from weight_transfer.plugins.manager import LoadedBackend, load_backend
from weight_transfer.values.report import counted

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.demo.trainer import Trainer

_TOKENS = 64  # generated after each update, and compared at the end


def run_demo(config: WeightTransferConfig, *, workers: int, steps: int, every: int, view: View) -> bool:
    """Train, send every so often, and prove at the end that every worker has what the trainer has.

    Args:
        config: of both sides.
        workers: number of inference workers.
        steps: training steps.
        every: steps between two updates; there is one before the first step and one after the last, too.
        view: where to show it.

    Returns:
        Whether every worker's weights and tokens are the trainer's.

    Raises:
        WeightTransferError: the backend does not work here, an update failed, or a worker died.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: threads that spin longer crawl on a busy machine
    loaded = load_backend(config.backend)
    crosses = Capability.CROSS_PROCESS in loaded.backend.capabilities
    _require(loaded, crosses)
    view.phase(f"importing torch and transformers, and starting {counted(workers)}")
    with start_workers(config, workers, crosses) as team, _blaming_the_dead(team):
        import torch

        from weight_transfer.demo.trainer import THREADS, Trainer

        torch.set_num_threads(THREADS)
        trainer = Trainer(steps)
        for number, worker in enumerate(team, 1):
            view.phase(f"waiting for worker {number} of {workers} to be up")
            worker.wait_up()
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        places = tuple((worker.name, worker.where) for worker in team)
        view.begin(
            Facts(
                backend=config.backend,
                provider=str(loaded.provider),
                parameters=parameters,
                steps=steps,
                workers=places,
            )
        )
        _train(config, trainer, team, steps, every, view)
        view.phase("comparing every worker with the trainer")
        verdicts = prove(trainer.model, team, steps, _TOKENS)
    view.proved(verdicts)
    return all(verdict.holds for verdict in verdicts)


def _train(
    config: WeightTransferConfig, trainer: Trainer, team: Sequence[Worker], steps: int, every: int, view: View
) -> None:
    """Train and send; the workers sample while the next steps are trained."""
    from weight_transfer.session.sender import WeightSender

    loss = None
    samples: list[Future[None]] = []
    with (
        ThreadPoolExecutor(len(team)) as pool,
        WeightSender(config, workers=[worker.channel for worker in team]) as sender,
    ):
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                _collect(samples)
                view.sending(step)
                view.updated(sender.send(trainer.model, version=step), loss)
                samples = [pool.submit(_sample, worker, index, view) for index, worker in enumerate(team)]
            if step < steps:
                loss = trainer.step()
                view.stepped(step + 1, loss)
            check_workers(team)
        _collect(samples)


def _sample(worker: Worker, index: int, view: View) -> None:
    from weight_transfer.demo.corpus import decode, prompt_of

    prompt = prompt_of(index)
    answer = worker.generate(prompt, _TOKENS)
    state = worker.status()["state"]
    text = decode(answer["tokens"])
    view.sampled(Sample(worker=worker.name, version=answer["version"], state=state, prompt=prompt, text=text))


def _collect(samples: Sequence[Future[None]]) -> None:
    for sample in samples:
        sample.result()


def _require(loaded: LoadedBackend, crosses: bool) -> None:
    """Raise before anything is started if it cannot work."""
    loaded.require_available()
    if Capability.CPU not in loaded.backend.capabilities:
        raise ConfigError(
            f"Backend {loaded.name!r} ({loaded.provider}) moves no CPU tensors, and the demo has no others."
        )
    needed = ("transformers", "httpx", "starlette", "uvicorn") if crosses else ("transformers",)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ConfigError(f"The demo needs {', '.join(missing)}: pip install 'weight-transfer[demo]'")


@contextmanager
def _blaming_the_dead(team: Sequence[Worker]) -> Iterator[None]:
    """If a worker has died, that explains any other error better than the error itself."""
    try:
        yield
    except WeightTransferError as error:
        check_workers(team, error)
        raise
