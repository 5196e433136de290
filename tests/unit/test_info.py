"""Init and update infos: typed on both sides, JSON between them, and what is known is not sent again."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest

from weight_transfer import (
    ConfigError,
    Manifest,
    ManifestMismatchError,
    ParamMeta,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from weight_transfer.config.structuring import unstructure
from weight_transfer.model.info import WireDecoder, WireEncoder, sent_once


@attrs.frozen
class Segment:
    id: int
    nbytes: int


@attrs.frozen
class Table:
    segments: tuple[Segment, ...]
    strides: dict[str, tuple[int, ...]]


@attrs.frozen(kw_only=True)
class AcmeInitInfo(WeightTransferInitInfo):
    address: str
    key: bytes = b""


@attrs.frozen(kw_only=True)
class AcmeUpdateInfo(WeightTransferUpdateInfo):
    table: Table = sent_once()
    serial: int = 0


class AcmeWorkerEngine(WeightTransferEngine[AcmeInitInfo, AcmeUpdateInfo]):
    init_info_cls = AcmeInitInfo
    update_info_cls = AcmeUpdateInfo

    def init_transfer_engine(self, init_info: AcmeInitInfo) -> None: ...

    def receive_weights(self, update_info: AcmeUpdateInfo, load_weights: object) -> None: ...

    def shutdown(self) -> None: ...


ENGINE = AcmeWorkerEngine(None, None)  # type: ignore[arg-type]  # parsing needs no config
INIT = {"rank_offset": 1, "world_size": 3, "timeout": 5, "address": "here"}
MANIFEST = Manifest([ParamMeta("a.weight", "bfloat16", (2, 3)), ParamMeta("a.bias", "float32", ())])
TABLE = Table((Segment(1, 4096), Segment(2, 512)), {"0": (1, 2)})
UPDATE = {
    "manifest": MANIFEST.to_wire(),
    "timeout": 5,
    "table": {"segments": [{"id": 1, "nbytes": 4096}], "strides": {}},
}


def update(**fields: Any) -> AcmeUpdateInfo:
    return AcmeUpdateInfo(**{"manifest": MANIFEST, "timeout": 5, "table": TABLE, **fields})


def over_the_wire(data: dict[str, Any]) -> dict[str, Any]:
    again: dict[str, Any] = json.loads(json.dumps(data))
    return again


def deliver(
    encoder: WireEncoder, decoder: WireDecoder, info: AcmeUpdateInfo, known: dict[str, str]
) -> tuple[dict[str, Any], AcmeUpdateInfo]:
    """Bring ``info`` to the other side as sender and receiver do, and return what travelled and what arrived."""
    wire = over_the_wire(encoder.encode(info, known))
    arrived = ENGINE.parse_update_info(decoder.decode(wire, AcmeUpdateInfo))
    decoder.remember(wire, arrived)
    known.update(encoder.digests(info))
    return wire, arrived


# Parsing.


def test_an_init_info_comes_back_from_json_as_it_was() -> None:
    info = AcmeInitInfo(rank_offset=1, world_size=3, timeout=2.5, address="here", key=bytes(range(256)))
    assert ENGINE.parse_init_info(over_the_wire(unstructure(info))) == info


def test_an_update_info_comes_back_from_json_as_it_was() -> None:
    info = update(version="step-7", is_checkpoint_format=False, verify="wire", serial=3)
    assert ENGINE.parse_update_info(over_the_wire(unstructure(info))) == info


@pytest.mark.parametrize("version", [0, 7, "step-7", None])
def test_a_version_is_a_number_or_a_label(version: int | str | None) -> None:
    assert ENGINE.parse_update_info({**UPDATE, "version": version}).version == version


def test_updates_are_in_checkpoint_format_unless_they_say_otherwise() -> None:
    assert ENGINE.parse_update_info(UPDATE).is_checkpoint_format is True
    with pytest.raises(TypeError):
        AcmeUpdateInfo(MANIFEST, 5)  # type: ignore[misc]  # keyword only


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, ["rank_offset: this key is required and missing", "address: this key is required and missing"]),
        ({**INIT, "rank_offset": "1"}, ["rank_offset: expected a whole number, got '1' (str)"]),
        ({**INIT, "world_size": 3.0}, ["world_size: expected a whole number, got 3.0 (float)"]),
        ({**INIT, "rank_offset": True}, ["rank_offset: expected a whole number, got True (bool)"]),
        ({**INIT, "timeout": -1}, ["timeout: expected a positive number of seconds, got -1"]),
        ({**INIT, "timeout": "5"}, ["timeout: expected a positive number of seconds, got '5'"]),
        ({**INIT, "address": None}, ["address: expected text, got None (NoneType)"]),
        ({**INIT, "key": "no base64!"}, ["key: expected base64 text, got 'no base64!' (str)"]),
        ({**INIT, "adress": "there"}, ["unknown key 'adress'; did you mean 'address'?"]),
        ([1, 2], ["must be a table of keys and values, got [1, 2] (list)"]),
        (None, ["must be a table of keys and values, got None (NoneType)"]),
    ],
)
def test_a_wrong_init_info_names_the_engine_and_the_field(data: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^init_info of AcmeWorkerEngine") as caught:
        ENGINE.parse_init_info(data)
    assert type(caught.value) is ConfigError
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        (
            {"table": {"segments": [], "strides": {}, "stride": 1}},
            "",
            "unknown key 'table.stride'; did you mean 'strides'?",
        ),
        (
            {"table": {"segments": [{"id": 1, "nbytes": "big"}], "strides": {}}},
            "table.segments[0].nbytes: ",
            "whole number, got 'big'",
        ),
        ({"table": {"segments": [{"id": 1}], "strides": {}}}, "table.segments[0].nbytes: ", "required and missing"),
        ({"table": {"segments": 5, "strides": {}}}, "table.segments: ", "expected a list, got 5 (int)"),
        ({"table": {"segments": "text", "strides": {}}}, "table.segments: ", "expected a list, got 'text' (str)"),
        (
            {"table": {"segments": [], "strides": {"0": [1, None]}}},
            "table.strides",
            "expected a whole number, got None",
        ),
        ({"table": 5}, "table: ", "expected a table, got 5 (int)"),
        ({"version": 1.5}, "version: ", "expected a whole number or text, got 1.5 (float)"),
        ({"version": True}, "version: ", "expected a whole number or text, got True (bool)"),
        ({"is_checkpoint_format": 1}, "is_checkpoint_format: ", "expected true or false, got 1 (int)"),
        ({"kept": "abc"}, "kept: ", "expected a list, got 'abc' (str)"),
        ({"kept": ["00", 5]}, "kept[1]: ", "expected text, got 5 (int)"),
        ({"verify": "none"}, "verify: ", "expected one of 'wire', 'loaded', got 'none' (str)"),
        ({"manifest": None}, "manifest: ", "exactly the lists names, dtype_names and shapes"),
        ({"manifest": {"names": ["a"]}}, "manifest: ", "exactly the lists names, dtype_names and shapes"),
        ({"manifest": {"names": ["a"], "dtype_names": [], "shapes": [[1]]}}, "manifest: ", "equally long, got 1, 0, 1"),
        (
            {"manifest": {"names": ["a"], "dtype_names": ["float31"], "shapes": [[1]]}},
            "manifest: ",
            "torch has no dtype 'float31'",
        ),
        (
            {"manifest": {"names": ["a"], "dtype_names": ["float32"], "shapes": [[-1]]}},
            "manifest: ",
            "at least 0, got [-1]",
        ),
        (
            {"manifest": {"names": [5], "dtype_names": ["float32"], "shapes": [[1]]}},
            "manifest: ",
            "got 5, 'float32', [1]",
        ),
    ],
)
def test_a_wrong_update_info_names_the_path_to_the_field(fields: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^update_info of AcmeWorkerEngine: ") as caught:
        ENGINE.parse_update_info({**UPDATE, **fields})
    assert type(caught.value) is ConfigError
    assert "\n" not in str(caught.value)
    assert f"AcmeWorkerEngine: {path}" in str(caught.value)
    assert words in str(caught.value)


# What was sent once is not sent again.


def test_the_first_update_carries_everything_and_the_second_only_digests() -> None:
    encoder, decoder, known = WireEncoder(), WireDecoder(), {}
    first, arrived = deliver(encoder, decoder, update(serial=1), known)
    assert "value" in first["manifest"]
    assert "value" in first["table"]
    assert arrived == update(serial=1)
    second, arrived = deliver(encoder, decoder, update(serial=2), known)
    assert set(second["manifest"]) == set(second["table"]) == {"digest"}
    assert arrived == update(serial=2)


def test_a_steady_update_does_not_grow_with_the_number_of_parameters() -> None:
    sizes = []
    for count in (1, 5000):
        manifest = Manifest(ParamMeta(f"layers.{i}.weight", "bfloat16", (64, 16)) for i in range(count))
        encoder, decoder, known = WireEncoder(), WireDecoder(), {}
        wires = [deliver(encoder, decoder, update(manifest=manifest), known)[0] for _ in range(2)]
        sizes.append(len(json.dumps(wires[1])))
    assert sizes[0] == sizes[1] < 512


def test_a_field_that_changed_is_sent_again_and_the_other_is_not() -> None:
    encoder, decoder, known = WireEncoder(), WireDecoder(), {}
    deliver(encoder, decoder, update(), known)
    moved = Table((Segment(3, 4096),), {})
    wire, arrived = deliver(encoder, decoder, update(table=moved), known)
    assert set(wire["manifest"]) == {"digest"}
    assert wire["table"]["value"] == over_the_wire(unstructure(moved))
    assert arrived.table == moved
    wire, arrived = deliver(encoder, decoder, update(), known)  # and back again: only the last one is remembered
    assert "value" in wire["table"]
    assert arrived == update()


def test_an_equal_value_in_a_new_object_is_not_sent_again() -> None:
    encoder, decoder, known = WireEncoder(), WireDecoder(), {}
    deliver(encoder, decoder, update(), known)
    wire, _ = deliver(encoder, decoder, update(manifest=Manifest(MANIFEST.params)), known)
    assert set(wire["manifest"]) == {"digest"}


def test_an_unchanged_field_arrives_as_the_same_object() -> None:
    encoder, decoder, known = WireEncoder(), WireDecoder(), {}
    _, first = deliver(encoder, decoder, update(), known)
    _, second = deliver(encoder, decoder, update(), known)
    assert second.manifest is first.manifest
    assert second.table is first.table


def test_a_worker_that_knows_nothing_is_sent_everything_although_another_knows() -> None:
    encoder = WireEncoder()
    deliver(encoder, WireDecoder(), update(), {})
    wire, arrived = deliver(encoder, WireDecoder(), update(), {})
    assert "value" in wire["manifest"]
    assert arrived == update()


def test_a_digest_that_the_worker_does_not_know_is_refused() -> None:
    encoder = WireEncoder()
    wire = over_the_wire(encoder.encode(update(), encoder.digests(update())))
    with pytest.raises(ManifestMismatchError, match="'manifest' of the update came as a digest that"):
        WireDecoder().decode(wire, AcmeUpdateInfo)


def test_a_digest_of_an_older_value_is_refused() -> None:
    encoder, decoder, known = WireEncoder(), WireDecoder(), {}
    old, _ = deliver(encoder, decoder, update(), known)
    deliver(encoder, decoder, update(table=Table((), {})), known)
    with pytest.raises(ManifestMismatchError, match="'table' of the update"):
        decoder.decode({**old, "table": {"digest": old["table"]["digest"]}}, AcmeUpdateInfo)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda wire: wire["manifest"]["value"]["shapes"][0].reverse(),
        lambda wire: wire["manifest"]["value"]["names"].__setitem__(0, "b.weight"),
        lambda wire: wire["manifest"].__setitem__("digest", "0" * 32),
    ],
)
def test_a_value_that_is_not_the_one_of_its_digest_is_refused(tamper: Any) -> None:
    wire = over_the_wire(WireEncoder().encode(update(), {}))
    assert WireDecoder().decode(wire, AcmeUpdateInfo)["manifest"] == MANIFEST.to_wire()
    tamper(wire)
    with pytest.raises(ManifestMismatchError, match="'manifest' of the update does not have the digest it came with"):
        WireDecoder().decode(wire, AcmeUpdateInfo)


def test_plain_values_without_digests_pass_through() -> None:
    assert WireDecoder().decode(UPDATE, AcmeUpdateInfo) == UPDATE


def test_decoding_changes_nothing_in_what_it_is_given() -> None:
    wire = over_the_wire(WireEncoder().encode(update(), {}))
    before = over_the_wire(wire)
    WireDecoder().decode(wire, AcmeUpdateInfo)
    assert wire == before
