"""Which vLLM is known to work, in words, and that nothing that is used of it has disappeared."""

from __future__ import annotations

import pytest

import weight_transfer as wt
from weight_transfer_vllm import compatibility


@pytest.mark.parametrize("installed", ["0.33.0", "0.33.4", "0.33.0rc1", "0.33.1+cpu"])
def test_the_window_is_open_for_what_was_tested(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(compatibility, "version", lambda name: installed)
    compatibility.require_vllm()


@pytest.mark.parametrize(
    ("installed", "advice"),
    [
        ("0.32.9", "upgrade vLLM"),
        ("0.34.0", "upgrade weight-transfer-vllm, or install an older vLLM"),
        ("1.0.0", "upgrade weight-transfer-vllm, or install an older vLLM"),
        ("dev", "upgrade vLLM"),
    ],
)
def test_another_version_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch, installed: str, advice: str) -> None:
    monkeypatch.setattr(compatibility, "version", lambda name: installed)
    with pytest.raises(wt.ConfigError, match=rf"vLLM 0\.33 to 0\.33, and vLLM {installed} is installed; {advice}\."):
        compatibility.require_vllm()


def test_what_is_used_of_vllm_is_there() -> None:
    pytest.importorskip("vllm")
    assert compatibility.missing() == []


def test_what_has_disappeared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"json": ("loads", "gone"), "json:JSONDecoder": ("decode", "lost"), "no.such.module": ("any",)}
    monkeypatch.setattr(compatibility, "USED", used)
    assert compatibility.missing() == ["json.gone", "json:JSONDecoder.lost", "no.such.module"]


def test_every_backend_is_named_to_vllm_and_naming_them_again_does_nothing() -> None:
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from weight_transfer_vllm import register

    register()
    register()
    assert {f"wt_{ref.name}" for ref in wt.backends()} <= set(WeightTransferEngineFactory._registry)
