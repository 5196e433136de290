"""What the conformance kit promises to authors about itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from weight_transfer.testing import BackendConformance

TESTS = {name: test for name, test in inspect.getmembers(BackendConformance) if name.startswith("test_")}


@pytest.mark.parametrize("name", TESTS)
def test_every_test_of_the_kit_says_what_to_do_if_it_fails(name: str) -> None:
    promise, separator, advice = (inspect.getdoc(TESTS[name]) or "").rpartition("If this fails: ")
    assert promise.strip() and separator
    assert advice.strip().endswith(".")


def _override(self: BackendConformance) -> None: ...


@pytest.mark.parametrize("value", [_override, None, pytest.mark.skip(_override)], ids=["test", "None", "no reason"])
def test_a_test_of_the_kit_cannot_be_overridden_silently(value: Callable[..., None] | None) -> None:
    name = "test_nothing_is_unpickled"
    with pytest.raises(TypeError, match=f"TestMine overrides {name} silently"):
        type("TestMine", (BackendConformance,), {"backend": "loopback", name: value})


def test_a_mixin_cannot_override_a_test_silently_either() -> None:
    mixin = type("Mixin", (), {"test_nothing_is_unpickled": _override})
    with pytest.raises(TypeError, match="Mixin overrides test_nothing_is_unpickled silently"):
        type("TestMine", (mixin, BackendConformance), {"backend": "loopback"})


@pytest.mark.parametrize("mark", [pytest.mark.xfail(reason="no card yet"), pytest.mark.skip(reason="no card yet")])
def test_a_marked_override_is_welcome_and_so_are_further_tests(mark: pytest.MarkDecorator) -> None:
    def own(self: BackendConformance) -> None: ...

    def test_nothing_is_unpickled(self: BackendConformance) -> None: ...

    more = {"test_nothing_is_unpickled": mark(test_nothing_is_unpickled), "test_of_my_own": own}
    type("TestMine", (BackendConformance,), {"backend": "loopback", **more})
