"""Whatever comes from a file or over the wire, parsing ends soon: with a value, or with an error of ours."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weight_transfer import CheckpointSource, ConfigError, IntegrityError, ManifestMismatchError, load_config
from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
from weight_transfer.config.structuring import brief, structure
from weight_transfer.errors import HandshakeError, TransferError, error_from_dict, error_to_dict
from weight_transfer.model.info import (
    WeightNeeds,
    WeightTransferAbortRequest,
    WeightTransferFinishRequest,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    WireDecoder,
)
from weight_transfer.model.manifest import Manifest, ParamMeta, digest_json, torch_dtype

SOON = 5.0  # seconds, on a busy machine too
LONE = "\ud800"
HUGE = 10**400
TOO_HUGE = 10**5000  # Python refuses to write it
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]

ODD = [
    LONE,
    "é",
    "",
    "a.b",
    HUGE,
    TOO_HUGE,
    -HUGE,
    DEEP,
    float("nan"),
    float("inf"),
    1e300,
    -1,
    True,
    None,
    "x" * 10**5,
]
odd = st.integers(0, len(ODD) - 1).map(lambda number: ODD[number])  # hypothesis would write them
words = st.sampled_from(
    ["names", "dtype_names", "shapes", "aliases", "partial", "digest", "value", "manifest", "timeout"]
)
leaves = odd | st.integers() | st.floats() | st.text(max_size=5) | words
json_like = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(words | st.text(max_size=3) | st.integers() | st.none(), inner, max_size=4)
    ),
    max_leaves=12,
)
tables = st.dictionaries(words | st.text(max_size=3) | st.integers() | st.none(), json_like, max_size=5)
fast = settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def parse(call: Callable[[], Any], *ours: type[Exception]) -> Any:
    """Return a result, or the error, which must be one of ours and fit into a log and into JSON."""
    since = time.monotonic()
    result: Any = None
    try:
        result = call()
    except ours as error:
        result = error
    assert time.monotonic() - since < SOON
    if isinstance(result, ours):
        assert len(str(result)) < 5000
        str(result).encode()
        json.dumps(error_to_dict(result), ensure_ascii=False).encode()
    return result


def fields_of(cls: type[Any]) -> Any:
    """Return a strategy for tables of which some keys are right."""
    known = st.sampled_from([field.name for field in attrs.fields(cls)])
    return st.dictionaries(known | st.text(max_size=3) | st.integers(), json_like, max_size=6)


@pytest.mark.parametrize(
    "cls",
    [
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
        WeightNeeds,
        WeightTransferFinishRequest,
        WeightTransferAbortRequest,
    ],
)
def test_infos(cls: type[Any]) -> None:
    @fast
    @given(fields_of(cls))
    def run(data: dict[Any, Any]) -> None:
        parse(lambda: structure(data, cls, "an info"), ConfigError)

    run()


@fast
@given(fields_of(WeightTransferConfig))
def test_configurations(data: dict[Any, Any]) -> None:
    parse(lambda: load_config({"backend": "loopback", **data}), ConfigError, LookupError)
    parse(lambda: WeightTransferConfig(**{"backend": "b", **{k: v for k, v in data.items() if k in KEYS}}), ConfigError)


KEYS = {field.name for field in attrs.fields(WeightTransferConfig)}


@fast
@given(st.fixed_dictionaries({"names": json_like, "dtype_names": json_like, "shapes": json_like}) | json_like)
def test_manifests(data: Any) -> None:
    parse(lambda: Manifest.from_wire(data), ValueError)


@fast
@given(
    st.lists(leaves | st.sampled_from(["a", "b"]), max_size=3),
    st.sampled_from(["float32", "bfloat16", "_inductor", "nn", "é", LONE]),
    st.lists(leaves | st.integers(0, 2**40), max_size=70),
    tables,
)
def test_manifests_that_are_nearly_right(
    names: list[Any], dtype: str, shape: list[Any], aliases: dict[Any, Any]
) -> None:
    n = len(names)
    data = {"names": names, "dtype_names": [dtype] * n, "shapes": [shape] * n, "aliases": aliases}
    found = parse(lambda: Manifest.from_wire(data), ValueError)
    if isinstance(found, Manifest):
        assert all(param.nbytes < 2**63 for param in found.params)
        json.dumps(found.to_wire(), ensure_ascii=False).encode()


@fast
@given(json_like, json_like)
def test_fields_that_are_sent_once(value: Any, digest: Any) -> None:
    data = {"manifest": {"value": value, "digest": digest}, "layout": value}
    parse(lambda: WireDecoder().decode(data, WeightTransferUpdateInfo), ManifestMismatchError)


headers = st.dictionaries(
    st.text(max_size=3) | st.sampled_from(["__metadata__", "w"]),
    json_like
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "X", 5, None, ["F32"]]),
            "shape": st.lists(st.integers(-1, 2**70), max_size=80) | st.just("ab"),
            "data_offsets": st.lists(st.integers(-1, 2**70) | st.just("0"), max_size=3),
        }
    ),
    max_size=4,
)


def _checkpoint(folder: Path, header: bytes, claimed: int | None = None) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + b"\0" * 16)
    return file


def _json(data: Any) -> bytes:
    try:
        return json.dumps(data).encode()
    except (RecursionError, ValueError, TypeError):
        return b"[" * 1000


@fast
@given(header=headers)
def test_headers_of_safetensors_files(header: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = _checkpoint(tmp_path_factory.getbasetemp(), _json(header))
    parse(lambda: CheckpointSource(file), IntegrityError)


@pytest.mark.parametrize(
    ("header", "claimed"),
    [
        (b"[" * 10**6, None),
        (b'{"w": ' * 10**5, None),
        (b"9" * 10**6, None),
        (b"{}", 2**63),
        (b"{}", 2**64 - 1),
        (b'{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 0]}}' % b",".join([b"2"] * 10**5), None),
        (b'{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 0]}}' % (b"1" * 4000), None),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [1e400, 1e400]}}', None),
        (b'{"\\ud800": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', None),
        (b"\xff\xfe" * 500, None),
        (b"null", None),
        (b'{"w": []}', None),
        (b"", None),
    ],
    ids=range(13),
)
def test_headers_that_ask_for_much(tmp_path: Path, header: bytes, claimed: int | None) -> None:
    found = parse(lambda: CheckpointSource(_checkpoint(tmp_path, header, claimed)), IntegrityError)
    assert isinstance(found, IntegrityError)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "{a=" * 50_000,
        "a." * 50_000 + "a = 1",
        "[" + "a." * 50_000 + "a]",
        "x = {" + "a." * 50_000 + "a = 1}",
        ("a." * 250 + "a = 1\n") * 2000,
        "[weight_transfer]\nbuckets = " + "9" * 5000,
        "x = 1\n" * 300_000,
        '[weight_transfer]\nbackend = "\\ud800"',
        "\ufeff[weight_transfer]",
        "[weight_transfer]\nbackend = 5",
        "weight_transfer = 5",
        "\0",
    ],
    ids=range(13),
)
def test_toml_files_that_ask_for_much(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    assert isinstance(parse(lambda: load_config(file), ConfigError), ConfigError)


@pytest.mark.parametrize("file", [LONE, "\0", "a\nb", "x" * 5000, TOO_HUGE, DEEP[0][0], None, ".."], ids=range(8))
def test_files_that_no_index_can_name(tmp_path: Path, file: Any) -> None:
    _checkpoint(tmp_path, b"{}").rename(tmp_path / "other.safetensors")
    text = str(file) if isinstance(file, str) else "9" * 5000 if isinstance(file, int) else "[" * 10**5
    text = json.dumps(text) if isinstance(file, str) else text
    (tmp_path / CheckpointSource.INDEX).write_text(f'{{"weight_map": {{"w": {text}}}}}')
    assert isinstance(parse(lambda: CheckpointSource(tmp_path), IntegrityError, ConfigError), Exception)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model-1.safetensors")
    found = parse(lambda: CheckpointSource(tmp_path), IntegrityError)
    assert "is no regular file" in str(found)


def test_a_file_without_an_end_is_no_configuration() -> None:
    assert isinstance(parse(lambda: load_config("/dev/zero"), ConfigError), ConfigError)


@fast
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
def test_toml_files(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "config.toml"
    file.write_text("[weight_transfer]\nbackend = 'loopback'\n" + text, encoding="utf-8", errors="replace")
    parse(lambda: load_config(file), ConfigError)


@pytest.mark.parametrize(
    "seconds",
    [1e300, 1e7, float("nan"), float("inf"), -1, -0.0, 0, True, HUGE, TOO_HUGE, "1", None, LONE],
    ids=range(13),
)
@pytest.mark.parametrize("key", ["timeout", "init_timeout"])
def test_seconds_that_no_timer_takes_are_refused(key: str, seconds: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected (a positive number of|at most 1000000) seconds"):
        WeightTransferConfig(backend="b", **{key: seconds})
    for cls, rest in (
        (WeightTransferInitInfo, {"rank_offset": 1, "world_size": 2}),
        (WeightTransferUpdateInfo, {"manifest": Manifest(())}),
    ):
        with pytest.raises(ConfigError, match=r"timeout: expected (a positive|at most)"):
            structure({**rest, "timeout": seconds}, cls, "an info")
    if seconds is not None:
        with pytest.raises(ConfigError, match="timeout: expected a"):
            structure({"manifest": Manifest(()), "timeout": seconds}, WeightNeeds, "an info")


@pytest.mark.parametrize("variable", ["WEIGHT_TRANSFER_TIMEOUT", "WEIGHT_TRANSFER_BUCKETS", "WEIGHT_TRANSFER_CAST"])
@pytest.mark.parametrize("text", ["nan", "inf", "1e300", "9" * 5000, "\udc80", "-1", "=" * 1000])
def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    monkeypatch.setitem(os.environ, variable, text)
    assert isinstance(parse(lambda: load_config(backend="loopback"), ConfigError), ConfigError)


@pytest.mark.parametrize("key", ["bucket_bytes", "buckets"])
@pytest.mark.parametrize(
    "value", [HUGE, TOO_HUGE, "9" * 400, "9" * 5000 + "GB", 2**63, "1" * 18 + "GiB", LONE, "0.5B"], ids=range(8)
)
def test_sizes_that_no_memory_has(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        WeightTransferConfig(backend="b", **{key: value})


def test_counts_are_bounded() -> None:
    with pytest.raises(
        ConfigError, match="rank must be a whole number of at most 2147483647, got a number of 1329 bits"
    ):
        ParallelConfig(rank=HUGE)


def test_many_mistakes_are_told_in_a_few_sentences() -> None:
    data = {f"key{i}": i for i in range(100_000)} | {5: 1, None: 2, LONE: 3}
    found = parse(lambda: structure(data, WeightTransferFinishRequest, "a body"), ConfigError)
    assert str(found).endswith("And so on.")


@pytest.mark.parametrize("name", [LONE, f"layer.{LONE}.weight", 5, None])
def test_names_are_text_that_can_be_written(name: Any) -> None:
    with pytest.raises(ValueError, match="text"):
        ParamMeta(name, "float32", (1,))


@pytest.mark.parametrize("field", ["weight_version", "session"])
def test_versions_are_text_that_can_be_written(field: str) -> None:
    with pytest.raises(ConfigError, match="holds half of a character"):
        structure({field: LONE}, WeightTransferFinishRequest, "a body")


def test_a_dtypes_name_imports_nothing() -> None:
    for name in ("_inductor", "_dynamo", "onnx", "nn", "Tensor"):
        with pytest.raises(ValueError, match="torch has no dtype"):
            torch_dtype(name)
    assert torch_dtype("bfloat16").itemsize == 2


def test_what_is_no_json_has_no_digest() -> None:
    value = {"value": {5: 1, "a": 2}, "digest": digest_json({})}
    with pytest.raises(ManifestMismatchError, match="no JSON data"):
        WireDecoder().decode({"manifest": value}, WeightTransferUpdateInfo)


@pytest.mark.parametrize("kind", [TransferError, HandshakeError, RuntimeError])
def test_errors_can_be_written_whatever_they_say(kind: type[Exception]) -> None:
    data = json.dumps(error_to_dict(kind(f"half {LONE} of a character")), ensure_ascii=False).encode()
    error = error_from_dict(json.loads(data))
    assert "half \\ud800 of a character" in str(error)


@fast
@given(json_like)
def test_any_value_is_shown_briefly(value: Any) -> None:
    text = brief(value)
    text.encode()
    assert len(text) <= 80
