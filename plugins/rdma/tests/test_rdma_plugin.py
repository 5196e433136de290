"""The name is reserved: the backend is found, and says that it cannot run yet."""

from __future__ import annotations

import pytest

import weight_transfer as wt


def test_choosing_rdma_says_that_it_has_no_engine_and_what_to_use_instead() -> None:
    from torch import nn

    config = wt.load_config(backend="rdma")
    with pytest.raises(wt.BackendUnavailableError, match="no engine yet") as caught:
        wt.WeightSender(config, [wt.WeightReceiver(config, nn.Linear(1, 1))]).connect()
    assert "ipc" in caught.value.fix
