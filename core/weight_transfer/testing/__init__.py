"""For authors of backends: the conformance kit, and the in-memory reference backend ``loopback``.

    from weight_transfer.testing import BackendConformance

    class TestAcme(BackendConformance):
        backend = "acme"

The kit needs the extra ``testing``; nothing of it is imported before `BackendConformance` is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weight_transfer.testing.conformance import BackendConformance as BackendConformance

__all__ = ["BackendConformance"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import hypothesis  # noqa: F401  (asked for here, so that its absence has one clear sentence)
        import pytest

        import weight_transfer.control.http_server  # noqa: F401
    except ImportError as error:
        raise ImportError("The conformance kit needs its extra: pip install 'weight-transfer[testing]'") from error
    pytest.register_assert_rewrite("weight_transfer.testing.conformance")
    from weight_transfer.testing.conformance import BackendConformance

    return BackendConformance
