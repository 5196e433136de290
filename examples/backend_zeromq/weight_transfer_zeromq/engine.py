"""Both engines of the ``zeromq`` backend.

The trainer binds one ROUTER, and each worker connects a DEALER to it. Both sides derive the same buckets from the
manifest; a bucket travels as one message, each piece of a weight as one of its frames, out of the weight's own memory.
A worker confirms each message that it has taken; the trainer sends no further ahead than its buckets allow, so that
what ZeroMQ queues is bounded.

After a failure the core shuts both engines down and makes new ones, with a new port, token and key.
"""

from __future__ import annotations

import hmac
import secrets
import struct
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from weight_transfer.authoring import (
    Deadline,
    Slot,
    Unpacker,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    as_bytes,
    plan_buckets,
)
from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.errors import HandshakeError, ManifestMismatchError, PeerLostError

if TYPE_CHECKING:
    from weight_transfer.authoring import Manifest, ParallelConfig, WeightSource, WeightTransferConfig

_BACKEND = "zeromq"
_HELLO = struct.Struct("!32sI")  # the token, and the worker's rank
_WELCOME = b"welcome"
_POSITION = struct.Struct("!QI")  # serial of the update; index of a bucket, or number of buckets that were taken
_OVERHEAD = 1024  # bytes that a handshake or a header takes at most, encryption included
_SLICE = 0.05  # seconds after which a wait looks whether it was interrupted


# --8<-- [start:infos]
@attrs.frozen(kw_only=True)
class ZeroMqInitInfo(WeightTransferInitInfo):
    """What a worker needs to join. It travels as JSON over the control channel.

    Attributes:
        endpoint: the trainer's, such as ``tcp://127.0.0.1:40123``.
        token: 32 characters to show there.
        server_key: the trainer's public CURVE key for this session, in Z85; None without encryption.
        bucket_bytes: size of the trainer's buckets; both sides must cut alike.
    """

    endpoint: str
    token: str = attrs.field(repr=False)
    server_key: str | None
    bucket_bytes: int


@attrs.frozen(kw_only=True)
class ZeroMqUpdateInfo(WeightTransferUpdateInfo):
    """``serial``: counts the trainer's updates; every message says to which one it belongs."""

    serial: int
    # --8<-- [end:infos]


# --8<-- [start:port]
class Port:
    """A ZeroMQ socket whose waits end: at their deadline, when they are interrupted, and when a peer is lost.

    A socket belongs to one thread, so another thread only sets an event, ``interrupted``. A socket says nothing of
    connections that break, so its monitor is asked too. Nothing is acquired before `open`.

    Args:
        peer_of: names the peer whose connection had this file descriptor; None for a stranger's.
    """

    def __init__(self, peer_of: Callable[[int], str | None]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._peer_of = peer_of
        self.interrupted = threading.Event()

    def open(self, kind: int) -> zmq.Socket[bytes]:
        """Make the socket, a ``zmq.ROUTER`` or a ``zmq.DEALER``, and return it."""
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.linger = 0  # what is unsent when the port closes is dropped
        self.socket.reconnect_ivl = -1  # a connection that broke stays broken
        self.socket.sndhwm = 0  # `send` never waits: the queue is bounded by what the peer has confirmed
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        return self.socket

    def send(self, frames: Sequence[Any], peer: str) -> None:
        """Queue a message; its frames' memory is read until it has left."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            raise PeerLostError("The connection is gone.", backend=_BACKEND, peer=peer, cause=str(error)) from error

    def receive(self, deadline: Deadline, peer: str) -> list[zmq.Frame]:
        """Wait for the next message of ``peer``, which may be several, and return its frames."""
        while not self.interrupted.is_set():
            deadline.check(f"waiting for {peer}", backend=_BACKEND, peer=peer)
            ready, _, _ = zmq.select([self.socket, self._monitor], [], [], min(_SLICE, deadline.remaining()))
            if self._monitor in ready:
                if lost := self._peer_of(recv_monitor_message(self._monitor)["value"]):
                    raise PeerLostError("The connection broke: the process died or left.", backend=_BACKEND, peer=lost)
            elif self.socket in ready:
                return self.socket.recv_multipart(copy=False)
        raise PeerLostError("The transfer was aborted.", backend=_BACKEND, peer=peer)

    def close(self) -> None:
        """Close the sockets and end ZeroMQ's threads."""
        if self._context is not None:
            self._context.destroy()

    # --8<-- [end:port]


class ZeroMqTrainerEngine(TrainerWeightTransferEngine[ZeroMqInitInfo, ZeroMqUpdateInfo]):
    """Sends each bucket to all workers, straight out of the weights, and waits when one of them falls behind."""

    init_info_cls = ZeroMqInitInfo
    update_info_cls = ZeroMqUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._expected: dict[int, str] = {}  # names by rank, of workers that have not joined
        self._workers: dict[bytes, str] = {}  # names by ZeroMQ's identity, of those that have
        self._connections: dict[int, str] = {}  # and by file descriptor
        self._port = Port(self._connections.get)
        self._token = secrets.token_hex(16)
        self._serial = 0

    # --8<-- [start:join]
    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        socket, server_key = self._port.open(zmq.ROUTER), None
        socket.router_mandatory = True  # a message to a worker that has left is an error, and not dropped
        socket.maxmsgsize = _OVERHEAD  # no worker has more to say
        if self.config.options.encrypt:
            public, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_server, server_key = True, public.decode()
        socket.bind(f"tcp://{self.config.options.host}:0")
        self._expected = {slot.rank_offset + i: slot.peer for slot in slots for i in range(slot.count)}
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        invitation = {"endpoint": endpoint, "token": self._token, "server_key": server_key}
        return [{**invitation, "bucket_bytes": self.config.bucket_bytes} for _ in slots]

    def join_workers(self, deadline: Deadline) -> None:
        while self._expected:
            identity, *message = self._port.receive(deadline, ", ".join(self._expected.values()))
            if len(message) != 1 or len(message[0]) != _HELLO.size:
                continue  # a stranger: the workers that were invited are waited for still
            token, rank = _HELLO.unpack(message[0].buffer)
            if hmac.compare_digest(token, self._token.encode()) and rank in self._expected:
                name = self._expected.pop(rank)
                self._workers[identity.bytes] = name
                self._connections[int(message[0].get(zmq.SRCFD))] = name
                self._port.send([identity, _WELCOME], name)

    # --8<-- [end:join]
    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        self._serial += 1
        return {"serial": self._serial}

    # --8<-- [start:send]
    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        plan = plan_buckets(manifest.params, self.config.bucket_bytes)
        weights, weight = (tensor for _, tensor in source), torch.empty(0)
        taken = dict.fromkeys(self._workers, 0)
        for index, slots in enumerate(plan.buckets):
            # One bucket is the worker's own; the others may be on their way.
            self._await_taken(taken, index + 2 - self.config.buckets, deadline)
            frames: list[Any] = [_POSITION.pack(self._serial, index)]
            for slot in slots:
                if not slot.start:
                    weight = as_bytes(next(weights).contiguous())
                    if source.reuses_memory:  # the frames are read when the next weight has been asked for
                        weight = weight.clone()
                frames.append(weight[slot.start : slot.start + slot.nbytes].numpy())
            for identity, name in self._workers.items():
                self._port.send([identity, *frames], name)
            progress(sum(slot.nbytes for slot in slots))
        self._await_taken(taken, len(plan.buckets), deadline)

    def _await_taken(self, taken: dict[bytes, int], count: int, deadline: Deadline) -> None:
        """Wait until every worker has taken the first ``count`` buckets; ``taken`` says how many each has."""
        while late := [self._workers[identity] for identity, number in taken.items() if number < count]:
            identity, *message = self._port.receive(deadline, ", ".join(late))
            if identity.bytes in taken and len(message) == 1 and len(message[0]) == _POSITION.size:
                serial, number = _POSITION.unpack(message[0].buffer)
                if serial == self._serial:
                    taken[identity.bytes] = number

    # --8<-- [end:send]
    def abort_update(self) -> None:
        self._port.interrupted.set()

    def shutdown(self) -> None:
        self._port.close()


class ZeroMqWorkerEngine(WeightTransferEngine[ZeroMqInitInfo, ZeroMqUpdateInfo]):
    """Takes bucket after bucket off the queue, and loads each while the next one is on its way."""

    init_info_cls = ZeroMqInitInfo
    update_info_cls = ZeroMqUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._port = Port(lambda _: "trainer")
        self._bucket = bytearray()

    def init_transfer_engine(self, init_info: ZeroMqInitInfo) -> None:
        socket = self._port.open(zmq.DEALER)
        socket.maxmsgsize = init_info.bucket_bytes + _OVERHEAD
        if init_info.server_key is not None:
            socket.curve_serverkey = init_info.server_key.encode()
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.connect(init_info.endpoint)
        rank = init_info.rank_offset + self.parallel_config.rank
        self._port.send([_HELLO.pack(init_info.token.encode(), rank)], "trainer")
        if self._port.receive(Deadline(init_info.timeout), "trainer")[0].bytes != _WELCOME:
            raise HandshakeError("The trainer's port does not speak this protocol.", backend=_BACKEND, peer="trainer")
        self._bucket = bytearray(init_info.bucket_bytes)

    # --8<-- [start:receive]
    def receive_weights(self, update_info: ZeroMqUpdateInfo, load_weights: LoadWeights) -> None:
        deadline = Deadline(update_info.timeout)
        plan = plan_buckets(update_info.manifest.params, len(self._bucket))
        unpacker = Unpacker(plan, [torch.frombuffer(self._bucket, dtype=torch.uint8)])
        for index, slots in enumerate(plan.buckets):
            self._take(slots, _POSITION.pack(update_info.serial, index), deadline)
            self._port.send([_POSITION.pack(update_info.serial, index + 1)], "trainer")
            unpacker.load(index, load_weights)

    def _take(self, slots: Sequence[Slot], position: bytes, deadline: Deadline) -> None:
        """Copy the next message into the bucket, if it is the one that comes next, to the byte."""
        header, *frames = self._port.receive(deadline, "trainer")
        if header.bytes != position or [len(frame) for frame in frames] != [slot.nbytes for slot in slots]:
            raise ManifestMismatchError("This bucket is not the next one.", backend=_BACKEND, peer="trainer")
        for slot, frame in zip(slots, frames, strict=True):
            memoryview(self._bucket)[slot.offset : slot.offset + slot.nbytes] = frame.buffer

    # --8<-- [end:receive]
    def abort_update(self) -> None:
        self._port.interrupted.set()

    def shutdown(self) -> None:
        self._port.close()
        self._bucket = bytearray()
