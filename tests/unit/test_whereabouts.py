"""Whether tensors have changed is seen whatever was done to them; and copies on the host bring every bit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from weight_transfer.copying.host import HostCopies, copy_on_host
from weight_transfer.model.weights import ModuleWeights
from weight_transfer.model.whereabouts import Whereabouts


@pytest.mark.parametrize(
    "change", [lambda t: t.t_(), lambda t: t.unsqueeze_(0), lambda t: t.resize_(2, 2), lambda t: t.set_(t.clone())]
)
def test_a_change_in_place_is_seen(change: Callable[[torch.Tensor], Any]) -> None:
    tensors = [torch.zeros(3, 4), torch.zeros(2)]
    whereabouts = Whereabouts(tensors)
    assert whereabouts.unchanged
    change(tensors[0])
    assert not whereabouts.unchanged


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(
    "change", [lambda t: t.t_(), lambda t: t.set_(t.clone()), lambda t: setattr(t, "data", t.data.clone())]
)
def test_a_change_is_seen_wherever_it_is_among_the_tensors(
    change: Callable[[torch.Tensor], Any], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weight_transfer.model.whereabouts._TOGETHER", 2)
    tensors = [torch.zeros(3, 4) for _ in range(5)]
    whereabouts = Whereabouts(tensors)
    assert whereabouts.unchanged
    change(tensors[number])
    assert not whereabouts.unchanged


@pytest.mark.parametrize("twin", [torch.Tensor.conj, torch.Tensor._neg_view])
def test_values_that_are_not_the_bytes_any_more_are_seen(twin: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = torch.zeros(3, dtype=torch.complex64)
    whereabouts = Whereabouts([tensor])
    tensor.data = twin(tensor.data)
    assert not whereabouts.unchanged


def test_what_says_nothing_of_memory_changes_nothing() -> None:
    weight = nn.Parameter(torch.zeros(3))
    whereabouts = Whereabouts([weight, weight])
    weight.requires_grad_(False)
    assert whereabouts.unchanged
    with torch.inference_mode():
        assert whereabouts.unchanged
    assert Whereabouts([]).unchanged


def popped(table: dict[str, Any], new: nn.Parameter) -> None:
    table.pop("weight")
    table.setdefault("weight", new)


def emptied(table: dict[str, Any], new: nn.Parameter) -> None:
    bias = table.pop("bias")
    table.popitem()
    table.clear()
    table.update(weight=new, bias=bias)


WRITES = [
    lambda table, new: table.__setitem__("weight", new),
    lambda table, new: table.update(weight=new),
    lambda table, new: table.__ior__({"weight": new}),
    popped,
    emptied,
]


@pytest.mark.parametrize("write", WRITES, ids=["set", "updated", "merged", "popped", "emptied"])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_however_a_table_of_a_module_was_written_it_is_seen(
    kind: type, write: Callable[[dict[str, Any], nn.Parameter], None]
) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0]._parameters = kind(module[0]._parameters)
    weights = ModuleWeights(module)
    before = weights.read()
    assert weights.read() is before
    module.eval(), module[0]._parameters.update(module[0]._parameters)  # nothing that a weight is
    assert weights.read() is before
    looks, new = weights.looks, nn.Parameter(before["0.weight"].detach().clone())
    write(module[0]._parameters, new)
    assert not weights.are_unchanged
    assert weights.read()["0.weight"] is new
    assert weights.looks == looks + 1


@pytest.mark.parametrize("hook", ["register_state_dict_post_hook", "register_state_dict_pre_hook"])
def test_a_hook_of_state_dict_is_seen_though_hooks_of_others_were_registered_before(hook: str) -> None:
    module, other = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    weights = ModuleWeights(module)
    before = weights.read()
    for _ in range(2):
        other.register_forward_hook(lambda *_: None)
        assert weights.are_unchanged
        assert weights.read() is before
    getattr(module[0], hook)(lambda *_: None)
    for _ in range(2):
        assert not weights.are_unchanged


@pytest.mark.parametrize("nbytes", [0, 1, 255, 2**18, 3 * 2**20 + 5])
def test_copies_on_the_host_bring_every_bit(nbytes: int) -> None:
    sources = [torch.randint(0, 256, (nbytes,), dtype=torch.uint8) for _ in range(3)]
    flat = torch.zeros(3 * nbytes, dtype=torch.uint8)
    copies = HostCopies(flat.split(nbytes) if nbytes else [flat] * 3, sources)
    for _ in range(2):
        copies.run()
        assert torch.equal(flat, torch.cat(sources))
        for source in sources:
            source.add_(1)
    targets = [torch.zeros_like(source) for source in sources]
    copy_on_host(targets, sources)
    assert all(map(torch.equal, targets, sources))


def test_copies_on_the_host_convert_and_scatter() -> None:
    source, strided = torch.randn(600, 600), torch.zeros(600, 1200)[:, ::2]
    half = torch.zeros(600, 600, dtype=torch.bfloat16)
    for copy in (lambda *pairs: HostCopies(*pairs).run(), copy_on_host):
        half.zero_(), strided.zero_()
        copy([half, strided], [source, source])
        assert torch.equal(half, source.bfloat16())
        assert torch.equal(strided, source)


def test_two_may_copy_at_a_time() -> None:
    sources = [torch.randint(0, 256, (5 * 2**20,), dtype=torch.uint8) for _ in range(4)]
    targets = [torch.zeros_like(source) for source in sources]
    threads = [
        threading.Thread(target=HostCopies([target], [source]).run)
        for target, source in zip(targets, sources, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, targets, sources))
