"""A tensor that was replaced, moved or laid out anew is seen, on either side, in whatever way it was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import weight_transfer as wt


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 6))
        self.register_buffer("scale", torch.zeros(3))


class Model(nn.Module):
    """Its first layer is looked at before an update begins, the others while bytes move."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.first, self.second = Layer(), Layer()
        self.head = nn.Linear(6, 2)

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.normal_(generator=generator)


def same_bits(one: Model, other: Model) -> bool:
    state, known = one.state_dict(), other.state_dict()
    return state.keys() == known.keys() and all(torch.equal(state[name], known[name]) for name in state)


def data(model: Model) -> None:
    model.first.weight.data = torch.zeros(6, 6)


def transposed(model: Model) -> None:
    model.first.weight.data = model.first.weight.data.t()


def attribute(model: Model) -> None:
    model.first.weight = nn.Parameter(torch.zeros(6, 6))


def table(model: Model) -> None:
    model.first._parameters["weight"] = nn.Parameter(torch.zeros(6, 6))


def buffer(model: Model) -> None:
    model.first._buffers["scale"] = torch.zeros(3)


def assigned(model: Model) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def there_and_back(model: Model) -> None:
    model.to(torch.float64).to(torch.float32)


def registered(model: Model) -> None:
    del model.first.weight
    model.first.register_parameter("weight", nn.Parameter(torch.zeros(6, 6)))


def storage(model: Model) -> None:
    memory = model.first.weight.untyped_storage()
    before, nbytes, taken = memory.data_ptr(), memory.nbytes(), list[torch.Tensor]()
    while memory.data_ptr() == before:  # the allocator gives the same block again, unless somebody has it
        memory.resize_(0)
        taken += (torch.empty(nbytes, dtype=torch.uint8) for _ in range(100))
        memory.resize_(nbytes)


def pointed(model: Model) -> None:
    with torch.no_grad():
        model.first.weight.set_(torch.zeros(6, 6))  # type: ignore[call-overload]


def module(model: Model) -> None:
    model.first = Layer()


def modules_exchanged(model: Model) -> None:
    model.first, model.second = model.second, model.first


def exchanged(model: Model) -> None:
    first, second = model.first._parameters, model.second._parameters
    first["weight"], second["weight"] = second["weight"], first["weight"]


def whole_table(model: Model) -> None:
    model.first._parameters = {"weight": nn.Parameter(torch.zeros(6, 6))}


def trains(model: Model) -> None:
    model.first.weight.requires_grad_(not model.first.weight.requires_grad)


CHANGES = [
    data,
    transposed,
    attribute,
    table,
    buffer,
    assigned,
    there_and_back,
    registered,
    storage,
    pointed,
    module,
    modules_exchanged,
    exchanged,
    whole_table,
    trains,
]


@pytest.fixture(scope="module", params=["ipc", "nccl", "rdma"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Model, Model, wt.WeightSender]]:
    trained, served = Model(), Model()
    config = {"backend": request.param, "timeout": 60}
    with (
        pytest.MonkeyPatch.context() as patch,
        wt.WeightReceiver(config, served) as receiver,
        wt.WeightSender(config, [receiver]) as sender,
    ):
        patch.setattr("weight_transfer.model.looking._FIRST", 1)
        patch.setattr("weight_transfer.model.looking._MOST", 1)
        patch.setattr("weight_transfer.model.looking._CARE", 1)  # no surprise has either side look first for long
        for seed in (1, 2):
            trained.fill(seed)
            sender.send(trained)
        yield trained, served, sender


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", [0, 1], ids=["trainer", "worker"])
def test_what_has_changed_between_updates_is_sent_from_and_into_where_it_is_now(
    pair: tuple[Model, Model, wt.WeightSender], side: int, change: Callable[[Model], None]
) -> None:
    trained, served, sender = pair
    for seed in (3, 4):
        change((trained, served)[side])
        trained.fill(seed)
        sender.send(trained)
        assert same_bits(trained, served)
    trained.fill(5)
    sender.send(trained)
    assert same_bits(trained, served)


SEEN_FIRST = (
    (there_and_back,),  # where the first weight lies
    (assigned, there_and_back, module, modules_exchanged),  # the first layer, and the model's own table
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", [0, 1], ids=["trainer", "worker"])
def test_what_has_changed_is_also_seen_while_bytes_move_and_sent_anew(
    pair: tuple[Model, Model, wt.WeightSender],
    side: int,
    change: Callable[[Model], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who has found nothing new for a while begins with what was read before, and looks while bytes move."""
    trained, served, sender = pair
    monkeypatch.setattr("weight_transfer.session.outgoing.MANY", 0)
    for _ in range(3):
        sender.send(trained)
    caplog.set_level("INFO", "weight_transfer.session.sender")
    for seed in (8, 9, 8):
        change((trained, served)[side])
        trained.fill(seed)
        sender.send(trained)
        assert same_bits(trained, served)
        for _ in range(2):
            sender.send(trained)
    assert ("beginning anew" in caplog.text) is (change not in (*SEEN_FIRST[side], trains))


@pytest.mark.parametrize("side", [0, 1], ids=["trainer", "worker"])
def test_what_a_model_has_let_go_of_is_neither_sent_nor_written_into(
    pair: tuple[Model, Model, wt.WeightSender], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be somebody else's by now."""
    trained, served, sender = pair
    monkeypatch.setattr("weight_transfer.session.outgoing.MANY", 0)
    for _ in range(3):
        sender.send(trained)
    old = (trained, served)[side].head.weight
    (trained, served)[side].head.weight = nn.Parameter(torch.zeros(2, 6))
    held = old.detach().clone()
    trained.fill(10)
    sender.send(trained)
    assert same_bits(trained, served)
    assert torch.equal(old, held)


def test_what_is_tied_and_cut_again_on_both_sides_is_noticed(pair: tuple[Model, Model, wt.WeightSender]) -> None:
    trained, served, sender = pair
    for model in (trained, served):
        model.second.weight = model.first.weight
    trained.fill(6)
    sender.send(trained)
    assert same_bits(trained, served)
    for model in (trained, served):
        model.second.weight = nn.Parameter(torch.zeros(6, 6))
    trained.fill(7)
    sender.send(trained)
    assert not torch.equal(served.first.weight, served.second.weight)
    assert same_bits(trained, served)
