"""The conformance kit fails each backend that is wrong, in the test that is meant for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import attrs
import pytest

from weight_transfer.scaffold import write_backend

HERE = Path(__file__).parent
BITS = "test_every_bit_arrives_from_a_to_b_and_back[1 workers-loader]"
ZOO = "test_every_dtype_shape_and_layout_arrives[loader-module]"
LAYOUTS = "test_every_layout_reaches_every_layout[{}]"

PLUGIN = """
{top}
from weight_transfer.authoring import API_VERSION, Backend, Capability, hookimpl

@hookimpl
def weight_transfer_backend():
    return Backend(
        name={name!r},
        api_version=API_VERSION,
        summary="wrong on purpose",
        worker_engine={worker!r},
        trainer_engine={trainer!r},
        options={options!r},
        capabilities={capabilities},
    )
"""
TESTS = """
from weight_transfer.testing import BackendConformance

class Mutant(BackendConformance):
    deadline = 1.0
    grace = 4.0

    def config(self):
        return {"timeout": 10, "init_timeout": 4}
"""
TEST = """
class Test{stem}(Mutant):
    backend = {name!r}
"""


@attrs.frozen
class Mutant:
    """A wrong backend.

    Attributes:
        stem: of its classes' names.
        wrong: what it does.
        caught_by: the test that is meant for it.
        passes: a test that it passes, to show that it works otherwise.
        top: the first line of its plugin module.
    """

    options: ClassVar[str] = "weight_transfer_acme.config:AcmeOptions"
    capabilities: ClassVar[str] = "[Capability.CPU, Capability.CROSS_PROCESS]"

    stem: str
    wrong: str
    caught_by: str
    passes: str = BITS
    top: str = ""

    @property
    def name(self) -> str:
        return self.stem.lower()

    def plugin(self) -> str:
        """Return the text of its plugin module; its engines are its own, or honest ones."""
        return PLUGIN.format(
            top=self.top,
            name=self.name,
            worker=self._engine("Worker"),
            trainer=self._engine("Trainer"),
            options=self.options,
            capabilities=self.capabilities,
        )

    def _engine(self, side: str) -> str:
        """Return ``"module:Class"`` of its own engine for ``"Worker"`` or ``"Trainer"``, else of the honest one."""
        return self._own("engines", side) or f"weight_transfer_acme.engine:Acme{side}Engine"

    def _own(self, module: str, side: str) -> str:
        own = f"class {self.stem}{side}(" in (HERE / "wrong" / f"{module}.py").read_text()
        return f"wrong.{module}:{self.stem}{side}" if own else ""


class RegionMutant(Mutant):
    """A backend that is wrong about regions alone, made of the ``ipc`` backend."""

    options = "weight_transfer_ipc.config:IpcOptions"
    capabilities = "[Capability.CPU, Capability.CROSS_PROCESS, Capability.REJOIN, Capability.REGIONS]"

    def _engine(self, side: str) -> str:
        return self._own("region_engines", side) or f"weight_transfer_ipc.engine:Ipc{side}Engine"


MUTANTS = [
    Mutant("DropsTheLastByte", "drops the last byte of odd weights", ZOO),
    Mutant("SwapsTwoTensors", "swaps tensors of one shape", BITS, passes=ZOO),
    Mutant("LosesADtype", "takes float64 through float32", ZOO),
    Mutant("SendsMasters", "sends masters without a cast", "test_masters_arrive_cast[in place-module]"),
    Mutant("ResendsA", "sends the first update again and again", BITS, passes=ZOO),
    Mutant(
        "IgnoresTheDeadline",
        "waits for workers without a deadline",
        "test_a_trainer_does_not_wait_for_an_absent_worker_beyond_the_deadline",
    ),
    Mutant(
        "HangsOnADeadPeer",
        "goes on waiting for a trainer that was killed",
        "test_a_trainer_killed_in_an_update_leaves_no_version_and_another_takes_over",
    ),
    Mutant("PublishesEarly", "returns before the last byte", "test_no_reader_ever_sees_a_torn_update"),
    Mutant(
        "WritesAfterTheError",
        "writes after it has raised",
        "test_after_the_deadline_nothing_is_written_even_if_the_trainer_goes_on",
    ),
    Mutant("LeaksADescriptor", "opens a file per update", "test_nothing_accumulates_over_fifty_updates"),
    Mutant("LeaksAThread", "starts a thread at every tenth update", "test_nothing_accumulates_over_fifty_updates"),
    Mutant("KeepsItsPort", "never closes its listener", "test_everything_comes_back_when_both_sides_close"),
    Mutant(
        "StaysWithItsFirst",
        "goes on with the trainer that it joined first",
        "test_each_new_trainer_takes_a_worker_over",
    ),
    Mutant("SharesState", "shares connections between engines", "test_two_engines_of_one_process_share_nothing"),
    Mutant(
        "BuffersEverything",
        "keeps a copy of the model",
        "test_extra_memory_is_bounded_by_the_buckets_and_not_by_the_model",
    ),
    Mutant("Pickles", "unpickles a field of the update", "test_nothing_is_unpickled"),
    Mutant(
        "TellsEverything",
        "tells all names at each update",
        "test_unchanged_updates_send_the_same_few_bytes_whatever_the_number_of_weights",
    ),
    Mutant(
        "TakesSharedWeights",
        "moves weights that a child shares",
        "test_weights_that_the_trainer_shares_with_a_child_stay_shared",
    ),
    Mutant(
        "SharesWithChildren",
        "moves weights into memory that a forked child shares",
        "test_children_that_were_forked_after_an_update_have_weights_of_their_own[trainer]",
    ),
    Mutant(
        "FreezesStorages",
        "moves weights into memory that cannot be resized",
        "test_memory_that_was_given_away_between_updates_is_noticed[module]",
    ),
    Mutant(
        "MakesInferenceTensors",
        "makes inference tensors of the trainer's weights",
        "test_inference_mode_of_the_trainer_leaves_no_trace[module-loader]",
    ),
    Mutant(
        "WritesOnAThread",
        "loads on a thread of its own",
        "test_a_model_that_was_built_in_inference_mode_is_updated[loader]",
    ),
    Mutant(
        "ForgetsTheEmpty",
        "loads nothing if there are no bytes",
        "test_weights_without_elements_arrive[module-loader]",
    ),
    Mutant(
        "LendsWhatItKeeps",
        "lends its loader what it compares the next update with",
        "test_a_loader_may_write_into_what_it_is_given[module]",
    ),
    Mutant("KeepsTheModel", "holds what it sent", "test_engines_that_were_shut_down_hold_no_weights[module-loader]"),
    Mutant(
        "ImportsTorch",
        "imports torch in its plugin module",
        "test_looking_the_backend_up_imports_neither_torch_nor_its_engines",
        top="import torch",
    ),
    Mutant(
        "BlamesThePeer",
        "takes its loader's errors for a lost peer",
        "test_whatever_a_loader_raises_is_the_workers_own_error",
        passes="test_a_loader_that_raises_is_told_to_the_trainer",
    ),
    Mutant(
        "TouchesEarly",
        "says that it writes before bytes are coming",
        "test_whatever_a_source_raises_is_the_trainers_own_error[first-in place]",
        passes="test_a_source_that_raises_ends_the_update_on_both_sides",
    ),
    Mutant(
        "SendsOn",
        "goes on sending to a worker that has refused",
        "test_a_refusal_before_the_first_byte_is_told_at_once[module]",
        passes="test_a_manifest_that_differs_changes_nothing",
    ),
    Mutant(
        "WaitsForAStoppedTrainer",
        "waits for a trainer that stands still",
        "test_a_trainer_that_is_stopped_is_a_timeout[between two]",
        passes="test_a_trainer_killed_in_an_update_leaves_no_version_and_another_takes_over",
    ),
    Mutant(
        "JoinsForEver",
        "joins a trainer that stands still",
        "test_a_trainer_that_is_stopped_is_not_joined_for_ever",
        passes="test_a_stale_invitation_is_an_error_in_time",
    ),
    Mutant("CannotBeInterrupted", "goes on joining", "test_a_worker_that_joins_can_be_interrupted"),
    Mutant(
        "ReceivesOn",
        "goes on receiving when it is told to give up",
        "test_a_worker_that_aborts_does_not_wait_for_the_trainer[before the first byte]",
    ),
    Mutant("ChecksNoToken", "lets everybody in", "test_a_stranger_without_the_secret_is_not_let_in"),
    Mutant(
        "RaisesAtTheEnd",
        "raises RuntimeError at the end of the stream",
        "test_a_trainer_killed_in_an_update_leaves_no_version_and_another_takes_over",
    ),
    Mutant(
        "WaitsForAGoodbye",
        "waits for a worker that hears nothing",
        "test_a_control_channel_that_fails_is_known_in_time_and_that_it_is_slow_is_no_failure",
    ),
    Mutant(
        "StaysFull",
        "remembers that the disk was full",
        "test_files_that_cannot_grow_are_an_error_or_no_matter[worker]",
        passes="test_files_that_cannot_grow_are_an_error_or_no_matter[trainer]",
    ),
    Mutant(
        "StaysPoor",
        "remembers that there was no memory",
        "test_memory_that_cannot_be_had_is_an_error_or_no_matter[worker]",
        passes="test_memory_that_cannot_be_had_is_an_error_or_no_matter[trainer]",
    ),
    Mutant(
        "TakesPausesForDeath",
        "takes a pause of the network for the death of its trainer",
        "test_a_connection_that_falls_silent_is_an_error_in_time_and_a_pause_is_no_failure",
    ),
    Mutant("TrustsTheClock", "measures time by the wall clock", "test_a_clock_that_jumps_matters_to_nobody"),
    Mutant("CopiesEverything", "copies all tensors at once", "test_copies_of_passing_tensors_are_bounded"),
    Mutant(
        "KeepsTensors",
        "keeps tensors beyond the next one",
        "test_a_tensor_need_not_outlive_the_next_one[reused-loader]",
        passes=ZOO.replace("module", "passing tensors"),
    ),
    RegionMutant(
        "ReadsItsNeighbour",
        "reads its neighbour's region",
        LAYOUTS.format("megatron on 2-rows on 2"),
        passes=LAYOUTS.format("plain on 1-experts on 1"),
    ),
    RegionMutant(
        "TakesAStaleReplica",
        "takes a replica of the update before",
        LAYOUTS.format("hsdp on 4-columns on 4"),
        passes=LAYOUTS.format("fsdp on 2-columns on 2"),
    ),
    RegionMutant(
        "CopiesColumnsAsRows",
        "copies a block of columns as rows",
        LAYOUTS.format("plain on 1-columns on 4"),
        passes=LAYOUTS.format("plain on 1-rows on 4"),
    ),
    RegionMutant("MovesAPieceTwice", "moves a piece twice", LAYOUTS.format("tp on 2-rows on 2")),
    RegionMutant("CountsWhatItSkips", "counts bytes that it has not moved", LAYOUTS.format("tp on 2-rows on 2")),
    RegionMutant("CountsDouble", "counts more bytes than it has moved", LAYOUTS.format("tp on 4-whole on 1")),
    RegionMutant(
        "KeepsItsShards",
        "keeps a copy of its shards",
        "test_extra_memory_of_both_sides_is_bounded_by_the_buckets[fsdp-rows]",
        passes=LAYOUTS.format("tp on 2-rows on 2"),
    ),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], str]:
    """Run two tests of the kit on each mutant, all in one process; return the outcome by class and test."""
    folder = tmp_path_factory.mktemp("mutants")
    site = _install(folder)
    (folder / "test_them.py").write_text(TESTS + "".join(TEST.format(stem=m.stem, name=m.name) for m in MUTANTS))
    nodes = [f"test_them.py::Test{m.stem}::{test}" for m in MUTANTS for test in (m.caught_by, m.passes)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junit-xml=report.xml", *nodes]
    path = [str(site), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return {
        (case.attrib["classname"].rpartition(".Test")[2], case.attrib["name"]): _verdict(case)
        for case in ElementTree.parse(folder / "report.xml").iter("testcase")
    }


def _install(folder: Path) -> Path:
    """Install the backend that ``weight-transfer new`` writes, and the mutants, into a folder for ``PYTHONPATH``."""
    site = folder / "site"
    shutil.copytree(write_backend("acme", folder) / "weight_transfer_acme", site / "weight_transfer_acme")
    points = []
    for mutant in MUTANTS:
        (site / f"plugin_{mutant.name}.py").write_text(mutant.plugin())
        points.append(f"{mutant.name} = plugin_{mutant.name}")
    info = site / "mutants-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mutants\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[weight_transfer.backends]", *points, ""]))
    return site


def _verdict(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            return "failed" if child.tag == "failure" else child.tag
    return "passed"


@pytest.mark.slow
@pytest.mark.timeout(620)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.wrong)
def test_the_kit_catches_a_backend_that(mutant: Mutant, verdicts: Mapping[tuple[str, str], str]) -> None:
    assert verdicts[mutant.stem, mutant.caught_by] == "failed"
    assert verdicts[mutant.stem, mutant.passes] == "passed"
