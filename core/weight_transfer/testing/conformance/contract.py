"""Contract: what the core reads of a backend before, and between, its transfers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import attrs
import pytest

from weight_transfer.engine import TrainerWeightTransferEngine, WeightTransferEngine
from weight_transfer.errors import TransferError, WeightTransferError, error_from_dict, error_to_dict
from weight_transfer.plugins.backend import Capability, Probe
from weight_transfer.testing.conformance.cast import PLAIN, Cast
from weight_transfer.testing.conformance.kit import Kit
from weight_transfer.testing.resources import held

_LOOK_UP = """
import json, sys, weight_transfer
backend = weight_transfer.load_backend(sys.argv[1]).backend
print(json.dumps({"modules": sorted(sys.modules), "engines": [backend.worker_engine, backend.trainer_engine]}))
"""


class ContractTests(Kit):
    """Descriptor, imports, typed infos and errors."""

    def test_looking_the_backend_up_imports_neither_torch_nor_its_engines(self) -> None:
        """A config that names the backend costs milliseconds: proven in a fresh process.

        If this fails: the module of the entry point, or one that it imports, has a heavy import at its top. Import
        only ``weight_transfer`` there, name classes as ``"module:Class"`` strings, and import inside ``probe``.
        """
        command = [sys.executable, "-c", _LOOK_UP, self.backend]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        heavy = {"torch", "numpy", *(engine.partition(":")[0] for engine in answer["engines"])}
        assert not heavy & set(answer["modules"])

    def test_the_descriptor_keeps_what_it_says(self) -> None:
        """Its references can be imported and are what they are called; the probe and the options answer.

        If this fails: correct the field of ``Backend`` that the message names, or the class behind it. A backend
        declares `Capability.CPU` or `Capability.CUDA`, and a summary in one line.
        """
        loaded = self.loaded()
        assert loaded.backend.capabilities & {Capability.CPU, Capability.CUDA}, "it moves neither CPU nor CUDA tensors"
        assert loaded.backend.summary.strip() and "\n" not in loaded.backend.summary
        answer = loaded.probe()
        assert isinstance(answer, Probe) and answer.reason
        if not answer.available:
            assert answer.fix, "a probe that says no says what to do"
            pytest.skip(f"{self.backend} does not work here: {answer.reason}")
        worker, trainer = self.engines()
        assert isinstance(worker, WeightTransferEngine) and isinstance(trainer, TrainerWeightTransferEngine)
        assert worker.init_info_cls is trainer.init_info_cls and worker.update_info_cls is trainer.update_info_cls
        worker.shutdown()
        trainer.shutdown()

    def test_creating_an_engine_acquires_nothing(self) -> None:
        """Both constructors only keep their configs: no descriptor, thread or memory is taken.

        If this fails: move the acquisition from ``__init__`` to ``init_transfer_engine`` or ``open_endpoint``.
        """
        if not self.loaded().probe().available:
            pytest.skip(f"{self.backend} does not work here")
        engines = [*self.engines()]  # the libraries are loaded with the first ones
        before = held()
        engines += self.engines()
        grown = {what: count for what, count in held().items() if count > before[what]}
        assert not grown  # what others had may end meanwhile
        assert [engine.extra_memory for engine in engines] == [0] * 4
        for engine in engines:
            engine.shutdown()

    def test_infos_are_json_and_wrong_ones_are_refused_by_key(self, cast: Cast) -> None:
        """What engines tell each other survives JSON unchanged; a wrong dict is a ``ValueError`` that names the key.

        If this fails: declare infos as ``attrs`` classes derived from `WeightTransferInitInfo` and
        `WeightTransferUpdateInfo`, of plain types, and leave ``parse_init_info`` and ``parse_update_info`` as they are.
        """
        worker = cast.worker()
        trainer = cast.trainer([worker])
        trainer.ask("send", seed=1, version=1)
        [sent] = trainer.ask("infos")
        init, update = sent["init"][0], {name: _value(value) for name, value in sent["update"][0].items()}
        if sent["asked"]:  # then the manifest has come with the question
            update["manifest"] = _value(sent["asked"][0]["manifest"])
        assert json.loads(json.dumps([init, update], allow_nan=False)) == [init, update]
        engine, _ = self.engines()
        for parse, info in ((engine.parse_init_info, init), (engine.parse_update_info, update)):
            cls = type(parse(info))
            with pytest.raises(ValueError, match="nonsense"):
                parse(info | {"nonsense": 1})
            for field in attrs.fields(cls):
                if field.default is attrs.NOTHING:
                    with pytest.raises(ValueError, match=field.name):
                        parse({name: value for name, value in info.items() if name != field.name})

    def test_nothing_is_unpickled(self, cast: Cast) -> None:
        """Neither side runs a pickle, ``torch.load`` included, while it joins and transfers.

        If this fails: the message tells where. Send typed fields through the infos, and raw bytes through the
        transport; whoever can send a pickle can run code in the process that loads it.
        """
        worker = cast.worker()
        trainer = cast.trainer([worker])
        for version in range(2):
            trainer.ask("send", seed=version, version=version)
        assert worker.ask("unpickled") == [], "the worker unpickled"
        assert trainer.ask("unpickled") == [], "the trainer unpickled"

    def test_errors_survive_a_process_boundary(self) -> None:
        """The backend's own error classes can be told over JSON, and stay in the tree of errors.

        If this fails: derive errors from the classes of `weight_transfer.errors` and declare new fields with
        ``attrs.field(default=..., kw_only=True)``; or raise the classes of the tree themselves.
        """
        if not self.loaded().probe().available:
            pytest.skip(f"{self.backend} does not work here")
        self.engines()  # imports the modules that define errors
        package = self.loaded().backend.worker_engine.partition(".")[0]
        for cls in _subclasses(WeightTransferError):
            if cls is TransferError or cls.__module__.partition(".")[0] == package:
                error = cls("one sentence", cause="a cause")
                reduced: Any = error.__reduce__()
                told = error_from_dict(json.loads(json.dumps(error_to_dict(error))))
                for copy in (told, reduced[0](*reduced[1])):
                    assert type(copy) is cls and str(copy) == str(error)

    def test_unchanged_updates_send_the_same_few_bytes_whatever_the_number_of_weights(self, cast: Cast) -> None:
        """Once workers know the manifest, and whatever table the backend adds, an update names them by digest.

        If this fails: declare the field that grows with the number of weights with `sent_once`, and return the same
        object from ``describe_update`` while it is unchanged.
        """
        many = [(f"w{index}", "float32", [3], "contiguous") for index in range(1000)]
        worker = cast.worker(many)
        trainer = cast.trainer([worker], many)
        for version in range(3):
            trainer.ask("send", seed=version, version=version)
        [sent] = trainer.ask("infos")
        assert sent["nbytes"][1] < 2048 and sent["nbytes"][2] < 2048, "bytes of an unchanged update's info"

    def test_the_plain_model_is_as_the_tests_expect_it(self) -> None:
        """The tests of bits need a weight that is larger than a bucket.

        If this fails: ``config()`` asks for buckets of more than 256 KiB; leave ``bucket_bytes`` small in the kit.
        """
        largest = max(4 * shape[0] * shape[-1] for _, _, shape, _ in PLAIN)
        assert int(self.settings()["bucket_bytes"]) < largest


def _value(wire: Any) -> Any:
    return wire["value"] if isinstance(wire, dict) and set(wire) == {"digest", "value"} else wire


def _subclasses(cls: type[WeightTransferError]) -> list[type[WeightTransferError]]:
    return [found for child in cls.__subclasses__() for found in (child, *_subclasses(child))]
