"""Each write to any of many dictionaries is seen, however it is made; what was read of them is not."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weight_transfer.model import dict_versions
from weight_transfer.model.dict_versions import DictVersions

COUNT = 1500  # more than are asked one by one

READABLE = pytest.mark.skipif(
    sys.implementation.name != "cpython" or sys.version_info[:2] > (3, 12), reason="has no versions that can be read"
)


@pytest.fixture(params=[pytest.param("read", marks=READABLE), "asked"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dict_versions, "_MANY", COUNT if request.param == "read" else COUNT + 1)
    return str(request.param)


def never() -> bool:
    raise AssertionError("nothing was written, so there is nothing to look at")


@READABLE
def test_versions_are_read_where_they_can_be(way: str) -> None:
    versions = DictVersions([{} for _ in range(COUNT)])
    assert isinstance(versions._seen, np.ndarray) is (way == "read")
    assert dict_versions._can_be_read()


class Attributes:
    """Has its attributes in a dictionary."""


def of_an_object() -> dict[str, Any]:
    some = Attributes()
    some.a, some.b = 1, 2  # type: ignore[attr-defined]
    return vars(some)


MAKERS: list[Callable[[], dict[str, Any]]] = [
    lambda: {"a": 1, "b": 2},
    lambda: OrderedDict(a=1, b=2),
    lambda: defaultdict(int, a=1, b=2),
    of_an_object,
]
WRITES: list[Callable[[dict[str, Any]], Any]] = [
    lambda d: d.__setitem__("a", 3),
    lambda d: d.__setitem__("c", 3),
    lambda d: d.setdefault("c", 3),
    lambda d: d.update(a=3),
    lambda d: d.update({}, b=3),
    lambda d: d.update({"a": 3, "d": 4}),
    lambda d: d.__ior__({"a": 4}),
]
REMOVALS: list[Callable[[dict[str, Any]], Any]] = [
    lambda d: d.__delitem__("a"),
    lambda d: d.pop("b"),
    lambda d: d.popitem(),
    lambda d: d.clear(),
]


@pytest.mark.parametrize(("make", "write"), list(product(MAKERS, [*WRITES, *REMOVALS])))
@pytest.mark.parametrize("place", [0, COUNT // 2, COUNT - 1])
def test_each_write_is_seen_wherever_it_is(
    place: int, make: Callable[[], dict[str, Any]], write: Callable[[dict[str, Any]], Any]
) -> None:
    dicts = [make() for _ in range(COUNT)]
    versions = DictVersions(dicts)
    for each in dicts:
        list(each.items()), each.get("a"), "z" in each, len(each), each.copy()
    assert versions.unchanged_or(never)
    write(dicts[place])
    assert not versions.unchanged_or(lambda: False)
    assert not versions.unchanged_or(lambda: False)  # as long as nobody has found that they hold what they held
    assert versions.unchanged_or(lambda: True)
    assert versions.unchanged_or(never)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", [dict, OrderedDict, lambda: defaultdict(int)])
@pytest.mark.parametrize("place", [0, COUNT // 2 - 1])
def test_an_empty_one_that_holds_something_is_a_change_whatever_the_rest_holds(
    place: int, make: Callable[[], dict[str, Any]], write: Callable[[dict[str, Any]], Any]
) -> None:
    dicts, empty = ([make() for _ in range(COUNT // 2)] for _ in range(2))
    versions = DictVersions(dicts, empty)
    assert versions.unchanged_or(never)
    write(empty[place])
    assert not versions.unchanged_or(lambda: True)
    assert not versions.unchanged_or(lambda: True)
    empty[place].clear()
    assert versions.unchanged_or(lambda: True)
    assert versions.unchanged_or(never)


def test_what_is_written_while_somebody_looks_is_looked_at_again() -> None:
    dicts: list[dict[str, Any]] = [{"a": 1} for _ in range(COUNT)]
    versions = DictVersions(dicts)

    def look() -> bool:
        dicts[7]["a"] = 2
        return True

    dicts[3]["a"] = 2
    assert versions.unchanged_or(look)
    assert not versions.unchanged_or(lambda: False)


def test_attributes_of_modules_are_seen_once_the_interpreter_has_specialised_their_writes() -> None:
    modules = [nn.Linear(1, 1) for _ in range(COUNT)]
    versions = DictVersions([vars(module) for module in modules])

    def mark(module: Any, value: object) -> None:
        module.mark = value

    for _ in range(3):
        for module in modules:
            mark(module, _)
        assert not versions.unchanged_or(lambda: False)
        assert versions.unchanged_or(lambda: True)
    mark(modules[-1], "another")
    assert not versions.unchanged_or(lambda: False)


def test_a_deep_copy_sees_writes_to_its_own_dictionaries() -> None:
    dicts: list[dict[str, Any]] = [{"a": 1} for _ in range(COUNT)]
    kept, copied = copy.deepcopy((dicts, DictVersions(dicts)))
    assert copied.unchanged_or(never)
    dicts[3]["a"] = 2
    assert copied.unchanged_or(never)
    kept[3]["a"] = 2
    assert not copied.unchanged_or(lambda: False)


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        FakeTensorMode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu"),
    ],
)
def test_no_mode_of_torch_changes_what_is_seen(mode: Callable[[], Any]) -> None:
    dicts: list[dict[str, Any]] = [{"a": 1} for _ in range(COUNT)]
    with mode():
        versions = DictVersions(dicts)
        assert versions.unchanged_or(never)
    assert versions.unchanged_or(never)
    dicts[COUNT - 1]["a"] = 2
    with mode():
        assert not versions.unchanged_or(lambda: False)
    assert not versions.unchanged_or(lambda: False)
