"""What the plugin says about itself and this machine, without loading NIXL."""

from __future__ import annotations

import subprocess
import sys

import pytest

import weight_transfer as wt
from weight_transfer_rdma import plugin
from weight_transfer_rdma.config import RdmaOptions


def test_without_a_wheel_the_probe_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    answer = plugin.probe()
    assert not answer.available
    assert "no NIXL wheel" in answer.reason
    assert "pip install nixl-cu12" in answer.fix


def test_on_another_system_the_probe_says_where_nixl_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin.platform, "machine", lambda: "riscv64")
    answer = plugin.probe()
    assert not answer.available
    assert "x86_64 and aarch64" in answer.reason


def test_probing_imports_neither_torch_nor_nixl() -> None:
    code = (
        "import sys; from weight_transfer_rdma.plugin import probe; assert probe().available; "
        "assert not {'torch', 'numpy', 'nixl_cu12', 'nixl_cu13'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_diagnostics_name_the_way_that_was_taken() -> None:
    facts = plugin.weight_transfer_diagnostics()
    assert facts["host memory on this host"].partition(" ")[0] in {"shm", "tcp"}


@pytest.mark.parametrize("table", [{"UCX_TLS": "tcp"}, {"tls": "tcp"}, {"RNDV_THRESH": 8192}])
def test_ucx_options_are_names_without_their_prefix_and_text(table: dict[str, object]) -> None:
    with pytest.raises(wt.ConfigError, match="ucx"):
        wt.load_config(backend="rdma", options={"ucx": table})


def test_loopback_is_the_default_but_for_rdma_devices() -> None:
    from weight_transfer_rdma.nixl import environment

    def variables(**options: str) -> dict[str, str]:
        given = RdmaOptions(**options)  # type: ignore[arg-type]
        return environment(given.transport, given.interface, {"RC_TIMEOUT": "100ms"})

    assert variables()["UCX_NET_DEVICES"] == "lo"
    assert "UCX_NET_DEVICES" not in variables(transport="rdma")
    assert "UCX_NET_DEVICES" not in variables(interface="all")
    assert variables(interface="mlx5_0:1,eth0")["UCX_NET_DEVICES"] == "mlx5_0:1,eth0"
    assert variables()["UCX_RC_TIMEOUT"] == "100ms"
    assert "UCX_TLS" not in variables()
    assert variables(transport="tcp")["UCX_TLS"].startswith("tcp")
