"""Where weights come from: a live module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor

from weight_transfer import ConfigError, ModuleSource, WeightSource
from weight_transfer.model.looking import Confidence
from weight_transfer.model.source import as_source
from weight_transfer.session.guarded import GuardedSource


class Tied(nn.Module):
    """A little language model: tied embeddings, a persistent buffer, and two that are not to be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("rotary", torch.ones(5), persistent=False)
        self.inner = nn.Module()
        self.inner.register_buffer("mask", torch.ones(2), persistent=False)
        self.inner.register_buffer("absent", None)


SENT = [
    "embed.weight",
    "norm.weight",
    "norm.bias",
    "scale",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
]


def names_of(source: WeightSource) -> list[str]:
    return [param.name for param in source.manifest().params]


# A module.


def test_tied_weights_are_sent_once_and_transient_buffers_not_at_all() -> None:
    source = ModuleSource(Tied())
    assert names_of(source) == SENT
    assert [name for name, _ in source] == SENT


def test_every_name_is_one_of_the_state_dict() -> None:
    module = Tied()
    assert set(module.state_dict()) - set(names_of(ModuleSource(module))) == {"head.weight"}  # tied to embed.weight


def test_the_manifest_and_the_tensors_agree() -> None:
    source = ModuleSource(Tied())
    for meta, (name, tensor) in zip(source.manifest().params, source, strict=True):
        assert (meta.name, meta.shape) == (name, tensor.shape)
        assert meta.nbytes == tensor.numel() * tensor.element_size()
        assert not tensor.requires_grad


def test_the_tensors_are_the_modules_own_and_follow_its_training() -> None:
    module = Tied()
    source = ModuleSource(module)
    manifest = source.manifest()
    before = dict(source)["embed.weight"].clone()
    with torch.no_grad():
        module.head.weight.add_(1)
    assert source.manifest() is manifest
    after = dict(source)["embed.weight"]
    assert torch.equal(after, before + 1)
    assert after.data_ptr() == module.embed.weight.data_ptr()
    assert source.resident()["embed.weight"] is module.embed.weight


def test_the_manifest_is_the_same_object_while_nothing_changed() -> None:
    source = ModuleSource(Tied())
    first = source.manifest()
    dict(source)
    assert source.manifest() is first


def test_a_replaced_parameter_is_noticed() -> None:
    module = Tied()
    source = ModuleSource(module)
    first = source.manifest()
    module.scale = torch.full((3,), 2, dtype=torch.bfloat16)  # same shape and dtype, another tensor
    assert source.manifest() is first
    assert dict(source)["scale"] is not None
    assert dict(source)["scale"].data_ptr() == module.scale.data_ptr()
    module.norm.weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    second = source.manifest()
    assert second.digest != first.digest
    assert second.by_name["norm.weight"].dtype == "bfloat16"
    assert dict(source)["norm.weight"].dtype is torch.bfloat16


def test_a_weight_beside_a_single_one_and_another_order_are_noticed() -> None:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.ones(2)))
    source = ModuleSource(module)
    assert list(source.manifest().by_name) == ["weight"]
    module.register_parameter("scale", nn.Parameter(torch.ones(2)))
    assert list(source.manifest().by_name) == ["weight", "scale"]
    weight = module.weight
    del module.weight
    module.register_parameter("weight", weight)
    assert list(source.manifest().by_name) == ["scale", "weight"]


def test_what_was_read_before_is_recalled_after_a_while_and_looked_at_later() -> None:
    module = Tied()
    source = ModuleSource(module)
    for _ in range(3):
        first = source.manifest()
    known = source.resident()
    source.recall(True)
    module.scale = torch.full((3,), 2, dtype=torch.bfloat16)
    assert source.manifest() is first
    assert source.resident() is known
    assert not source.confirm()
    assert source.confirm()  # it is asked once
    source.recall(True)
    assert source.manifest() is first
    assert source.resident()["scale"] is module.scale
    assert source.confirm()


def test_what_lies_elsewhere_is_never_recalled() -> None:
    module = Tied()
    source = ModuleSource(module)
    for _ in range(3):
        source.manifest()
    known = source.resident()
    source.recall(True)
    module.norm.weight.data = torch.ones(4)
    source.manifest()
    assert source.resident() is not known
    assert source.resident()["norm.weight"].data_ptr() == module.norm.weight.data_ptr()
    assert source.confirm()


def test_what_is_recalled_blindly_is_looked_at_before_anybody_reads_or_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("weight_transfer.model.looking._FIRST", 1)
    monkeypatch.setattr("weight_transfer.model.looking._CARE", 1)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    source = ModuleSource(module)

    def recall() -> None:
        source.recall(False)
        for _ in range(3):
            source.manifest()
        source.recall(True, blindly=True)

    recall()
    known, manifest = source.resident(), source.manifest()
    module[2].weight.data = torch.ones(2, 2)
    assert source.manifest() is manifest
    assert source.resident() is known
    assert not source.is_unmoved()
    assert source.confirm()  # there is nothing left to confirm: it was said
    recall()
    assert source.is_unmoved()
    assert source.confirm()
    recall()
    module[2].weight.data = torch.ones(2, 2)
    source.manifest()
    assert not source.confirm()
    recall()
    module[0].weight.data = torch.ones(2, 2)  # the first one, which is looked at
    source.manifest()
    assert source.resident()["0.weight"].data_ptr() == module[0].weight.data_ptr()
    assert source.is_unmoved()
    assert source.confirm()


def test_a_deep_copy_of_a_source_speaks_of_its_own_module() -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(600)))
    source = ModuleSource(module)
    for _ in range(3):
        source.manifest()
    copied = copy.deepcopy(source)
    copied.module[0].weight = nn.Parameter(torch.ones(2, 2))
    copied.recall(True, blindly=True)
    copied.manifest()
    assert copied.resident()["0.weight"] is copied.module[0].weight
    assert copied.confirm()
    assert source.resident()["0.weight"] is module[0].weight


def test_a_look_goes_on_bit_by_bit_until_it_is_over_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.model.looking._FIRST", 1)
    monkeypatch.setattr("weight_transfer.model.looking._MOST", 1)
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    source = ModuleSource(module)
    for _ in range(3):
        source.manifest()
    source.recall(True, blindly=True)
    source.manifest()
    assert [source.look_on() for _ in range(5)] == [False, False, False, True, True]
    assert source.confirm()
    source.recall(True, blindly=True)
    source.manifest()
    module[3].bias.data = torch.ones(2)
    assert [source.look_on() for _ in range(4)] == [False] * 4
    assert not source.confirm()


def test_each_surprise_makes_a_source_look_first_for_longer() -> None:
    confidence = Confidence()
    looks = []
    for _ in range(3):
        count = 0
        while not confidence.suffices:
            confidence.learn(unchanged=True)
            count += 1
        looks.append(count)
        confidence.learn(unchanged=False, was_surprised=True)
    assert looks == [2, 16, 128]


def test_an_untied_weight_is_sent_from_then_on() -> None:
    module = Tied()
    source = ModuleSource(module)
    source.manifest()
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())
    assert set(names_of(source)) == {*SENT, "head.weight"}


def test_names_can_be_changed_on_the_way() -> None:
    wrapped = nn.Sequential(nn.Linear(2, 2))
    source = ModuleSource(wrapped, rename=lambda name: name.replace("0.", "model.", 1))
    assert names_of(source) == ["model.weight", "model.bias"]
    assert list(source.resident()) == ["model.weight", "model.bias"]
    assert dict(source)["model.bias"].data_ptr() == wrapped[0].bias.data_ptr()


def test_two_parameters_cannot_be_given_one_name() -> None:
    source = ModuleSource(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), rename=lambda name: name.partition(".")[2])
    with pytest.raises(ConfigError, match="rename gives several parameters the name 'weight'"):
        source.manifest()


def test_sharded_parameters_are_gathered_one_at_a_time_and_are_not_resident() -> None:
    gathered: list[str] = []

    class Sharded(nn.Parameter):
        """What FSDP2 makes of a parameter, as far as a source can tell: something with ``full_tensor``."""

        def full_tensor(self) -> torch.Tensor:
            gathered.append("weight")
            return self.detach().clone()

    module = nn.Linear(3, 2)
    module.weight = Sharded(module.weight.detach().clone())
    source = ModuleSource(module)
    source.manifest()
    assert source.collective
    assert list(source.resident()) == ["bias"]
    assert gathered == []
    stream = iter(source)
    name, tensor = next(stream)
    assert (name, gathered) == ("weight", ["weight"])
    assert type(tensor) is torch.Tensor
    assert torch.equal(tensor, module.weight.detach())
    assert [name for name, _ in stream] == ["bias"]


def test_a_plain_module_runs_no_collectives() -> None:
    source = ModuleSource(nn.Linear(2, 2))
    source.manifest()
    assert not source.collective


def test_what_can_be_sent_is_a_module_or_a_source() -> None:
    module = nn.Linear(2, 2)
    source = as_source(module)
    assert isinstance(source, ModuleSource)
    assert source.module is module
    assert as_source(source) is source
    with pytest.raises(ConfigError, match=r"must be an nn\.Module or a WeightSource, got dict"):
        as_source(dict(module.state_dict()))  # type: ignore[arg-type]


def test_a_name_can_be_dropped_on_the_way() -> None:
    source = ModuleSource(Tied(), rename=lambda name: None if name.startswith("norm.") else name)
    assert names_of(source) == ["embed.weight", "scale"]
    assert source.manifest().aliases == {"head.weight": "embed.weight"}


def test_a_rename_that_gives_no_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="rename must give a name or None, and gave 3 for 'weight'"):
        ModuleSource(nn.Linear(2, 2), rename=lambda name: 3).manifest()  # type: ignore[arg-type,return-value]


def test_what_is_tied_is_told_under_its_new_name_or_dropped_as_a_whole() -> None:
    prefixed = ModuleSource(Tied(), rename=lambda name: f"model.{name}")
    assert prefixed.manifest().aliases == {"model.head.weight": "model.embed.weight"}
    assert ModuleSource(Tied(), ignore=["head.*"]).manifest().aliases == {}
    with pytest.raises(ConfigError, match=r"rename drops 'embed.weight', but not 'head.weight', which is tied to it"):
        ModuleSource(Tied(), rename=lambda name: None if name == "embed.weight" else name).manifest()
    with pytest.raises(ConfigError, match="rename gives several parameters the name 'scale'"):
        ModuleSource(Tied(), rename=lambda name: "scale" if name == "head.weight" else name).manifest()


def test_parameters_over_the_same_memory_are_sent_once() -> None:
    module = nn.Linear(3, 3)
    module.twin = nn.Parameter(module.weight.data)
    source = ModuleSource(module)
    assert names_of(source) == ["weight", "bias"] or names_of(source) == ["twin", "bias"]
    assert len(source.manifest().aliases) == 1
    module.twin.data = module.weight.data.clone()
    assert set(names_of(source)) == {"weight", "bias", "twin"}


# Wrappers.


class Compiled(nn.Module):
    """What ``torch.compile`` makes of a module, as far as names tell."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class DistributedDataParallel(nn.Module):
    """The real one needs a process group; a class of this name among the bases is what counts."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Policy(nn.Module):
    """Holds wrapped parts."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([wrap(nn.Linear(2, 2)), nn.Linear(2, 2)])
        self.head = wrap(nn.Linear(2, 3))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compilation": Compiled,
    "activation checkpointing": checkpoint_wrapper,
    "data parallelism": DistributedDataParallel,
    "both": lambda module: Compiled(checkpoint_wrapper(DistributedDataParallel(module))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_the_names_of_wrappers_come_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = names_of(ModuleSource(Policy(nn.Identity)))
    bare = names_of(ModuleSource(Policy(lambda module: module)))
    assert plain == ["layers.1.weight", "layers.1.bias"]
    assert names_of(ModuleSource(Policy(wrap))) == bare
    assert names_of(ModuleSource(wrap(Policy(wrap)))) == bare
    assert [name for name, _ in sent(wrap(Policy(wrap)))] == bare


def sent(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    source = ModuleSource(module)
    source.manifest()
    return list(source)


def test_a_part_of_the_model_that_is_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.other = nn.Linear(2, 2)
    assert names_of(ModuleSource(model)) == ["module.weight", "module.bias", "other.weight", "other.bias"]


def test_two_weights_that_wrappers_alone_tell_apart_are_refused() -> None:
    model = nn.Linear(2, 2)
    model._orig_mod = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Without the names of wrappers two weights are called 'weight'"):
        ModuleSource(model).manifest()


# All of it, or a refusal.


def test_a_script_is_sent_and_followed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    source = ModuleSource(script)
    names = names_of(source)
    assert set(names) == set(script.state_dict())
    with torch.no_grad():
        script.state_dict()["0.weight"].fill_(3)
    source.manifest()
    assert torch.equal(dict(source)["0.weight"], torch.full((2, 2), 3.0))


class Saving(nn.Module):
    """Adds something of its own to its ``state_dict()``."""

    def __init__(self, extra: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = extra

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.extra


def test_a_tensor_that_only_the_state_dict_has_is_sent_and_read_anew_each_time() -> None:
    inner = Saving(torch.zeros(3))
    source = ModuleSource(nn.Sequential(inner))
    assert names_of(source) == ["0.weight", "0.scale"]
    assert list(source.resident()) == ["0.weight"]
    assert not source.collective
    manifest = source.manifest()
    inner.extra = torch.ones(3)
    assert source.manifest() is manifest
    assert torch.equal(dict(source)["0.scale"], torch.ones(3))


def test_what_to_ignore_is_a_list() -> None:
    with pytest.raises(ConfigError, match=r"ignore: expected a list of patterns .* got '\*\.weight'"):
        ModuleSource(nn.Linear(2, 2), ignore="*.weight")


@pytest.mark.parametrize("extra", [{"amax": 1.0}, b"bytes", 3])
def test_state_that_is_no_tensor_is_refused_by_name_unless_it_is_ignored(extra: object) -> None:
    module = nn.Sequential(Saving(extra))
    with pytest.raises(ConfigError, match=rf"State '0.scale' is a {type(extra).__name__}, not a tensor.*ignore="):
        ModuleSource(module).manifest()
    assert names_of(ModuleSource(module, ignore=["*.scale"])) == ["0.weight"]


def test_extra_state_of_none_is_nothing() -> None:
    assert names_of(ModuleSource(Saving(None))) == ["weight"]


def test_what_a_hook_puts_in_the_place_of_a_weight_is_not_sent_for_it() -> None:
    module = nn.Linear(2, 2)
    module.register_state_dict_post_hook(lambda _, state, *__: state.update(weight=torch.zeros(2, 2)))
    source = ModuleSource(module)
    assert names_of(source) == ["weight", "bias"]
    assert dict(source)["weight"].data_ptr() == module.weight.data_ptr()


class FlatParameter(nn.Parameter):
    """FSDP1's."""


def freed() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.untyped_storage().resize_(0)
    return parameter


BODILESS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "meta": (lambda: nn.Parameter(torch.ones(2, 2, device="meta")), "lies on the meta device and has no bytes"),
    "lazy": (lambda: nn.LazyLinear(2).weight, "has no shape yet"),
    "fake": (lambda: nn.Parameter(FakeTensorMode().from_tensor(torch.ones(2, 2))), "lies on the meta device"),
    "sparse": (lambda: nn.Parameter(torch.ones(2, 2).to_sparse()), "is a sparse_coo tensor"),
    "quantised": (
        lambda: nn.Parameter(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), requires_grad=False),
        "is a quantised tensor",
    ),
    "nested": (
        lambda: nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged)),
        "is a jagged tensor",
    ),
    "two": (lambda: nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2))), "is a TwoTensor tensor"),
    "flat": (lambda: FlatParameter(torch.ones(2, 2)), "is a flat parameter of FSDP1"),
    "freed": (freed, "has 0 bytes of memory and needs 16"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "words"), BODILESS.values(), ids=BODILESS.keys())
def test_a_weight_without_bytes_of_its_own_is_refused_by_name(make: Callable[[], torch.Tensor], words: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].weight = make()
    with pytest.raises(ConfigError, match=f"Weight '0.weight' {words}"):
        ModuleSource(module).manifest()


def test_a_weight_that_is_freed_after_an_update_is_refused_by_name() -> None:
    module = nn.Linear(2, 2)
    source = ModuleSource(module)
    source.manifest()
    module.weight.untyped_storage().resize_(0)
    with pytest.raises(ConfigError, match="Weight 'weight' has 0 bytes of memory and needs 16"):
        source.manifest()
    module.weight.untyped_storage().resize_(16)
    module.weight.data.fill_(2)
    source.manifest()
    assert torch.equal(dict(source)["weight"], torch.full((2, 2), 2.0))


def test_a_module_that_contains_itself_is_walked_once() -> None:
    module = nn.Linear(2, 2)
    module.inner = nn.Linear(2, 2)
    module.inner._modules["back"] = module
    assert names_of(ModuleSource(module)) == ["weight", "bias", "inner.weight", "inner.bias"]


def test_a_source_shows_what_it_is() -> None:
    assert repr(ModuleSource(nn.Linear(2, 2))) == "ModuleSource(Linear)"


class Halving:
    """Iterates otherwise than the source that it is mixed into."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(16)
        for name, tensor in super().__iter__():  # type: ignore[misc]
            half = buffer[: tensor.numel()].view(tensor.shape)
            yield name, half.copy_(tensor / 2)


class HalvedModule(Halving, ModuleSource):
    """Inherits everything else from a source whose tensors stay where they are."""


def test_a_subclass_that_yields_something_else_has_nothing_resident() -> None:
    """Otherwise a backend that reads resident tensors would send those of the base class."""
    module = nn.Linear(3, 3)
    source = HalvedModule(module)
    manifest = source.manifest()
    assert not source.resident()
    assert source.reuses_memory
    assert [name for name, _ in source] == [param.name for param in manifest.params]
    for name, half in source.stream({"weight"}):
        assert torch.equal(half, module.get_parameter(name) / 2)
    for name, half in source.cast({"weight": torch.bfloat16, "bias": torch.bfloat16}):
        assert torch.equal(half, (module.get_parameter(name) / 2).bfloat16())
    assert ModuleSource(module).reuses_memory is False


class Halves(nn.Module):
    """Its second child is empty at first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Module(), nn.Module()
        self.other.weight = nn.Parameter(torch.zeros(2, 2))
        self.register_buffer("scale", torch.zeros(3), persistent=False)


def _move(module: Halves) -> None:
    del module.other.weight
    module.one.weight = nn.Parameter(torch.ones(2, 2))


def _keep(module: Halves) -> None:
    module.register_buffer("scale", module.scale)


def _hook(module: Halves) -> None:
    module.register_state_dict_post_hook(lambda _, saved, prefix, __: saved.update({prefix + "late": torch.ones(1)}))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_move, {"one.weight"}),
        (_keep, {"other.weight", "scale"}),
        (_hook, {"other.weight", "late"}),
    ],
    ids=["moved to an empty child", "persistent from now on", "saved by a hook from now on"],
)
def test_what_counts_as_a_weight_is_looked_at_anew(change: Callable[[Halves], None], names: set[str]) -> None:
    module = Halves()
    source = ModuleSource(module)
    assert set(source.manifest().by_name) == {"other.weight"}
    change(module)
    assert set(source.manifest().by_name) == names
    assert {name for name, _ in source} == names


def test_a_tied_weight_that_is_turned_in_place_is_another_one() -> None:
    module = nn.Module()
    module.embed = nn.Parameter(torch.arange(4.0).view(2, 2))
    module.head = nn.Parameter(module.embed.data)
    source = ModuleSource(module)
    assert source.manifest().aliases == {"head": "embed"}
    module.head.data = module.head.data.t()
    assert not source.manifest().aliases
    assert {name: tensor.tolist() for name, tensor in source} == {
        "embed": [[0.0, 1.0], [2.0, 3.0]],
        "head": [[0.0, 2.0], [1.0, 3.0]],
    }


def test_a_conjugate_view_is_sent_by_its_values_and_is_not_resident() -> None:
    """Its bytes are those of the tensor of which it is a view."""
    module = nn.Module()
    module.phase = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    source = ModuleSource(module)
    source.manifest()
    assert set(source.resident()) == {"phase"}
    module.phase.data = module.phase.data.conj()
    manifest = source.manifest()
    assert not source.resident()
    ((_, sent),) = GuardedSource(source, manifest)
    assert not sent.is_conj()
    assert sent.tolist() == [1 - 2j, 3 + 1j]
    module.phase.data = module.phase.data.conj()
    source.manifest()
    assert set(source.resident()) == {"phase"}
