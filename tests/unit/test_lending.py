"""A loader has weights for one call: it must be done, and let go of them, when it returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import nn

from weight_transfer import ConfigError, TransferError, WeightReceiver, WeightSender
from weight_transfer.model.checkpoint_loading import CheckpointFormatLoader
from weight_transfer.model.lending import lend

CONFIG = {"backend": "loopback", "timeout": 20}


def generator(weights: Any) -> Any:
    yield from weights


async def coroutine(weights: Any) -> None: ...


async def asynchronous_generator(weights: Any) -> Any:
    yield weights


def later(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a plain function that calls another one, so that nobody sees what it is."""

    def call(weights: Any) -> Any:
        return function(weights)

    return call


class CallableGenerator:
    def __call__(self, weights: Any) -> Any:
        yield from weights


class OfAModel(nn.Linear):
    def load_weights(self, weights: Any) -> Any:
        yield from weights


@pytest.mark.parametrize(
    "loader",
    [generator, coroutine, asynchronous_generator, functools.partial(generator), CallableGenerator()],
    ids=["generator", "coroutine", "asynchronous generator", "partial", "callable object"],
)
@pytest.mark.parametrize("role", ["load_weights", "process_weights_after_loading"])
def test_functions_that_do_nothing_when_they_are_called_are_refused_by_name(loader: Any, role: str) -> None:
    with pytest.raises(ConfigError, match=rf"{role}=.* is (a|an asynchronous) .*function: calling it does nothing"):
        WeightReceiver(CONFIG, nn.Linear(2, 2), **{role: loader})


def test_a_models_own_loader_is_looked_at_too() -> None:
    with pytest.raises(ConfigError, match=r"OfAModel\.load_weights is a generator function"):
        WeightReceiver(CONFIG, OfAModel(2, 2))


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (later(generator), "generator"),
        (later(coroutine), "coroutine"),
        (later(asynchronous_generator), "async_generator"),
        (lambda weights: map(print, weights), "map"),
        (lambda _: Future(), "Future"),
    ],
    ids=["generator", "coroutine", "asynchronous generator", "map", "future"],
)
def test_what_returns_work_that_is_still_to_be_done_is_refused(result: Callable[..., Any], kind: str) -> None:
    with pytest.raises(TransferError, match=f"returned a {kind}, so it has not done its work"):
        CheckpointFormatLoader(result)([("w", torch.ones(2))])


def test_a_version_is_not_published_if_its_loader_has_not_run() -> None:
    model = nn.Linear(2, 2)
    with (
        WeightReceiver(CONFIG, model, load_weights=later(generator)) as receiver,
        WeightSender(CONFIG, [receiver]) as sender,
    ):
        with pytest.raises(TransferError, match="returned a generator"):
            sender.send(nn.Linear(2, 2))
        assert receiver.version is None


def test_a_hook_after_loading_that_has_not_run_is_refused() -> None:
    loader = CheckpointFormatLoader(lambda _: None, nn.Linear(2, 2), lambda layer: generator([layer]))
    loader.begin(manifest := _manifest())
    with pytest.raises(TransferError, match=r"process_weights_after_loading=.*returned a generator"):
        loader([(param.name, torch.ones(param.shape)) for param in manifest.params])


def _manifest() -> Any:
    from weight_transfer import ModuleSource

    return ModuleSource(nn.Linear(2, 2)).manifest()


kept: list[Any] = []
parameter = nn.Parameter(torch.zeros(2))


def keep_in_parameter(weights: Any) -> None:
    parameter.data = weights[0][1]


@pytest.mark.parametrize(
    "keep",
    [
        kept.append,
        kept.extend,
        lambda weights: kept.append(weights[0][1]),
        lambda weights: kept.append(weights[0][1][:1]),
        lambda weights: kept.append(weights[0][1].numpy()),
        lambda weights: kept.append(weights[0][1].untyped_storage()),
        lambda weights: kept.append(lambda: weights),
        keep_in_parameter,
    ],
    ids=["list", "pairs", "tensor", "view", "numpy", "storage", "closure", "parameter"],
)
def test_loaders_that_keep_a_weight_are_refused(keep: Callable[..., None]) -> None:
    kept.clear()
    with pytest.raises(TransferError, match="has kept 'w'"):
        lend([("w", torch.ones(2))], keep)
    kept.clear()
    parameter.data = torch.zeros(2)


def test_loaders_may_copy_consume_their_list_and_leave_cycles() -> None:
    given = [("a", torch.ones(2)), ("b", torch.ones(3))]

    def load(weights: Any) -> set[str]:
        names = set()
        while weights:
            name, tensor = weights.pop()
            kept.append(tensor.clone())
            names.add(name)
        cycle: list[Any] = [tensor]
        cycle.append(cycle)
        return names

    lend(given, load)
    assert [name for name, _ in given] == ["a", "b"]
    kept.clear()
