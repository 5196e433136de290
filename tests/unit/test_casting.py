"""Weights travel in the dtypes that patterns declare, with the bits of ``tensor.to``; everything else is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from weight_transfer.testing.models import randomise


class Model(nn.Module):
    """Masters in fp32, with a router, a half precision weight, and weights that are no floats."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 8, dtype=dtype), "router": nn.Linear(8, 4, bias=False)}) for _ in range(2)
        )
        self.fp16 = nn.Parameter(torch.zeros(3, dtype=torch.float16))
        self.empty = nn.Parameter(torch.zeros(0, 2, dtype=dtype))
        self.turned = nn.Parameter(torch.zeros(4, 6, dtype=dtype).t())
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))


MIXED = {"*": "bfloat16", "*.router.*": "float32"}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
    )


def test_each_weight_has_the_dtype_of_the_last_pattern_that_matches_and_the_bits_of_to() -> None:
    model = Model()
    randomise(model, 1)
    source = wt.CastSource(model, MIXED)
    manifest = source.manifest()
    state = model.state_dict()
    sent = dict(source)
    assert list(sent) == [param.name for param in manifest.params]
    assert sent.keys() == state.keys()
    for param, (name, tensor) in zip(manifest.params, sent.items(), strict=True):
        assert (param.dtype, param.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        wanted = state[name]
        if wanted.is_floating_point() and "router" not in name:
            wanted = wanted.to(torch.bfloat16)
        assert same_bits(tensor, wanted), name


def test_order_decides_between_patterns() -> None:
    source = wt.CastSource(Model(), dict(reversed(MIXED.items())))
    assert {param.dtype for param in source.manifest().params if "router" in param.name} == {"bfloat16"}


def test_resident_weights_are_those_that_are_not_cast_and_masters_are_the_others() -> None:
    model = Model()
    source = wt.CastSource(model, MIXED)
    dtypes = {param.name: param.dtype for param in source.manifest().params}
    resident, masters = source.resident(), source.masters()
    assert all(str(tensor.dtype) == f"torch.{dtypes[name]}" for name, tensor in resident.items())
    assert all(str(tensor.dtype) != f"torch.{dtypes[name]}" for name, tensor in masters.items())
    assert resident.keys() | masters.keys() == dtypes.keys()
    assert resident["layers.0.router.weight"] is model.get_parameter("layers.0.router.weight")
    assert masters["embed.weight"] is model.embed.weight
    assert (source.resident(), source.masters()) == (resident, masters)
    assert source.resident() is resident and source.masters() is masters


def test_shards_are_those_of_the_masters_and_what_would_be_cast_twice_has_none() -> None:
    model = Model()
    inner = wt.ModuleSource(model)
    source = wt.CastSource(inner, MIXED)
    source.manifest()
    shards = source.shards()
    assert shards is source.shards()
    assert shards is inner.shards()
    assert shards["embed.weight"][0].tensor is model.embed.weight
    twice = wt.CastSource(source, {"embed.*": "float16", "*.router.*": "bfloat16"})
    twice.manifest()
    once = twice.shards()
    assert once is twice.shards()
    assert shards.keys() - once.keys() == {"embed.weight"}
    model.embed.weight = nn.Parameter(torch.ones(32, 8))
    twice.manifest()
    assert twice.shards() is not once
    assert source.shards()["embed.weight"][0].tensor is model.embed.weight
    assert twice.whole


def test_what_it_yields_stays_valid_when_the_masters_go_on() -> None:
    model = Model()
    randomise(model, 1)
    source = wt.CastSource(model, {"*": "bfloat16"})
    source.manifest()
    kept = dict(source)["embed.weight"]
    before = kept.clone()
    randomise(model, 2)
    assert same_bits(kept, before)


def test_the_manifest_is_the_same_object_while_the_inner_one_is() -> None:
    model = Model()
    source = wt.CastSource(model, MIXED)
    first = source.manifest()
    assert source.manifest() is first
    model.extra = nn.Parameter(torch.zeros(2))
    assert source.manifest() is not first
    assert "extra" in source.manifest().by_name
    assert "extra" in source.masters()
    model.embed.weight = nn.Parameter(torch.ones(32, 8))
    source.manifest()
    assert source.masters()["embed.weight"] is model.embed.weight


def test_patterns_that_change_nothing_leave_the_source_as_it_is() -> None:
    model = Model()
    inner = wt.ModuleSource(model)
    source = wt.CastSource(inner, {"*.router.*": "float32"})
    assert source.manifest() is inner.manifest()
    assert source.resident().keys() == inner.resident().keys()
    assert not source.masters()


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", torch.float16])
def test_any_floating_point_dtype_will_do(dtype: Any) -> None:
    model = Model()
    randomise(model, 3)
    source = wt.CastSource(model, {"embed.*": dtype})
    source.manifest()
    wanted = model.embed.weight.detach().to(getattr(torch, str(dtype).removeprefix("torch.")))
    assert same_bits(dict(source)["embed.weight"], wanted)


def test_casts_can_be_stacked_and_the_outer_one_counts() -> None:
    source = wt.CastSource(wt.CastSource(Model(), {"*": "bfloat16"}), {"embed.*": "float32"})
    assert source.manifest().by_name["embed.weight"].dtype == "float32"
    sent = dict(source)
    assert sent["embed.weight"].dtype is torch.float32
    assert sent["layers.0.up.weight"].dtype is torch.bfloat16


def test_some_of_the_weights_are_cast_like_all() -> None:
    model = Model()
    randomise(model, 1)
    source = wt.CastSource(model, MIXED)
    source.manifest()
    whole = dict(source)
    some = dict(source.stream(["embed.weight", "layers.0.router.weight"]))
    assert list(some) == ["embed.weight", "layers.0.router.weight"]
    assert all(same_bits(tensor, whole[name]) for name, tensor in some.items())


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(wt.ConfigError, match=r"'\*\.rooter\.\*'.*names such as"):
        wt.CastSource(Model(), {"*": "bfloat16", "*.rooter.*": "float32"}).manifest()


@pytest.mark.parametrize(
    ("dtypes", "sentence"),
    [
        ({"*": "bf16"}, "'bf16' is no dtype .* did you mean 'bfloat16'"),
        ({"*": "flaot32"}, "did you mean 'float32'"),
        ({"*": "int8"}, "'int8' is no dtype that weights can be cast to"),
        ({"*": None}, "'None' is no dtype"),
        ({"": "bfloat16"}, "expected a pattern"),
        ({1: "bfloat16"}, "expected a pattern"),
        ("bfloat16", "expected a table of patterns"),
    ],
)
def test_a_dtype_that_is_none_is_refused(dtypes: Any, sentence: str) -> None:
    with pytest.raises(wt.ConfigError, match=sentence):
        wt.CastSource(Model(), dtypes)
    with pytest.raises(wt.ConfigError, match=sentence):
        wt.load_config(backend="loopback", cast=dtypes)


def test_the_receivers_dtype_is_the_configs_business() -> None:
    with pytest.raises(wt.ConfigError, match="in the sender's configuration"):
        wt.CastSource(Model(), {"*": "receiver"})


def test_cast_is_a_table_of_the_core_in_files_dicts_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sync.toml"
    file.write_text(
        '[weight_transfer]\nbackend = "loopback"\n[weight_transfer.cast]\n"*" = "bfloat16"\n"*.router.*" = "float32"\n'
    )
    assert list(wt.load_config(file).cast.items()) == list(MIXED.items())
    assert wt.load_config({"backend": "loopback", "cast": MIXED}).cast == MIXED
    assert wt.load_config(wt.load_config(file), cast={"*": torch.float16}).cast == {"*": "float16"}
    monkeypatch.setenv("WEIGHT_TRANSFER_CAST", "*=float16, *.router.*=float32")
    assert wt.load_config(file).cast == {"*": "float16", "*.router.*": "float32"}
    monkeypatch.setenv("WEIGHT_TRANSFER_CAST", "float16")
    with pytest.raises(wt.ConfigError, match="pattern=dtype"):
        wt.load_config(file)


def test_a_mistyped_cast_table_is_no_backend() -> None:
    with pytest.raises(wt.ConfigError, match="unknown table 'casts'; did you mean 'cast'"):
        wt.load_config({"backend": "loopback", "casts": MIXED})


def received(config: dict[str, Any], trainer: Any, *workers: nn.Module, **arguments: Any) -> None:
    """Send once, in this process."""
    receivers = [wt.WeightReceiver({"backend": "loopback"}, worker, **arguments) for worker in workers]
    with wt.WeightSender({"backend": "loopback", **config}, receivers) as sender:
        for seed in (1, 2, 1):
            if isinstance(trainer, nn.Module):
                randomise(trainer, seed)
            sender.send(trainer)
    for receiver in receivers:
        receiver.close()


def server() -> Model:
    """Return a bfloat16 model with fp32 routers."""
    model = Model(torch.bfloat16)
    model.fp16 = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    randomise(model, 9)
    return model


@pytest.mark.parametrize("verify", ["none", "wire"])
@pytest.mark.parametrize("cast", [MIXED, {"*": "receiver"}, {"*": "bfloat16", "*router*": "receiver"}], ids=str)
def test_a_configured_cast_reaches_the_workers(cast: dict[str, str], verify: str) -> None:
    trainer, worker, other = Model(), server(), server()
    received({"cast": cast, "verify": verify}, trainer, worker, other)
    for name, tensor in worker.state_dict().items():
        assert same_bits(tensor, trainer.state_dict()[name].to(tensor.dtype)), name
        assert same_bits(tensor, other.state_dict()[name]), name


def test_a_source_is_cast_like_a_module() -> None:
    trainer, worker = Model(), server()
    received({"cast": MIXED}, wt.ModuleSource(trainer), worker)
    assert same_bits(worker.embed.weight.detach(), trainer.embed.weight.detach().to(torch.bfloat16))


@pytest.mark.parametrize(("sent", "has"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_a_cast_that_nobody_declared_is_refused_with_its_fix(sent: torch.dtype, has: str) -> None:
    trainer, worker = nn.Linear(2, 2, dtype=sent), nn.Linear(2, 2, dtype=getattr(torch, has))
    with pytest.raises(wt.ManifestMismatchError, match=rf'declare it on the trainer: cast = {{"\*" = "{has}"}}'):
        received({}, trainer, worker)
    received({"cast": {"*": has}}, trainer, worker)
    assert same_bits(worker.weight.detach(), trainer.weight.detach().to(worker.weight.dtype))


def test_integers_of_another_width_are_not_a_matter_of_casts() -> None:
    trainer, worker = nn.Module(), nn.Module()
    trainer.register_buffer("steps", torch.arange(3))
    worker.register_buffer("steps", torch.arange(3, dtype=torch.int32))
    with pytest.raises(wt.ManifestMismatchError) as caught:
        received({}, trainer, worker)
    assert "cast" not in str(caught.value)


def test_widening_by_the_receivers_dtype_needs_no_name() -> None:
    trainer, worker = nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2)
    received({"cast": {"*": "receiver"}}, trainer, worker)
    assert same_bits(worker.weight.detach(), trainer.weight.detach().float())


def test_a_worker_that_does_not_know_its_dtypes_is_named() -> None:
    with pytest.raises(wt.HandshakeError, match=r"worker 0 does not know .* name the dtype"):
        received({"cast": {"*": "receiver"}}, Model(), server(), load_weights=lambda _weights: None)


def test_workers_of_different_dtypes_are_named_with_the_weight() -> None:
    with pytest.raises(wt.HandshakeError, match=r"'fp16' is bfloat16 at worker 0, float16 at worker 1"):
        received({"cast": {"*": "receiver"}}, Model(), server(), Model())


def test_a_weight_that_the_worker_lacks_is_named() -> None:
    trainer = Model()
    trainer.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(wt.HandshakeError, match=r"worker 0 has no weight 'extra'"):
        received({"cast": {"*": "receiver"}}, trainer, server())


def test_tied_weights_of_the_worker_are_known_by_each_name() -> None:
    trainer, worker = nn.Module(), nn.Module()
    trainer.a = trainer.z = nn.Parameter(torch.ones(2))
    worker.z = worker.a = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    received({"cast": {"*": "receiver"}}, trainer, worker)
    assert same_bits(worker.z.detach(), trainer.a.detach().to(torch.bfloat16))
    worker.float()
    received({"cast": {"*": "bfloat16", "z": "float32"}}, trainer, worker)
    assert same_bits(worker.z.detach(), trainer.a.detach())


def test_workers_that_came_back_with_another_dtype_are_asked_again() -> None:
    trainer, worker = nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16)
    with (
        wt.WeightReceiver({"backend": "loopback"}, worker) as receiver,
        wt.WeightSender({"backend": "loopback", "cast": {"*": "receiver"}}, [receiver]) as sender,
    ):
        sender.send(trainer)
        worker.half()
        with pytest.raises(wt.ManifestMismatchError):
            sender.send(trainer)
        sender.send(trainer)
        assert same_bits(worker.weight.detach(), trainer.weight.detach().half())


def test_ranks_of_one_replica_answer_together() -> None:
    trainer, workers = Model(), [server(), server()]
    receivers = [
        wt.WeightReceiver({"backend": "loopback"}, worker, parallel_config=wt.ParallelConfig(rank=rank, world_size=2))
        for rank, worker in enumerate(workers)
    ]
    channel = wt.LocalChannel(*receivers)
    with wt.WeightSender({"backend": "loopback", "cast": {"*": "receiver"}}, [channel]) as sender:
        sender.send(trainer)
    for worker in workers:
        assert same_bits(worker.embed.weight.detach(), trainer.embed.weight.detach().to(torch.bfloat16))
