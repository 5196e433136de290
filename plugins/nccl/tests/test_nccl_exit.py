"""A process that has closed its sender and its receiver ends at once, and cleanly."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import torch
import weight_transfer as wt

config = {"backend": "nccl", "timeout": 20}
with wt.WeightReceiver(config, torch.nn.Linear(3, 3)) as receiver, wt.WeightSender(config, [receiver]) as sender:
    sender.send(torch.nn.Linear(3, 3))
"""


@pytest.mark.parametrize("attempt", range(3))
def test_the_process_ends_cleanly(attempt: int) -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


ABORTED = """
import sys
import torch
import weight_transfer as wt

config = {"backend": "nccl", "timeout": 20}
receiver, sender = wt.WeightReceiver(config, torch.nn.Linear(3, 3)), None
sender = wt.WeightSender(config, [receiver])
sender.send(torch.nn.Linear(3, 3))
sender._fleet.engines.abort()
sys.exit()
"""


@pytest.mark.parametrize("attempt", range(3))
def test_a_process_that_ends_while_a_group_is_being_aborted_ends_cleanly(attempt: int) -> None:
    ended = subprocess.run([sys.executable, "-c", ABORTED], check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
