"""Foreign memory as tensors: what can be checked without a GPU."""

from __future__ import annotations

import ctypes

import torch

from weight_transfer_ipc.device_memory import bytes_at


def test_foreign_memory_is_a_tensor_and_stays_its_owners() -> None:
    memory = (ctypes.c_uint8 * 64)(*range(64))
    view = bytes_at(ctypes.addressof(memory), 64, torch.device("cpu"))[8:24].view(torch.int16)
    assert view.tolist() == torch.arange(8, 24, dtype=torch.uint8).view(torch.int16).tolist()
    memory[8] = 200
    assert view.view(torch.uint8)[0] == 200
    del view
    assert memory[9] == 9
