"""One configuration from an object, arguments, the environment, a dict or a file; every mistake is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from weight_transfer import (
    BackendLoadError,
    BackendNotFoundError,
    ConfigError,
    ParallelConfig,
    WeightTransferConfig,
    load_config,
)
from weight_transfer.config.switches import strict, tracing
from weight_transfer_ipc.config import IpcOptions

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str) -> Path:
        path = tmp_path / "sync.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def message_of(call: Callable[[], object], kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    return text


# Where a configuration comes from.


def test_a_toml_file_gives_every_key(write: Write) -> None:
    path = write(
        """
        [weight_transfer]
        backend = "ipc"
        timeout = 120
        init_timeout = 2.5
        bucket_bytes = "64MiB"
        buckets = 3
        is_checkpoint_format = false
        verify = "wire"
        on_worker_failure = "continue"
        observers = ["progress"]
        token = "secret"

        [weight_transfer.ipc]
        export = "stage"
        """
    )
    expected = WeightTransferConfig(
        backend="ipc",
        timeout=120.0,
        init_timeout=2.5,
        bucket_bytes=64 * 2**20,
        buckets=3,
        is_checkpoint_format=False,
        verify="wire",
        on_worker_failure="continue",
        observers=("progress",),
        token="secret",
        options=IpcOptions(export="stage"),
    )
    assert load_config(path) == expected
    assert load_config(str(path)) == expected


def test_a_dict_may_hold_the_table_or_be_the_table() -> None:
    table = {"backend": "ipc", "buckets": 5, "ipc": {"export": "stage"}}
    expected = WeightTransferConfig(backend="ipc", buckets=5, options=IpcOptions(export="stage"))
    assert load_config(table) == expected
    assert load_config({"weight_transfer": table}) == expected


def test_keyword_arguments_alone_are_enough() -> None:
    assert load_config(backend="loopback", timeout=3) == WeightTransferConfig(
        backend="loopback", timeout=3.0, options=None
    )


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "BACKEND": "loopback",
        "TIMEOUT": "7.5",
        "INIT_TIMEOUT": "2",
        "BUCKET_BYTES": "1MiB",
        "BUCKETS": "4",
        "IS_CHECKPOINT_FORMAT": "false",
        "VERIFY": "wire",
        "ON_WORKER_FAILURE": "continue",
        "OBSERVERS": "progress, otel",
        "TOKEN": "12345",
    }.items():
        monkeypatch.setenv(f"WEIGHT_TRANSFER_{name}", text)
    assert load_config() == WeightTransferConfig(
        backend="loopback",
        timeout=7.5,
        init_timeout=2.0,
        bucket_bytes=2**20,
        buckets=4,
        is_checkpoint_format=False,
        verify="wire",
        on_worker_failure="continue",
        observers=("progress", "otel"),
        token="12345",
        options=None,
    )


def test_the_environment_can_name_the_file(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_CONFIG", str(write('[weight_transfer]\nbackend = "loopback"\nbuckets = 9\n')))
    assert load_config().buckets == 9


def test_a_config_passes_through_and_can_be_changed() -> None:
    config = load_config({"backend": "ipc", "ipc": {"export": "stage"}})
    assert load_config(config) == config
    changed = load_config(config, timeout=1)
    assert changed == attrs.evolve(config, timeout=1.0)
    assert changed.options == IpcOptions(export="stage")


def test_a_change_of_backend_drops_the_options_of_the_old_one() -> None:
    config = load_config({"backend": "ipc", "ipc": {"export": "stage"}})
    assert load_config(config, backend="loopback").options is None


def test_a_config_object_with_a_dict_of_options_gets_the_backends_class() -> None:
    assert load_config(WeightTransferConfig(backend="ipc", options={"export": "stage"})).options == IpcOptions(
        export="stage"
    )
    assert load_config(WeightTransferConfig(backend="ipc")).options == IpcOptions(export="adopt")
    assert load_config(backend="ipc", options=IpcOptions(export="stage")).options == IpcOptions(export="stage")


def test_object_beats_argument_beats_environment_beats_file(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    path = write('[weight_transfer]\nbackend = "loopback"\ntimeout = 1\nbuckets = 3\nbucket_bytes = 1024\n')
    monkeypatch.setenv("WEIGHT_TRANSFER_TIMEOUT", "2")
    monkeypatch.setenv("WEIGHT_TRANSFER_BUCKETS", "4")
    config = load_config(path, timeout=3)
    assert (config.timeout, config.buckets, config.bucket_bytes) == (3.0, 4, 1024)
    assert load_config(WeightTransferConfig(backend="loopback", buckets=7)).buckets == 7


def test_the_environment_can_choose_another_backend_than_the_file(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    path = write('[weight_transfer]\nbackend = "loopback"\n[weight_transfer.ipc]\nexport = "stage"\n')
    monkeypatch.setenv("WEIGHT_TRANSFER_BACKEND", "ipc")
    config = load_config(path)
    assert (config.backend, config.options) == ("ipc", IpcOptions(export="stage"))


# Sizes and durations.


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("1kb", 1000),
        ("1KiB", 1024),
        ("256MiB", 256 * 2**20),
        ("1.5 GB", 1_500_000_000),
        (" 2 GiB ", 2 * 2**30),
        ("0.5GiB", 2**29),
    ],
)
def test_sizes_are_bytes_or_text_with_a_unit(given: int | str, nbytes: int) -> None:
    assert load_config(backend="loopback", bucket_bytes=given).bucket_bytes == nbytes


@pytest.mark.parametrize("given", [0, -1, 1.5, True, None, "", "many", "12 parsecs", "-1MiB", "0GB", "1e9", [1]])
def test_wrong_sizes_name_the_key_and_show_good_ones(given: object) -> None:
    text = message_of(lambda: load_config(backend="loopback", bucket_bytes=given))
    assert "bucket_bytes: expected a positive size such as '256MiB'" in text
    assert f"got {given!r}" in text


def test_a_bucket_holds_at_least_256_bytes() -> None:
    assert load_config(backend="loopback", bucket_bytes=256).bucket_bytes == 256
    text = message_of(lambda: load_config(backend="loopback", bucket_bytes=255))
    assert "bucket_bytes must be a whole number of at least 256, got 255" in text


@pytest.mark.parametrize("given", [0, -2.0, True, None, "1", float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["timeout", "init_timeout"])
def test_wrong_durations_name_the_key(key: str, given: object) -> None:
    text = message_of(lambda: load_config(**{"backend": "loopback", key: given}))
    assert f"{key}: expected a positive number of seconds, got {given!r}." in text


# Mistakes.


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"backend": 5}, ["backend: expected text, got 5 (int)"]),
        ({"buckets": "2"}, ["buckets: ", "whole number", "'2'"]),
        ({"link_gbps": 0}, ["link_gbps: expected a positive number of GB/s, got 0."]),
        ({"link_gbps": True}, ["link_gbps", "number", "True"]),
        ({"buckets": 1}, ["buckets must be a whole number of at least 2, got 1"]),
        ({"buckets": True}, ["buckets: ", "whole number", "True"]),
        ({"verify": True}, ["verify: expected one of 'none', 'wire', 'loaded', got True (bool)"]),
        ({"is_checkpoint_format": "yes"}, ["is_checkpoint_format: expected true or false, got 'yes' (str)"]),
        (
            {"on_worker_failure": "contine"},
            ["on_worker_failure: expected one of 'abort', 'continue', got 'contine' (str)"],
        ),
        ({"observers": "progress"}, ["observers: expected a list, got 'progress' (str)"]),
        ({"observers": ["progress", 1]}, ["observers[1]: expected text, got 1 (int)"]),
        ({"token": 5}, ["token: ", "expected text", "5 (int)"]),
        ({"timeout": {"seconds": 5}}, ["timeout: expected a value, got a table"]),
    ],
)
def test_wrong_types_and_values_name_the_key(table: dict[str, Any], words: list[str]) -> None:
    text = message_of(lambda: load_config({"backend": "loopback", **table}))
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"backend": 5}, "backend: expected text, got 5 (int)."),
        ({"verify": True}, "verify: expected one of 'none', 'wire', 'loaded', got True (bool)."),
        ({"is_checkpoint_format": "yes"}, "is_checkpoint_format: expected true or false, got 'yes' (str)."),
        (
            {"on_worker_failure": "contine"},
            "on_worker_failure: expected one of 'abort', 'continue', got 'contine' (str).",
        ),
        ({"observers": "progress"}, "observers: expected a list, got 'progress' (str)."),
        ({"observers": ["progress", 1]}, "observers[1]: expected text, got 1 (int)."),
    ],
)
def test_an_object_made_by_hand_is_checked_like_a_table(wrong: dict[str, Any], words: str) -> None:
    assert words == message_of(lambda: WeightTransferConfig(**{"backend": "loopback", **wrong}))
    assert words in message_of(lambda: load_config({"backend": "loopback", **wrong}))


def test_a_list_of_observers_becomes_a_tuple_in_an_object_made_by_hand() -> None:
    assert WeightTransferConfig(backend="loopback", observers=["progress"]).observers == ("progress",)


def test_where_a_process_stands_is_checked_in_the_same_words() -> None:
    assert message_of(lambda: ParallelConfig(device=5)) == "device: expected text, got 5 (int)."


@pytest.mark.parametrize(
    ("wrong", "right"), [("backed", "backend"), ("time_out", "timeout"), ("bucket_byte", "bucket_bytes")]
)
def test_an_unknown_key_names_the_nearest_one(wrong: str, right: str) -> None:
    text = message_of(lambda: load_config({"backend": "loopback", wrong: 1}))
    assert f"unknown key {wrong!r}; did you mean {right!r}?" in text
    assert text == message_of(lambda: load_config(backend="loopback", **{wrong: 1}))


def test_an_unknown_key_without_a_near_one_lists_all() -> None:
    text = message_of(lambda: load_config({"backend": "loopback", "colour": "red"}))
    assert "unknown key 'colour'; valid keys are backend, timeout, init_timeout, bucket_bytes, buckets" in text


def test_every_wrong_key_is_named_at_once() -> None:
    text = message_of(lambda: load_config({"backend": "loopback", "verify": 1, "bukets": 3}))
    assert "verify: expected one of 'none', 'wire', 'loaded'" in text
    assert "unknown key 'bukets'; did you mean 'buckets'?" in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TIMEOUT", "soon", "'soon'"),
        ("BUCKETS", "two", "'two'"),
        ("IS_CHECKPOINT_FORMAT", "perhaps", "expected true or false, got 'perhaps'"),
    ],
)
def test_a_wrong_environment_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(f"WEIGHT_TRANSFER_{name}", value)
    text = message_of(lambda: load_config(backend="loopback"))
    assert f"environment variable WEIGHT_TRANSFER_{name}: " in text
    assert words in text


def test_no_backend_says_how_to_name_one(write: Write) -> None:
    path = write("[weight_transfer]\ntimeout = 3\n")
    text = message_of(lambda: load_config(path))
    assert str(path) in text
    assert 'no backend is named; set backend, as in backend = "ipc"' in text


def test_a_backend_that_is_not_installed_is_not_found() -> None:
    assert "'lopback'" in message_of(lambda: load_config(backend="lopback"), BackendNotFoundError)


def test_a_source_of_a_wrong_type_says_what_it_may_be() -> None:
    assert "a WeightTransferConfig, a dict or the path of a TOML file, got 5" in message_of(lambda: load_config(5))  # type: ignore[arg-type]
    assert "weight_transfer must be a table of keys and values, got 5" in message_of(
        lambda: load_config({"weight_transfer": 5})
    )


# Files.


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.toml"
    text = message_of(lambda: load_config(path))
    assert str(path) in text
    assert "cannot read the configuration file" in text


@pytest.mark.parametrize("content", [b"[weight_transfer\n", b"backend = ipc\n", b"\xff\xfe\x00"])
def test_an_invalid_file_is_named_with_the_parsers_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sync.toml"
    path.write_bytes(content)
    text = message_of(lambda: load_config(path))
    assert f"{path}: not a valid TOML file. (cause: " in text


def test_a_file_without_the_table_says_what_it_has_instead(write: Write) -> None:
    path = write('[weight-transfer]\nbackend = "ipc"\n')
    assert f"{path}: expected a [weight_transfer] table, found 'weight-transfer'." in message_of(
        lambda: load_config(path)
    )
    path = write("")
    assert f"{path}: expected a [weight_transfer] table, found nothing." in message_of(lambda: load_config(path))


def test_a_wrong_key_in_a_file_names_the_file_and_the_table(write: Write) -> None:
    path = write('[weight_transfer]\nbackend = "loopback"\nbukets = 3\n')
    assert f"{path} [weight_transfer]: unknown key 'bukets'; did you mean 'buckets'?" in message_of(
        lambda: load_config(path)
    )


# The backend's own table.


def test_a_wrong_key_in_the_backends_table_names_the_nearest_one(write: Write) -> None:
    path = write('[weight_transfer]\nbackend = "ipc"\n[weight_transfer.ipc]\nexprot = "stage"\n')
    text = message_of(lambda: load_config(path))
    assert str(path) in text
    assert "table 'ipc': unknown key 'exprot'; did you mean 'export'?" in text


@pytest.mark.parametrize("value", ["stag", 1, None, ["stage"]])
def test_a_wrong_value_in_the_backends_table_lists_the_right_ones(value: object) -> None:
    text = message_of(lambda: load_config({"backend": "ipc", "ipc": {"export": value}}))
    assert f"table 'ipc': export: expected one of 'adopt', 'stage', got {value!r}" in text


def test_options_for_a_backend_that_takes_none_are_an_error() -> None:
    text = message_of(lambda: load_config({"backend": "loopback", "loopback": {"speed": "high"}}))
    assert "backend 'loopback' takes no options, got {'speed': 'high'}" in text


def test_options_of_a_wrong_type_are_an_error() -> None:
    assert "table 'ipc' must be a table of keys and values" in message_of(
        lambda: load_config(backend="ipc", options=object())
    )


def test_tables_of_other_backends_may_stand_in_the_file() -> None:
    config = load_config({"backend": "ipc", "ipc": {}, "loopback": {}, "rdma": {"transport": "rc"}})
    assert config.options == IpcOptions()


def test_an_unknown_table_names_the_nearest_backend() -> None:
    text = message_of(lambda: load_config({"backend": "ipc", "ipcc": {"export": "stage"}}))
    assert "unknown table 'ipcc'; did you mean 'ipc'?" in text


def test_an_unknown_table_without_a_near_one_lists_the_backends() -> None:
    text = message_of(lambda: load_config({"backend": "ipc", "zzz": {}}))
    assert "unknown table 'zzz'; installed backends are " in text
    assert "loopback" in text


def test_an_options_class_that_cannot_be_imported_is_the_plugins_fault(install: Callable[..., Path]) -> None:
    plugin = """
from weight_transfer.plugins.backend import API_VERSION, Backend
from weight_transfer.plugins.hookspecs import hookimpl

@hookimpl
def weight_transfer_backend():
    return Backend(name="acme", api_version=API_VERSION, summary="", worker_engine="a:B", trainer_engine="a:B",
                   options="acme_nowhere:Options")
"""
    install("acme", {"weight_transfer.backends": {"acme": "acme_plugin"}}, {"acme_plugin": plugin})
    text = message_of(lambda: load_config(backend="acme"), BackendLoadError)
    assert "acme 1.0 [acme_plugin]" in text
    assert "cannot import acme_nowhere:Options" in text


# Secrets, and where a process stands.


def test_the_token_is_in_no_repr_and_in_no_message() -> None:
    config = load_config(backend="ipc", token="hunter2")
    assert config.token == "hunter2"
    assert "hunter2" not in repr(config)
    assert "hunter2" not in str(config)
    assert "hunter2" not in message_of(lambda: load_config(config, bukets=3))


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        load_config(backend="loopback").timeout = 3.0  # type: ignore[misc]


def test_a_parallel_config_is_one_process_by_default() -> None:
    parallel = ParallelConfig()
    assert (parallel.rank, parallel.world_size, parallel.device) == (0, 1, None)
    assert ParallelConfig(rank=3, world_size=4).rank == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": -1}, "rank must be a whole number of at least 0, got -1"),
        ({"rank": True}, "rank must be a whole number of at least 0, got True"),
        ({"rank": "0"}, "rank must be a whole number of at least 0, got '0'"),
        ({"rank": 1}, "rank must be below world_size, got rank 1 of 1"),
        ({"rank": 4, "world_size": 4}, "rank must be below world_size, got rank 4 of 4"),
        ({"world_size": 0}, "world_size must be a whole number of at least 1, got 0"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be a whole number of at least 1, got 0"),
        ({"pipeline_parallel_size": 1.5}, "pipeline_parallel_size must be a whole number of at least 1, got 1.5"),
        ({"data_parallel_size": -2}, "data_parallel_size must be a whole number of at least 1, got -2"),
        ({"expert_parallel_size": None}, "expert_parallel_size must be a whole number of at least 1, got None"),
    ],
)
def test_impossible_places_are_refused(fields: dict[str, Any], words: str) -> None:
    assert words in message_of(lambda: ParallelConfig(**fields))


# Environment variables that are not ours.


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("TIMEUOT", "TIMEOUT"), ("VERFIY", "VERIFY"), ("STRCT", "STRICT"), ("TRCE", "TRACE"), ("CONFG", "CONFIG")],
)
def test_a_misspelt_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str, right: str) -> None:
    monkeypatch.setenv(f"WEIGHT_TRANSFER_{wrong}", "1")
    text = message_of(lambda: load_config(backend="loopback"))
    assert text == (f"unknown environment variable 'WEIGHT_TRANSFER_{wrong}'; did you mean 'WEIGHT_TRANSFER_{right}'?")


def test_a_foreign_environment_variable_is_told_and_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_COLOUR", "red")
    assert load_config(backend="loopback").backend == "loopback"
    (record,) = caplog.records
    assert record.getMessage().startswith("environment variable WEIGHT_TRANSFER_COLOUR means nothing here; known are ")
    assert "WEIGHT_TRANSFER_TIMEOUT" in record.getMessage()


def test_what_kubernetes_sets_for_a_service_of_that_name_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8001_TCP", "PORT_8001_TCP_ADDR"):
        monkeypatch.setenv(f"WEIGHT_TRANSFER_{name}", "tcp://10.0.0.1:8001")
        monkeypatch.setenv(f"WEIGHT_TRANSFER_TRAINER_{name}", "tcp://10.0.0.1:8001")
    load_config(backend="loopback")
    assert not caplog.records


@pytest.mark.parametrize(("text", "on"), [("1", True), ("true", True), ("0", False), ("False", False), ("", False)])
def test_switches_are_written_like_other_truth_values(monkeypatch: pytest.MonkeyPatch, text: str, on: bool) -> None:
    for variable, switch in (("STRICT", strict), ("TRACE", tracing)):
        monkeypatch.setenv(f"WEIGHT_TRANSFER_{variable}", text)
        assert switch() is on


def test_a_switch_that_is_neither_on_nor_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_TRACE", "off")
    assert message_of(tracing) == "environment variable WEIGHT_TRANSFER_TRACE: expected true or false, got 'off'."
