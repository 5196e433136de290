"""An unmodified vLLM receives through us: what it samples from is what was sent, whatever fails in between.

Runs where vLLM is installed: ``make test-vllm``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from live import MODELS, Live, Setup
from transformers import AutoConfig, AutoModelForCausalLM

import weight_transfer as wt
from weight_transfer.session.sent import Sent
from weight_transfer_vllm import VllmChannel

SETUPS = [
    Setup(kind, ranks, over) for kind in ("llama", "qwen2", "qwen3") for ranks in (1, 2) for over in ("offline", "http")
]
FORMS = [Setup("llama", 2, "async"), Setup("llama", 1, "ray")]
FAULTY = [
    Setup("llama", 2, "offline"),
    Setup("llama", 2, "http"),
    Setup("llama", 1, "http", recorded=False),
    Setup("llama", 2, "offline", recorded=False),
]
"""Those on which all that can fail does."""
PROMPT = [5, 6, 7, 8, 9]
LONG = [3 + number % 400 for number in range(150)]  # several blocks of the prefix cache
CONFIG = {"backend": "ipc", "timeout": 30}


class Trainer:
    """A model that becomes one of two checkpoints, and what a fresh engine would say."""

    def __init__(self, kind: str) -> None:
        self.checkpoints = {
            letter: AutoModelForCausalLM.from_pretrained(MODELS / f"{kind}-{letter}", dtype=torch.float32)
            for letter in "ab"
        }
        self.model = copy.deepcopy(self.checkpoints["a"])

    def become(self, letter: str) -> torch.nn.Module:
        self.model.load_state_dict(self.checkpoints[letter].state_dict())
        return self.model

    def says(self, letter: str, prompt: list[int]) -> list[int]:
        with torch.no_grad():
            tokens = self.checkpoints[letter].generate(
                torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
            )
        return tokens[0, len(prompt) :].tolist()


class Company:
    """An engine and its trainer.

    Attributes:
        bits: digests of the engine's weights, by checkpoint: those of A from before anything was sent.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.trainer = Trainer(setup.kind)
        self.live: Live = setup.start()
        self.bits = {"a": self.live.ask("weight_digests")}
        self.channel = VllmChannel(self.live.target)
        self.sender = wt.WeightSender(CONFIG, [self.channel])

    def send(self, letter: str) -> wt.TransferReport:
        return self.sender.send(self.trainer.become(letter))

    def require(self, letter: str) -> None:
        """Fail unless the engine has the bits and the tokens of a checkpoint."""
        digests = self.live.ask("weight_digests")
        assert digests == self.bits.setdefault(letter, digests)
        assert (self.bits["a"] == self.bits.get("b")) is False
        for prompt in (PROMPT, LONG):
            assert self.live.generate(prompt) == self.trainer.says(letter, prompt)

    def close(self) -> None:
        self.sender.close()
        self.channel.close()
        self.live.close()


running: dict[Setup, Company] = {}


@pytest.fixture
def company(request: pytest.FixtureRequest) -> Company:
    """Return the engine of a setup; one runs at a time, and tests come in the order of their setups, see conftest."""
    if request.param not in running:
        close_all()
        running[request.param] = Company(request.param)
    return running[request.param]


@pytest.fixture(scope="module", autouse=True)
def at_the_end() -> Iterator[None]:
    yield
    close_all()


def close_all() -> None:
    while running:
        running.popitem()[1].close()


everywhere = pytest.mark.parametrize("company", [*SETUPS, *FAULTY[2:], *FORMS], ids=str, indirect=True)
where_all_fails = pytest.mark.parametrize("company", FAULTY, ids=str, indirect=True)


@everywhere
def test_each_version_is_what_a_fresh_engine_would_serve(company: Company) -> None:
    for prompt in (PROMPT, LONG):
        assert company.live.generate(prompt) == company.trainer.says("a", prompt)
    for letter in "babab":
        company.send(letter)
        company.require(letter)


@where_all_fails
def test_bits_are_those_of_vllms_own_reload(company: Company) -> None:
    company.send("b")
    ours = company.live.ask("weight_digests")
    company.live.ask("reload_weights", weights_path=str(MODELS / f"{company.setup.kind}-b"))
    assert company.live.ask("weight_digests") == ours


@everywhere
def test_a_rank_gets_the_bytes_that_it_keeps(company: Company) -> None:
    company.send("a")
    report = company.send("b")
    company.require("b")
    if company.setup.recorded and company.setup.ranks > 1:
        (kept,) = report.kept.values()
        print(f"{company.setup}: {kept / company.setup.ranks / report.nbytes:.4f} of the model for each rank")
        assert kept / company.setup.ranks <= 0.51 * report.nbytes
    else:
        assert not report.kept


class Odd(wt.WeightSource):
    """The trainer's weights, with something amiss."""

    def __init__(self, model: torch.nn.Module, **amiss: Any) -> None:
        self._inner = wt.ModuleSource(model)
        self._drop: str | None = amiss.get("drop")
        self._swap: tuple[str, str] | None = amiss.get("swap")
        self._fail_at: str | None = amiss.get("fail_at")
        params = [self._renamed(param) for param in self._inner.manifest().params if param.name != self._drop]
        self._manifest = wt.Manifest(params)

    def _renamed(self, param: wt.ParamMeta) -> wt.ParamMeta:
        if self._swap and param.name in self._swap:
            other = self._swap[1 - self._swap.index(param.name)]
            return wt.ParamMeta(other, param.dtype, param.shape)
        return param

    def manifest(self) -> wt.Manifest:
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._inner:
            if name == self._drop:
                continue
            if name == self._fail_at:
                raise RuntimeError("the trainer's source is broken")
            if self._swap and name in self._swap:
                name = self._swap[1 - self._swap.index(name)]  # noqa: PLW2901
            yield name, tensor


@where_all_fails
@pytest.mark.parametrize(
    ("amiss", "message"),
    [
        ({"drop": "model.norm.weight"}, "model.norm.weight"),
        ({"drop": "model.layers.1.self_attn.k_proj.weight"}, "qkv_proj"),
        ({"swap": ("model.norm.weight", "model.layers.1.mlp.down_proj.weight")}, "."),
    ],
    ids=["a norm is missing", "a part of qkv is missing", "two are swapped"],
)
def test_weights_that_do_not_fit_are_refused(company: Company, amiss: dict[str, Any], message: str) -> None:
    company.send("a")
    with pytest.raises(wt.TransferError, match=message):
        company.sender.send(Odd(company.trainer.become("b"), **amiss))
    if company.setup.recorded and "drop" in amiss:  # nothing was touched, so generation goes on
        company.require("a")
    company.send("b")
    company.require("b")


def changed(**shapes: Any) -> torch.nn.Module:
    """Return a model as the first checkpoint's, but for some sizes."""
    config = AutoConfig.from_pretrained(MODELS / "llama-a")
    for name, value in shapes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).float()


@where_all_fails
@pytest.mark.parametrize(
    "shapes",
    [
        {"num_key_value_heads": 4},
        {"num_attention_heads": 8},
        {"intermediate_size": 512},
        {"hidden_size": 64},
        {"vocab_size": 520},
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 2},
    ],
    ids=str,
)
def test_a_model_of_another_size_is_refused(company: Company, shapes: dict[str, int]) -> None:
    if not company.setup.recorded:
        pytest.skip("vLLM's own loader cuts what is too large, without a word")
    company.send("a")
    with pytest.raises(wt.TransferError, match=r"of the worker's model|The worker's model"):
        company.sender.send(changed(**shapes))
    company.require("a")


@pytest.mark.parametrize("company", FAULTY[:2], ids=str, indirect=True)
def test_weights_that_fit_one_rank_and_not_the_other_are_refused_and_the_next_update_heals(company: Company) -> None:
    company.send("a")
    with pytest.raises(wt.ManifestMismatchError, match=r"The worker's model cannot load .*k_proj"):
        company.sender.send(changed(num_key_value_heads=1))
    company.send("b")
    company.require("b")


@pytest.mark.parametrize("company", FAULTY[:2], ids=str, indirect=True)
def test_weights_that_no_rank_uses_are_told(company: Company) -> None:
    assert "used by no rank" not in str(company.send("a").warnings)
    report = company.sender.send(changed(attention_bias=True))
    assert "weights are used by no rank of vLLM, such as 'model.layers.0.self_attn." in str(report.warnings)
    assert "used by no rank" not in str(company.send("a").warnings)
    company.require("a")


@where_all_fails
def test_damaged_weights_are_refused_and_the_next_update_heals(
    company: Company, monkeypatch: pytest.MonkeyPatch
) -> None:
    company.send("a")
    honest = Sent.passes

    def passes(sent: Sent, name: str, tensor: torch.Tensor) -> None:
        honest(sent, name, tensor + 1 if name == "model.layers.1.mlp.down_proj.weight" else tensor)

    with wt.WeightSender({**CONFIG, "verify": "wire"}, [company.channel]) as sender:
        with monkeypatch.context() as wire:
            wire.setattr(Sent, "passes", passes)  # as if the bytes had changed after they were digested
            with pytest.raises(wt.IntegrityError, match="down_proj"):
                sender.send(Odd(company.trainer.become("b")))
        sender.send(company.trainer.become("b"))
        company.require("b")
    company.send("a")
    company.require("a")


@where_all_fails
def test_a_source_that_fails_in_the_middle_is_healed_by_the_next_update(company: Company) -> None:
    company.send("a")
    with pytest.raises(wt.WeightTransferError, match="source is broken"):
        company.sender.send(Odd(company.trainer.become("b"), fail_at="model.layers.2.mlp.up_proj.weight"))
    for letter in "ba":
        company.send(letter)
        company.require(letter)


@where_all_fails
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("call", ["begin", "finish"])
def test_a_rank_that_fails_is_named_and_the_next_update_heals(company: Company, rank: int, call: str) -> None:
    if rank >= company.setup.ranks:
        pytest.skip("there is no such rank")
    company.send("a")
    company.live.ask("fail_once", rank=rank, call=call)
    with pytest.raises(wt.TransferError, match=f"told to fail in {call}"):
        company.send("b")
    company.send("b")
    company.require("b")


@where_all_fails
@pytest.mark.parametrize("phase", ["begun", "half", "finish"])
def test_a_trainer_that_is_killed_leaves_an_engine_that_the_next_one_heals(company: Company, phase: str) -> None:
    company.send("a")
    if company.setup.over == "offline":
        pytest.skip("its trainer is the engine's own process")
    trainer = Path(__file__).with_name("killed_trainer.py")
    checkpoint = str(MODELS / f"{company.setup.kind}-b")
    command = [sys.executable, str(trainer), company.live.target, checkpoint, phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == phase
        process.kill()
    for letter in "ba":
        company.send(letter)
        company.require(letter)


@where_all_fails
def test_a_trainer_may_leave_and_come_back(company: Company) -> None:
    company.send("a")
    company.channel.leave()
    company.require("a")
    company.send("b")
    company.require("b")


@pytest.mark.parametrize("company", [Setup("llama", 2, "http")], ids=str, indirect=True)
def test_the_example_runs(company: Company) -> None:
    example = Path(__file__).parents[3] / "examples" / "vllm_rl" / "train.py"
    port = company.live.target.rpartition(":")[2]
    command = [sys.executable, str(example), str(MODELS / "llama-a"), "3"]
    ran = subprocess.run(
        command, env={**os.environ, "PORT": port}, capture_output=True, check=False, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.partition(":")[0] for line in ran.stdout.splitlines()] == [f"version {number}" for number in range(3)]
    company.send("b")
    company.require("b")


@pytest.mark.parametrize("company", [Setup("llama", 1, "offline", draft=True)], ids=str, indirect=True)
def test_a_draft_model_is_a_target_of_its_own(company: Company) -> None:
    live, sender, checkpoints = company.live, company.sender, company.trainer.checkpoints
    drafts = {"b": live.ask("weight_digests", draft=True)}
    for letter in "abab":
        sender.send(checkpoints[letter], target="draft")
        digests = live.ask("weight_digests", draft=True)
        assert digests == drafts.setdefault(letter, digests)
        company.require("a")
    assert drafts["a"] == company.bits["a"] != drafts["b"]
    with pytest.raises(wt.WeightTransferError, match="source is broken"):
        sender.send(Odd(checkpoints["a"], fail_at="model.layers.2.mlp.up_proj.weight"), target="draft")
    sender.send(checkpoints["a"], target="draft")
    company.send("b")
    company.require("b")
    assert live.ask("weight_digests", draft=True) == drafts["a"]
    assert set(company.channel.status()["versions"]) == {"model", "draft"}


@where_all_fails
def test_the_version_is_vllms_too(company: Company) -> None:
    company.sender.send(company.trainer.become("a"), "step-7")
    if company.setup.over == "offline":
        assert company.live.target.get_weight_version() == "step-7"
    assert company.channel.status()["version"] == "step-7"
    with contextlib.suppress(AttributeError):
        assert company.sender.version == "step-7"
