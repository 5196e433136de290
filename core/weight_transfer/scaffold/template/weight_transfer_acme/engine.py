"""Both engines of the ``acme`` backend.

The trainer listens on a TCP port; each worker connects and shows the secret that came with its init info. An update is
cut into buckets by a plan that both sides derive from the manifest, so that nothing but the bytes has to travel.

After any failure the core shuts both engines down and makes new ones. So an engine needs no repair, only this: every
wait ends by its deadline or by ``abort_update``, and ``shutdown`` gives everything back.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from weight_transfer.authoring import (
    BucketPlan,
    Deadline,
    Packer,
    Unpacker,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    plan_buckets,
)
from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.errors import HandshakeError, PeerLostError

if TYPE_CHECKING:
    from weight_transfer.authoring import Manifest, ParallelConfig, WeightSource, WeightTransferConfig

_BACKEND = "acme"
_HELLO = struct.Struct("!32sI")  # the secret, and the worker's rank
_WELCOME = b"\1"
_PATIENCE = 5.0  # seconds that somebody who has connected may take to say hello


@attrs.frozen(kw_only=True)
class AcmeInitInfo(WeightTransferInitInfo):
    """What a worker needs to join. It travels as JSON over the control channel.

    Attributes:
        host: where the trainer listens.
        port: the TCP port.
        secret: 32 characters to show there.
        bucket_bytes: size of the trainer's buckets; both sides must cut alike.
    """

    host: str
    port: int
    secret: str = attrs.field(repr=False)
    bucket_bytes: int


@attrs.frozen(kw_only=True)
class AcmeUpdateInfo(WeightTransferUpdateInfo):
    """Nothing beyond the manifest. Declare fields here, and return their values from ``describe_update``."""


class Connection:
    """A connected socket, whose every operation has a deadline and whose errors are those of the core.

    Args:
        sock: the socket.
        peer: how errors call the other side.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self.peer = peer

    def send(self, data: bytes | memoryview, deadline: Deadline) -> None:
        """Send all of ``data``."""
        with self._until(deadline, "sending to"):
            self._socket.sendall(data)

    def receive_into(self, buffer: memoryview, deadline: Deadline) -> None:
        """Fill ``buffer``."""
        while buffer:
            with self._until(deadline, "waiting for"):
                count = self._socket.recv_into(buffer)
                if not count:
                    raise ConnectionError("end of stream")
            buffer = buffer[count:]

    def receive(self, count: int, deadline: Deadline) -> bytes:
        """Return the next ``count`` bytes."""
        data = bytearray(count)
        self.receive_into(memoryview(data), deadline)
        return bytes(data)

    def interrupt(self) -> None:
        """End every wait on this connection, on both sides. Callable from any thread."""
        with contextlib.suppress(OSError):  # it is not connected any more: nobody waits
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    @contextlib.contextmanager
    def _until(self, deadline: Deadline, doing: str) -> Iterator[None]:
        try:
            self._socket.settimeout(max(deadline.remaining(), 1e-3))
            yield
        except TimeoutError as error:
            raise deadline.timeout(f"{doing} {self.peer}", backend=_BACKEND, peer=self.peer) from error
        except OSError as error:
            message = "The connection broke: the other process closed it or died."
            raise PeerLostError(message, backend=_BACKEND, peer=self.peer, cause=str(error)) from error


class AcmeTrainerEngine(TrainerWeightTransferEngine[AcmeInitInfo, AcmeUpdateInfo]):
    """Packs the weights into a bucket and sends it to each worker."""

    init_info_cls = AcmeInitInfo
    update_info_cls = AcmeUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._listener: socket.socket | None = None
        self._secret = secrets.token_hex(16)
        self._expected: dict[int, str] = {}
        self._workers: dict[int, Connection] = {}
        self._bucket = bytearray()

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        host = self.config.options.host
        self._listener = socket.create_server((host, 0))
        self._expected = {slot.rank_offset + i: slot.peer for slot in slots for i in range(slot.count)}
        self._bucket = bytearray(self.config.bucket_bytes)
        port = self._listener.getsockname()[1]
        invitation = {"host": host, "port": port, "secret": self._secret, "bucket_bytes": len(self._bucket)}
        return [invitation for _ in slots]

    def join_workers(self, deadline: Deadline) -> None:
        assert self._listener is not None
        while waiting := self._expected.keys() - self._workers.keys():
            try:
                self._listener.settimeout(max(deadline.remaining(), 1e-3))
                sock, _ = self._listener.accept()
            except TimeoutError as error:
                names = ", ".join(self._expected[rank] for rank in sorted(waiting))
                raise deadline.timeout(f"waiting for {names} to connect", backend=_BACKEND, peer=names) from error
            except OSError as error:  # abort_update has shut the listener down
                raise PeerLostError("Joining was aborted.", backend=_BACKEND, cause=str(error)) from error
            self._welcome(Connection(sock, "somebody"), deadline)

    def _welcome(self, connection: Connection, deadline: Deadline) -> None:
        """Keep the connection if it shows the secret and a rank that is expected, else close it."""
        try:
            hello = connection.receive(_HELLO.size, Deadline(min(deadline.remaining(), _PATIENCE)))
            secret, rank = _HELLO.unpack(hello)
            if not hmac.compare_digest(secret, self._secret.encode()) or rank not in self._expected:
                raise HandshakeError("A stranger connected.", backend=_BACKEND)
            connection.peer = self._expected[rank]
            connection.send(_WELCOME, deadline)
        except (HandshakeError, PeerLostError, TimeoutError):  # the workers that were invited are waited for still
            connection.close()
            return
        self._workers[rank] = connection

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        plan = plan_buckets(manifest.params, len(self._bucket))
        bucket = torch.frombuffer(self._bucket, dtype=torch.uint8)
        packing = Packer(plan, [bucket]).packing(tensor for _, tensor in source)
        for slots in plan.buckets:
            nbytes = next(packing)  # the bucket is full; a weight may span several
            used = slots[-1].offset + slots[-1].nbytes
            for worker in self._workers.values():
                worker.send(memoryview(self._bucket)[:used], deadline)
            progress(nbytes)

    def abort_update(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        for worker in list(self._workers.values()):
            worker.interrupt()

    def shutdown(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._bucket = bytearray()

    @property
    def extra_memory(self) -> int:
        return len(self._bucket)


class AcmeWorkerEngine(WeightTransferEngine[AcmeInitInfo, AcmeUpdateInfo]):
    """Receives bucket after bucket, and loads each before the next one is read."""

    init_info_cls = AcmeInitInfo
    update_info_cls = AcmeUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._trainer: Connection | None = None
        self._bucket = bytearray()
        self._plan: BucketPlan | None = None
        self._unpacker: Unpacker | None = None

    def init_transfer_engine(self, init_info: AcmeInitInfo) -> None:
        deadline = Deadline(init_info.timeout)
        try:
            sock = socket.create_connection((init_info.host, init_info.port), timeout=deadline.remaining())
        except OSError as error:
            message = f"The trainer cannot be reached at {init_info.host} port {init_info.port}."
            raise PeerLostError(message, backend=_BACKEND, peer="trainer", cause=str(error)) from error
        self._trainer = Connection(sock, "trainer")
        rank = init_info.rank_offset + self.parallel_config.rank
        self._trainer.send(_HELLO.pack(init_info.secret.encode(), rank), deadline)
        if self._trainer.receive(len(_WELCOME), deadline) != _WELCOME:
            raise HandshakeError("The trainer's port does not speak this protocol.", backend=_BACKEND, peer="trainer")
        self._bucket = bytearray(init_info.bucket_bytes)

    def receive_weights(self, update_info: AcmeUpdateInfo, load_weights: LoadWeights) -> None:
        assert self._trainer is not None
        deadline = Deadline(update_info.timeout)
        if self._plan is None or self._plan.params is not update_info.manifest.params:  # else as in the last update
            self._plan = plan_buckets(update_info.manifest.params, len(self._bucket))
            self._unpacker = Unpacker(self._plan, [torch.frombuffer(self._bucket, dtype=torch.uint8)])
        assert self._unpacker is not None
        for index, slots in enumerate(self._plan.buckets):
            used = slots[-1].offset + slots[-1].nbytes
            self._trainer.receive_into(memoryview(self._bucket)[:used], deadline)
            self._unpacker.load(index, load_weights)

    def abort_update(self) -> None:
        if self._trainer is not None:
            self._trainer.interrupt()

    def shutdown(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
        self._plan, self._unpacker, self._bucket = None, None, bytearray()

    @property
    def extra_memory(self) -> int:
        return len(self._bucket)
