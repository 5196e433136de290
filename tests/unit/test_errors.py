"""Errors are data: they keep their class and their fields wherever they travel."""

from __future__ import annotations

import base64
import html
import json
import multiprocessing
import pickle
import re
import textwrap
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer import errors, foreign_text
from weight_transfer.errors import WeightTransferError, embed, error_from_dict, error_to_dict, extract

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
    "ReplacedError": (
        (errors.SessionError,),
        {**TRANSFER, "method": "start_weight_update", "state": "ready", "lease": 9},
    ),
    "StaleCommitError": (
        (errors.LifecycleError, errors.TransferError),
        {**TRANSFER, "method": "finish_weight_update", "state": "ready", "update": "00ff"},
    ),
    "RollbackError": ((errors.TransferError, ValueError), {**TRANSFER, "published": 7}),
    "CommitError": (
        (errors.TransferError,),
        {**TRANSFER, "published": ("http://a:1",), "unpublished": ("http://b:1", "http://c:1")},
    ),
    "HandshakeError": ((errors.TransferError,), TRANSFER),
    "TransferTimeoutError": ((errors.TransferError, TimeoutError), TRANSFER),
    "PeerLostError": ((errors.TransferError, ConnectionError), {**TRANSFER, "permanent": True}),
    "ManifestMismatchError": ((errors.TransferError, ValueError), TRANSFER),
    "WeightsMovedError": ((errors.TransferError,), TRANSFER),
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


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("message", 5),
        ("cause", ["a"]),
        ("peer", 5),
        ("version", True),
        ("version", [1]),
        ("permanent", "yes"),
        ("permanent", 1),
        ("backend", {}),
    ],
)
def test_a_field_whose_value_is_of_another_type_is_dropped(field: str, wrong: object) -> None:
    data = {"type": "PeerLostError", "message": "It is gone.", **TREE["PeerLostError"][1]}
    got, expected = contents(error_from_dict(data | {field: wrong})), contents(errors.PeerLostError(**data_of(data)))
    default = {"message": "The other side failed without a message.", "permanent": False}.get(field)
    assert got == (expected[0], expected[1] | {field: default})
    str(error_from_dict(data | {field: wrong}))


def data_of(data: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in data.items() if key != "type"}


@pytest.mark.parametrize("wrong", [5, None, "acme", ["acme", 5], {"acme": 1}])
def test_a_list_of_something_else_is_dropped(wrong: object) -> None:
    error = error_from_dict({"type": "BackendNotFoundError", "message": "There is none.", "installed": wrong})
    assert contents(error) == contents(errors.BackendNotFoundError("There is none."))


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


# As text, through an RPC that hands on what an exception says.


def wrapped(text: str, width: int, prefix: str = "") -> str:
    """Break a text at a width, wherever that is, as a terminal does, and put something in front of each line."""
    return "\n".join(prefix + text[start : start + width] for start in range(0, len(text), width))


def raised(text: str) -> str:
    """Return the traceback of a worker's error that came while another one was handled."""
    try:
        try:
            raise OSError("{not ours} ~~~^^^~~~")
        except OSError as error:
            raise RuntimeError(text) from error
    except RuntimeError:
        return traceback.format_exc()


def in_body(text: str) -> str:
    return json.dumps({"error": {"message": f"Worker failed: {text}", "type": "InternalServerError", "code": 500}})


RPCS: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: text,
    "quoted": lambda text: repr(RuntimeError(text)),
    "in a JSON body": in_body,
    "in a JSON body in a JSON body": lambda text: in_body(in_body(text)),
    "in an HTML page": lambda text: f"<html><body><p>{html.escape(text)}</p></body></html>",
    "in a JSON body in an HTML page": lambda text: f"<pre>{html.escape(in_body(text))}</pre>",
    "in a traceback": raised,
    "in a traceback in a JSON body": lambda text: in_body(raised(text)),
    "in a log": lambda text: textwrap.indent(raised(text), "(Worker_TP1 pid=123) ERROR {core} [core.py:12] "),
    "wrapped between words": lambda text: textwrap.fill(text, 79, initial_indent="    ", subsequent_indent="    "),
    "wrapped in a box": lambda text: "\n".join(
        f"\u2502 {line:<100} \u2502" for line in wrapped(text, 100).splitlines()
    ),
    "wrapped anywhere in a JSON body": lambda text: in_body(wrapped(text, 61)),
    "wrapped anywhere in a page": lambda text: html.escape(wrapped(text, 61)).replace("\n", "<br/>\n"),
    "wrapped anywhere in a log": lambda text: wrapped(raised(text), 97, "(RayWorker pid=123, ip=10.0.0.7) "),
    "wrapped anywhere in a log in a body": lambda text: in_body(
        wrapped(text, 97, "INFO [core.py] 2026-01-01 00:00:00,0 ")
    ),
    "in colours": lambda text: "".join(f"\x1b[36m{line}\x1b[0m\n" for line in wrapped(text, 80).splitlines()),
}


@pytest.mark.parametrize("rpc", RPCS)
@pytest.mark.parametrize("name", ALL)
def test_every_error_survives_an_rpc_that_hands_on_nothing_but_text(name: str, rpc: str) -> None:
    error = make(name)
    error.message += ' \u00fc {braces} <b>"quotes"</b>\n\\ & {{0}} ~ \U0001f600'
    again = extract(RPCS[rpc](f"worker rank 1: {embed(error)}; see above"))
    assert again is not None
    assert contents(again) == contents(error)


def test_people_read_the_class_and_the_sentence_first() -> None:
    error = errors.PeerLostError("It went away.", peer="worker 1", cause="OSError: gone")
    assert embed(error).startswith(
        "PeerLostError: worker 1: It went away. (cause: OSError: gone) {weight_transfer-error-1-"
    )
    assert embed(KeyError("layers.3")).startswith("KeyError: 'layers.3' {weight_transfer-error-1-")


def test_a_foreign_exception_becomes_a_cause_as_text_too() -> None:
    again = extract(embed(KeyError("layers.3")))
    assert type(again) is errors.TransferError
    assert again.cause == "KeyError: 'layers.3'"


@pytest.mark.parametrize("letter", ["a", "\u00fc", "\U0001f600", "{", "\x00", "\ud800"])
def test_a_text_is_bounded_and_long_sentences_lose_their_middle(letter: str) -> None:
    error = errors.BackendNotFoundError(
        f"It begins. {letter * 100_000} It ends.",
        cause=letter * 50_000,
        name="acme",
        installed=[f"backend {number} {letter * 300}" for number in range(300)],
    )
    text = embed(error)
    assert len(text) <= 8_000
    text.encode()
    again = extract(text)
    assert isinstance(again, errors.BackendNotFoundError)
    assert again.message.startswith("It begin")
    assert again.message.endswith("ends.")
    assert again.name == "acme"
    assert again.installed[0].startswith("backend 0")


def test_a_sentence_of_two_thousand_characters_arrives_as_it_is() -> None:
    error = errors.TransferError("x" * 2_000, cause="y" * 1_000)
    again = extract(embed(error))
    assert again is not None
    assert contents(again) == contents(error)


def test_an_error_that_was_caught_and_raised_anew_hides_the_one_inside() -> None:
    inner = errors.PeerLostError("The line is dead.")
    outer = errors.ManifestMismatchError("It does not fit.", cause=f"RuntimeError: {embed(inner)}")
    text = embed(outer)
    assert text.count("weight_transfer-error-1-") == 1
    again = extract(text)
    assert type(again) is errors.ManifestMismatchError
    assert again.cause == "RuntimeError: PeerLostError: The line is dead."


def test_the_first_error_that_is_complete_is_taken() -> None:
    first, second = (embed(errors.TransferError(f"The {word} one.")) for word in ("first", "second"))
    assert str(extract(f"{first[:-9]}...\nDuring handling:\n{second}")) == "The second one."
    assert str(extract(f"{first}\nDuring handling:\n{second}")) == "The first one."


@pytest.mark.parametrize(
    "text", ["", "It failed.", "{}", "{" * 5_000, "}{" * 5_000, '{"error": {"message": "no"}}', "&#123;"]
)
def test_a_text_without_an_error_has_none(text: str) -> None:
    assert extract(text) is None


def test_what_is_cut_off_or_damaged_is_no_error() -> None:
    text = embed(errors.TransferError("It failed."))
    start = text.index("{")
    for end in range(len(text)):
        assert extract(text[:end]) is None
    for place in range(start, len(text)):
        if text[place] not in "{} ":
            assert extract(text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]) is None


def made_up(data: bytes) -> str:
    """Return what a stranger may write who knows the format."""
    payload = base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    groups = [foreign_text._header(payload), *re.findall(".{1,48}", payload)]
    return "".join(f"{{{group}}}" for group in groups)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"5",
        b"[" * 20_000,
        b'{"a":' * 8_000,
        b'{"type": "TransferError"',
        b'{"version": ' + b"9" * 5_000 + b"}",
    ],
)
def test_what_somebody_made_up_is_no_error(data: bytes) -> None:
    assert extract(made_up(data)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"type": "os.system", "message": "rm"},
        {"type": ["TransferError"], "message": {"a": 1}, "cause": 5},
        {"type": "BackendVersionError", "message": "x", "wanted": "2.0", "window": None},
        {"type": "PeerLostError", "message": "x", "peer": 5, "permanent": "no"},
        {"type": "IntegrityError", "message": "x", "param": [], "__class__": "x", "version": 1e300},
    ],
)
def test_fields_that_somebody_made_up_are_an_error_of_ours_all_the_same(fields: dict[str, object]) -> None:
    error = extract(made_up(json.dumps(fields).encode()))
    assert isinstance(error, WeightTransferError)
    str(error)


VALUES = st.sampled_from(
    [None, True, -1, 2**80, 0.5, "", "PeerLostError", "\ud800", [], ["a"], [1], [[]], {}, {"a": 1}]
)


@settings(deadline=None)
@given(fields=st.dictionaries(st.sampled_from(["type", "message", "cause", "peer", "version", "wanted"]), VALUES))
def test_no_fields_make_anything_else_than_an_error(fields: dict[str, object]) -> None:
    error = extract(made_up(json.dumps(fields).encode()))
    assert isinstance(error, WeightTransferError)
    str(error)


@settings(deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([*"{}\\n\n &<\u2502", "{weight_transfer-error-1-", "0030", "a" * 20, "&#123;", "\x1b["])
    )
)
def test_no_text_makes_anything_raise(parts: list[str]) -> None:
    assert extract("".join(parts)) is None


def test_a_text_of_many_headers_is_looked_at_in_a_moment() -> None:
    text = made_up(b"[" * 40_000)
    assert extract(text[: text.index("}") + 1] * 20_000) is None
