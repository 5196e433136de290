"""The engines of the mutants. Where a mutant has no class of its own for a side, that side is the honest one."""

from __future__ import annotations

import base64
import os
import pickle
import socket
import struct
import tempfile
import threading
import time
from collections import defaultdict
from typing import Any

import attrs
import torch
from weight_transfer_acme.engine import AcmeTrainerEngine, AcmeUpdateInfo, AcmeWorkerEngine, Connection

from weight_transfer.authoring import Deadline, destinations_of
from weight_transfer.errors import PeerLostError, TransferError, TransferTimeoutError

_LATE = 0.3  # seconds
_MOMENT = 0.25  # seconds
_GOODBYE = 12.0  # seconds
_AN_HOUR = 3600.0  # seconds
_full: list[OSError] = []
_poor: list[bool] = []
_open: list[int] = []
_kept: list[socket.socket] = []
_workers: dict[int, Connection] = {}


class DropsTheLastByteWorker(AcmeWorkerEngine):
    """Of each weight with an odd number of bytes."""

    def receive_weights(self, update_info, load_weights):
        def altered(weights):
            for _, tensor in weights:
                data = tensor.reshape(-1).view(torch.uint8)
                if data.numel() % 2:
                    data[-1] ^= 1
            load_weights(weights)

        super().receive_weights(update_info, altered)


class SwapsTwoTensorsWorker(AcmeWorkerEngine):
    """Of the same shape and dtype, if they arrive together."""

    def receive_weights(self, update_info, load_weights):
        def altered(weights):
            groups = defaultdict(list)
            for name, tensor in weights:
                groups[tensor.shape, tensor.dtype].append((name, tensor))
            for group in groups.values():
                names, tensors = zip(*group, strict=True)
                load_weights(list(zip(names, reversed(tensors), strict=True)))

        super().receive_weights(update_info, altered)


class LosesADtypeWorker(AcmeWorkerEngine):
    """Takes float64 through float32."""

    def receive_weights(self, update_info, load_weights):
        super().receive_weights(
            update_info,
            lambda weights: load_weights(
                [(name, t.float().double() if t.dtype is torch.float64 else t) for name, t in weights]
            ),
        )


class ResendsATrainer(AcmeTrainerEngine):
    """Keeps the weights of its first update."""

    _first: Any = None

    def send_weights(self, source, manifest, deadline, progress):
        self._first = self._first or [(name, tensor.clone()) for name, tensor in source]
        super().send_weights(self._first, manifest, deadline, progress)


class SendsMastersTrainer(AcmeTrainerEngine):
    """Takes the bytes of masters for those of the weights."""

    def send_weights(self, source, manifest, deadline, progress):
        masters = source.masters()

        def weights():
            for name, tensor in source:
                master = masters.get(name, tensor).detach().contiguous().view(-1).view(tensor.dtype)
                yield name, master[: tensor.numel()].view(tensor.shape)

        super().send_weights(weights() if masters else source, manifest, deadline, progress)


class IgnoresTheDeadlineTrainer(AcmeTrainerEngine):
    """Waits an hour for workers."""

    def join_workers(self, deadline):
        super().join_workers(Deadline(3600))


class HangsOnADeadPeerWorker(AcmeWorkerEngine):
    """Goes on waiting when the trainer has gone."""

    def receive_weights(self, update_info, load_weights):
        try:
            super().receive_weights(update_info, load_weights)
        except PeerLostError:
            threading.Event().wait(3600)


class PublishesEarlyWorker(AcmeWorkerEngine):
    """Returns before the last weight of each part is in place."""

    def receive_weights(self, update_info, load_weights):
        destinations = destinations_of(load_weights)

        def early(weights):
            if destinations is None:
                load_weights(weights)
                return
            name, tensor = weights[-1]
            load_weights.write_in_place()
            load_weights([*weights[:-1], (name, destinations[name])])
            threading.Timer(_LATE, destinations[name].copy_, [tensor.clone()]).start()

        super().receive_weights(update_info, early)


class WritesAfterTheErrorWorker(AcmeWorkerEngine):
    """Raises, and clears a weight a moment later."""

    def receive_weights(self, update_info, load_weights):
        try:
            super().receive_weights(update_info, load_weights)
        except TransferError:
            for tensor in (destinations_of(load_weights) or {}).values():
                threading.Timer(_LATE, tensor.zero_).start()
            raise


class LeaksADescriptorTrainer(AcmeTrainerEngine):
    """Opens a file at each update."""

    def send_weights(self, source, manifest, deadline, progress):
        _open.append(os.open(os.devnull, os.O_RDONLY))
        super().send_weights(source, manifest, deadline, progress)


class LeaksAThreadTrainer(AcmeTrainerEngine):
    """Starts a thread at every tenth update, which never ends."""

    _updates = 0

    def send_weights(self, source, manifest, deadline, progress):
        self._updates += 1
        if self._updates % 10 == 0:
            threading.Thread(target=threading.Event().wait, name="weight-transfer acme", daemon=True).start()
        super().send_weights(source, manifest, deadline, progress)


class KeepsItsPortTrainer(AcmeTrainerEngine):
    """Forgets to close its listener."""

    def shutdown(self):
        if self._listener is not None:
            _kept.append(self._listener.dup())
        super().shutdown()


class StaysWithItsFirstWorker(AcmeWorkerEngine):
    """Reads from the trainer that it joined first, whoever it joins later."""

    _first: Any = None

    def receive_weights(self, update_info, load_weights):
        type(self)._first = self._first or self._trainer
        self._trainer = self._first
        super().receive_weights(update_info, load_weights)


class SharesStateTrainer(AcmeTrainerEngine):
    """All trainers of a process know the same workers."""

    def __init__(self, *args):
        super().__init__(*args)
        self._workers = _workers


class BuffersEverythingWorker(AcmeWorkerEngine):
    """Keeps all weights until the last one has arrived."""

    def receive_weights(self, update_info, load_weights):
        everything = []
        super().receive_weights(
            update_info, lambda weights: everything.extend((name, tensor.clone()) for name, tensor in weights)
        )
        self.everything = everything
        load_weights(everything)


@attrs.frozen(kw_only=True)
class Pickled(AcmeUpdateInfo):
    pickled: str


class PicklesTrainer(AcmeTrainerEngine):
    update_info_cls = Pickled

    def describe_update(self, source, manifest, deadline):
        return {"pickled": base64.b64encode(pickle.dumps({"shapes": 1})).decode()}


class PicklesWorker(AcmeWorkerEngine):
    update_info_cls = Pickled

    def receive_weights(self, update_info, load_weights):
        pickle.loads(base64.b64decode(update_info.pickled))
        super().receive_weights(update_info, load_weights)


@attrs.frozen(kw_only=True)
class Talkative(AcmeUpdateInfo):
    names: list[str]


class TellsEverythingTrainer(AcmeTrainerEngine):
    """Sends a list that grows with the number of weights, in each update."""

    update_info_cls = Talkative

    def describe_update(self, source, manifest, deadline):
        return {"names": [param.name for param in manifest.params]}


class TellsEverythingWorker(AcmeWorkerEngine):
    update_info_cls = Talkative


class BlamesThePeerWorker(AcmeWorkerEngine):
    """Takes whatever its loader raises for the loss of its trainer."""

    def receive_weights(self, update_info, load_weights):
        try:
            super().receive_weights(update_info, load_weights)
        except (RuntimeError, OSError) as error:
            raise PeerLostError("The trainer has gone.", cause=str(error)) from error


class TouchesEarlyWorker(AcmeWorkerEngine):
    """Says that it writes before it knows that bytes are coming."""

    def receive_weights(self, update_info, load_weights):
        if destinations_of(load_weights) is not None:
            load_weights.write_in_place()
        super().receive_weights(update_info, load_weights)


class SendsOnTrainer(AcmeTrainerEngine):
    """Cannot be interrupted."""

    def abort_update(self):
        if not self._workers:
            super().abort_update()


class WaitsForAStoppedTrainerWorker(AcmeWorkerEngine):
    """Waits for bytes without a deadline; a connection that breaks ends that."""

    def receive_weights(self, update_info, load_weights):
        self._trainer.receive_into = self._receive_into
        super().receive_weights(update_info, load_weights)

    def _receive_into(self, buffer, deadline):
        Connection.receive_into(self._trainer, buffer, Deadline(3600))


class TakesPausesForDeathWorker(AcmeWorkerEngine):
    """Gives its trainer up when nothing has come for a moment."""

    def receive_weights(self, update_info, load_weights):
        self._trainer.receive_into = self._receive_into
        super().receive_weights(update_info, load_weights)

    def _receive_into(self, buffer, deadline):
        Connection.receive_into(self._trainer, buffer, Deadline(_MOMENT))


class JoinsForEverWorker(AcmeWorkerEngine):
    """Waits for the trainer's welcome without a deadline."""

    def init_transfer_engine(self, init_info):
        super().init_transfer_engine(attrs.evolve(init_info, timeout=3600.0))


class CannotBeInterruptedWorker(AcmeWorkerEngine):
    """Goes on joining when it is told to give up."""

    def abort_update(self):
        if self._bucket:
            super().abort_update()


class ReceivesOnWorker(AcmeWorkerEngine):
    """Goes on receiving when it is told to give up."""

    def abort_update(self):
        if not self._bucket:
            super().abort_update()


class ChecksNoTokenTrainer(AcmeTrainerEngine):
    """Lets in whoever connects."""

    def _welcome(self, connection, deadline):
        _, rank = struct.unpack("!32sI", connection.receive(36, deadline))
        connection.send(b"\1", deadline)
        self._workers[rank] = connection


class WaitsForAGoodbyeTrainer(AcmeTrainerEngine):
    """Gives an update up when the worker has had time to say so."""

    def abort_update(self):
        threading.Event().wait(_GOODBYE)
        super().abort_update()


class StaysFullWorker(AcmeWorkerEngine):
    """Writes what it received to a file, and does not try again once it could not."""

    def receive_weights(self, update_info, load_weights):
        if _full:
            raise TransferError("The disk is full.")
        try:
            with tempfile.TemporaryFile(buffering=0) as spill:
                spill.write(bytes(2**16))
                os.fsync(spill.fileno())
                spill.truncate(2**17)
        except OSError as error:
            _full.append(error)
            raise
        super().receive_weights(update_info, load_weights)


class StaysPoorWorker(AcmeWorkerEngine):
    """Takes memory for a copy, and does not try again once there was none."""

    def receive_weights(self, update_info, load_weights):
        if _poor:
            raise TransferError("There is no memory.")
        try:
            bytearray(2**27)
        except MemoryError:
            _poor.append(True)
            raise
        super().receive_weights(update_info, load_weights)


class TrustsTheClockWorker(AcmeWorkerEngine):
    """Measures its time by the clock on the wall."""

    def receive_weights(self, update_info, load_weights):
        began = time.time()

        def in_time(weights):
            if time.time() - began > _AN_HOUR:
                raise TransferTimeoutError("It is too late.")
            load_weights(weights)

        super().receive_weights(update_info, in_time)


class RaisesAtTheEndWorker(AcmeWorkerEngine):
    """Raises what it likes at the end of the stream."""

    def receive_weights(self, update_info, load_weights):
        try:
            super().receive_weights(update_info, load_weights)
        except PeerLostError:
            raise RuntimeError("end of stream") from None


class KeepsTensorsTrainer(AcmeTrainerEngine):
    """Asks for all tensors before it sends the first."""

    def send_weights(self, source, manifest, deadline, progress):
        super().send_weights(list(source), manifest, deadline, progress)


class CopiesEverythingTrainer(AcmeTrainerEngine):
    """Copies all tensors before it sends the first."""

    def send_weights(self, source, manifest, deadline, progress):
        super().send_weights([(name, tensor.clone()) for name, tensor in source], manifest, deadline, progress)


class _MovesWeights(AcmeTrainerEngine):
    """Gives the trainer's weights other memory at the first update."""

    _moved = False

    def describe_update(self, source, manifest, deadline):
        if not self._moved:
            self._moved = True
            for tensor in source.resident().values():
                self.move(tensor)
        return super().describe_update(source, manifest, deadline)


class TakesSharedWeightsTrainer(_MovesWeights):
    """Even those that a child shares."""

    def move(self, tensor):
        tensor.data = tensor.data.clone()


class SharesWithChildrenTrainer(_MovesWeights):
    """To memory that a child shares."""

    def move(self, tensor):
        tensor.share_memory_()


class FreezesStoragesTrainer(_MovesWeights):
    """To memory that torch cannot resize."""

    def move(self, tensor):
        data = bytearray(_raw(tensor.detach()).numpy())
        tensor.data = torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape)


class MakesInferenceTensorsTrainer(_MovesWeights):
    """In inference mode."""

    def move(self, tensor):
        with torch.inference_mode():
            tensor.data = tensor.data.clone()


class WritesOnAThreadWorker(AcmeWorkerEngine):
    """Loads on a thread of its own, which has not the caller's mode."""

    def receive_weights(self, update_info, load_weights):
        failures = []

        def receive():
            try:
                super(WritesOnAThreadWorker, self).receive_weights(update_info, load_weights)
            except Exception as error:  # noqa: BLE001  (raised by the caller)
                failures.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]


class ForgetsTheEmptyWorker(AcmeWorkerEngine):
    """Has nothing to do if there are no bytes."""

    def receive_weights(self, update_info, load_weights):
        if update_info.manifest.nbytes:
            super().receive_weights(update_info, load_weights)


class LendsWhatItKeepsWorker(AcmeWorkerEngine):
    """Copies into its own tensors only what differs from the last update, and lends these."""

    _last: Any = None
    _lent: Any = None

    def receive_weights(self, update_info, load_weights):
        self._last, self._lent = self._last or {}, self._lent or {}

        def cached(weights):
            for name, tensor in weights:
                if name not in self._last or not torch.equal(_raw(tensor), _raw(self._last[name])):
                    self._last[name], self._lent[name] = tensor.clone(), tensor.clone()
            load_weights([(name, self._lent[name]) for name, _ in weights])

        super().receive_weights(update_info, cached)


def _raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


class KeepsTheModelTrainer(AcmeTrainerEngine):
    """Remembers what it sent."""

    def describe_update(self, source, manifest, deadline):
        self._sent = dict(source.resident())
        return super().describe_update(source, manifest, deadline)
