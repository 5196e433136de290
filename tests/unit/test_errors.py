"""Errors are data: they keep their class and their fields wherever they travel."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import attrs
import pytest

from weight_transfer import errors
from weight_transfer.errors import WeightTransferError, error_from_dict, error_to_dict

TRANSFER = {"backend": "ipc", "phase": "update", "version": 7, "peer": "http://127.0.0.1:8001"}
PROVIDER = {"name": "acme", "provider": "acme 1.0 [acme.plugin]", "reason": "no driver"}

# class: (bases, the fields that it carries beside message and cause)
TREE: dict[str, tuple[tuple[type, ...], dict[str, object]]] = {
    "WeightTransferError": ((Exception,), {}),
    "ConfigError": ((errors.WeightTransferError, ValueError), {}),
    "PluginError": ((errors.WeightTransferError,), {}),
    "BackendNotFoundError": (
        (errors.PluginError, LookupError),
        {"name": "acme", "installed": ("ipc", "loopback"), "hint": "Did you mean 'ipc'?"},
    ),
    "BackendConflictError": ((errors.PluginError,), {"name": "acme", "providers": ("a 1 [a]", "b 2 [b]")}),
    "BackendLoadError": ((errors.PluginError, ImportError), PROVIDER),
    "BackendContractError": ((errors.PluginError, TypeError), PROVIDER),
    "BackendVersionError": (
        (errors.PluginError,),
        {"name": "acme", "provider": "acme 1.0 [acme.plugin]", "wanted": (2, 0), "window": "1.0 to 1.0"},
    ),
    "BackendUnavailableError": ((errors.WeightTransferError, RuntimeError), {**PROVIDER, "fix": "Install the driver."}),
    "LifecycleError": ((errors.WeightTransferError, RuntimeError), {"method": "send", "state": "closed"}),
    "TransferError": ((errors.WeightTransferError,), TRANSFER),
    "SessionError": (
        (errors.LifecycleError, errors.TransferError),
        {**TRANSFER, "method": "start_weight_update", "state": "ready"},
    ),
    "HandshakeError": ((errors.TransferError,), TRANSFER),
    "TransferTimeoutError": ((errors.TransferError, TimeoutError), TRANSFER),
    "PeerLostError": ((errors.TransferError, ConnectionError), {**TRANSFER, "permanent": True}),
    "ManifestMismatchError": ((errors.TransferError, ValueError), TRANSFER),
    "IntegrityError": (
        (errors.TransferError, ValueError),
        {**TRANSFER, "param": "layers.0.weight", "expected": "00ff", "got": "ff00"},
    ),
}
ALL = sorted(TREE)


def make(name: str) -> WeightTransferError:
    cls: type[WeightTransferError] = getattr(errors, name)
    return cls(f"A sentence about {name}.", cause="OSError: disk on fire", **TREE[name][1])


def contents(error: WeightTransferError) -> tuple[str, dict[str, object]]:
    return type(error).__name__, attrs.asdict(error)


def test_the_tree_is_the_one_that_the_docstring_draws() -> None:
    found = {
        cls.__name__: cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, WeightTransferError)
    }
    assert {name: cls.__bases__ for name, cls in found.items()} == {name: bases for name, (bases, _) in TREE.items()}
    drawn = {
        word
        for line in (errors.__doc__ or "").splitlines()
        for word in line.replace("(", " ").split()
        if word.endswith("Error")
    }
    assert drawn - {
        "ValueError",
        "LookupError",
        "ImportError",
        "TypeError",
        "RuntimeError",
        "TimeoutError",
        "ConnectionError",
    } == set(TREE)


@pytest.mark.parametrize("name", ALL)
def test_every_error_carries_the_fields_that_are_promised(name: str) -> None:
    fields = {field.name for field in attrs.fields(getattr(errors, name))}
    assert fields == {"message", "cause", *TREE[name][1]}


@pytest.mark.parametrize("name", ALL)
def test_every_error_survives_pickle(name: str) -> None:
    error = make(name)
    again = pickle.loads(pickle.dumps(error))
    assert contents(again) == contents(error)
    assert str(again) == str(error)


@pytest.mark.parametrize("name", ALL)
def test_every_error_survives_a_trip_over_json(name: str) -> None:
    error = make(name)
    again = error_from_dict(json.loads(json.dumps(error_to_dict(error))))
    assert contents(again) == contents(error)
    assert str(again) == str(error)


def test_errors_cross_a_process_pool_with_their_fields_and_their_cause() -> None:
    raising = "raise error from OSError('disk on fire')"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {name: pool.submit(exec, raising, {"error": make(name)}) for name in ALL}
        for name, future in futures.items():
            arrived = future.exception(timeout=30)
            assert isinstance(arrived, WeightTransferError)
            assert contents(arrived) == contents(make(name))
            assert "disk on fire" in str(arrived)


def test_fields_that_are_not_set_do_not_travel() -> None:
    assert error_to_dict(errors.TransferError("It failed.")) == {"type": "TransferError", "message": "It failed."}


def test_an_unknown_type_becomes_a_transfer_error_and_unknown_fields_are_dropped() -> None:
    error = error_from_dict({"type": "QuantumError", "message": "It is in two states.", "spin": 0.5})
    assert contents(error) == contents(errors.TransferError("It is in two states."))


def test_an_answer_without_a_type_or_message_is_still_an_error_with_a_sentence() -> None:
    error = error_from_dict({})
    assert type(error) is errors.TransferError
    assert str(error) == "The other side failed without a message."


def test_a_foreign_exception_travels_as_text_in_the_cause() -> None:
    error = error_from_dict(json.loads(json.dumps(error_to_dict(KeyError("layers.3")))))
    assert type(error) is errors.TransferError
    assert error.cause == "KeyError: 'layers.3'"
    assert "KeyError: 'layers.3'" in str(error)


def test_the_text_of_a_transfer_error_names_its_peer_once() -> None:
    assert str(errors.PeerLostError("It went away.", peer="worker 1")) == "worker 1: It went away."
    assert str(errors.PeerLostError("worker 1 went away.", peer="worker 1")) == "worker 1 went away."


@pytest.mark.parametrize(
    "builtin", [ValueError, LookupError, ImportError, TypeError, RuntimeError, TimeoutError, ConnectionError]
)
def test_whoever_catches_the_builtin_catches_ours(builtin: type[Exception]) -> None:
    ours = [name for name, (bases, _) in TREE.items() if builtin in bases]
    assert ours
    for name in ours:
        with pytest.raises(builtin, match=f"A sentence about {name}"):
            raise make(name)
