"""The trainer's half: a control channel to one vLLM engine and all its workers. It imports nothing of vLLM."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weight_transfer.authoring import Deadline
from weight_transfer.control import Replies, Reply, joint_init, joint_needs, joint_report, joint_status
from weight_transfer.errors import (
    ConfigError,
    HandshakeError,
    LifecycleError,
    PeerLostError,
    SessionError,
    TransferError,
    TransferTimeoutError,
    WeightTransferError,
)
from weight_transfer_vllm.envelope import Call, Envelope
from weight_transfer_vllm.failures import foreign
from weight_transfer_vllm.servers import server_of

if TYPE_CHECKING:
    from weight_transfer_vllm.servers import PauseMode, VllmServer

logger = logging.getLogger(__name__)

DRAFT = "draft"
"""The target that is vLLM's draft model, for speculative decoding: ``sender.send(draft, target="draft")``."""

_PAUSES = ("keep", "wait", "abort")
_ANSWERING = 10.0  # seconds that an answer may be on its way when vLLM's call has ended well
_TRAILING = 1.0  # seconds, when it has ended badly: there may be none
_UNHEARD = 0.2  # seconds, when it seems not to have come to the workers
_GIVING_UP = 5.0  # seconds for what follows a failed update
_LEAVING = 2.0  # seconds to wait for that: vLLM's call of the failed update may go on
_ECHOES = (PeerLostError, TransferTimeoutError)
_Outcomes = queue.SimpleQueue[WeightTransferError | list[Any]]


class VllmChannel:
    """One vLLM engine, as a worker of a `WeightSender`: all its ranks receive.

    vLLM 0.33 has no call that ends an update, and hears nothing during one: a transfer ends by its backend or by its
    deadline. What vLLM's calls do not bring back, each worker answers over a line of its own.

    If an update fails, generation goes on if all workers still have a whole model; else it stays paused until the next
    good update.

    Args:
        server: the URL of vLLM's server, an ``LLM``, an ``AsyncLLM`` or Ray handles of one, or a `VllmServer`, such as
            ``HttpServer(url, api_key=...)``, which is closed with the channel.
        host: this host's address, at which the workers can reach this process to answer; loopback serves workers of
            the same host only.
        port: TCP port to listen on for answers; 0 takes a free one.
        pause_mode: what becomes of running requests during an update: ``"keep"`` freezes them, ``"wait"`` lets them
            end first, ``"abort"`` aborts them.
        recompute: after an update, requests that were frozen are computed anew with the new weights. False lets them
            go on with what the old ones have computed; then vLLM keeps its prefix cache, too, while they run.
        timeout: seconds that a call without a timeout of its own may take.

    Attributes:
        address: how messages call the engine.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        server: Any,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        pause_mode: PauseMode = "keep",
        recompute: bool = True,
        timeout: float = 300.0,
    ) -> None:
        if pause_mode not in _PAUSES:
            raise ConfigError(f"pause_mode: expected one of {', '.join(map(repr, _PAUSES))}, got {pause_mode!r}.")
        self._server: VllmServer = server_of(server)
        self._replies = Replies(host, port)
        self.address = self._server.address
        self._pause_mode, self._recompute, self._timeout = pause_mode, recompute, timeout
        self._count: int | None = None
        self._turn = threading.Lock()
        self._updating = False
        self._paused = False
        self._recovery: threading.Thread | None = None

    def status(self) -> dict[str, Any]:
        """Ask all workers; see `ControlChannel`.

        Raises:
            PeerLostError: vLLM is not up yet, or is gone.
            HandshakeError: it receives its weights by something else.
        """
        with self._call("status") as deadline:
            self._count = self._server.world_size(deadline)
            try:
                members = self._states("status", {"session": None}, deadline)
            except TransferError as error:
                if type(error) is not TransferError:
                    raise
                raise HandshakeError(
                    "vLLM does not take its weights through weight-transfer; start it with weight-transfer-vllm "
                    """installed and --weight-transfer-config '{"backend": "wt_NAME"}', NAME being the trainer's """
                    "backend.",
                    peer=self.address,
                    cause=str(error),
                ) from error
            return joint_status(members)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        """Have all workers join the trainer."""
        with self._call("init", init_info.get("timeout")) as deadline:
            return joint_init(self._ask("init", init_info, deadline))

    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Ask all workers what they keep; None if they do not know the model yet: a draft before its first update."""
        with self._call("weight_needs", request.get("timeout")) as deadline:
            answers = self._ask("weight_needs", request, deadline)
            return None if None in answers else joint_needs(answers)

    def start_weight_update(self, session: str | None = None) -> None:
        """Pause generation; vLLM's own start follows when the update says which model it is for, and the session.

        Raises:
            LifecycleError: a worker has not joined a trainer, or has left it: it was started anew, say.
            SessionError: another trainer has joined since.
        """
        with self._call("start") as deadline:
            members = self._states("status", {"session": session}, deadline)
            for rank, member in enumerate(members):
                if member.get("state") != "ready":
                    raise LifecycleError(
                        f"start_weight_update: rank {rank} is {member.get('state')!r}, not ready; join again.",
                        method="start_weight_update",
                        state=str(member.get("state")),
                    )
            self._require_own(members, "start_weight_update")
            self._close_session(members, deadline)
            self._paused = True
            self._server.pause(self._pause_mode, deadline)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """Have all workers receive; returns their joint report.

        The first worker's failure is raised as soon as it is heard of: others may wait for the trainer until it gives
        up. The next call then waits until vLLM has ended this one.
        """
        deadline = self._begin("update", update_info.get("timeout"))
        self._updating = True
        outcomes: _Outcomes = queue.SimpleQueue()

        def heard(reply: Reply) -> None:
            if reply.error is not None:
                outcomes.put(reply.error)

        def run() -> None:
            try:
                self._server.start(update_info.get("target") == DRAFT, deadline)
                outcomes.put(self._ask("update", update_info, deadline, heard))
            except BaseException as error:  # noqa: BLE001  (a server of the user's own may raise anything; it is reported)
                outcomes.put(foreign(error, self.address))

        running = threading.Thread(target=run, name=f"weight-transfer update {self.address}", daemon=True)
        running.start()
        outcome = self._first(outcomes, deadline)
        if isinstance(outcome, WeightTransferError):
            recovery = running, str(outcome), update_info.get("session")
            thread = threading.Thread(target=self._recover, args=recovery, daemon=True)
            thread.start()
            self._recovery = thread
            raise outcome
        self._end()
        return joint_report(outcome)

    def finish_weight_update(self, weight_version: int | str | None = None, session: str | None = None) -> None:
        """Publish the version, as text to vLLM, forget what the old weights have computed, and generate again.

        Raises:
            SessionError: another trainer has joined since.
        """
        with self._call("finish") as deadline:
            self._require_own(self._states("status", {"session": session}, deadline), "finish_weight_update")
            self._server.finish(None if weight_version is None else str(weight_version), deadline)
            self._resume(deadline)

    def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
        """Have all workers leave the trainer. While an update runs this does nothing: vLLM would not hear it.

        After one that has failed they leave by themselves; this waits a moment for that.
        """
        if self._recovery is not None:
            self._recovery.join(_LEAVING)
        if not self._updating:
            with self._call("abort") as deadline:
                self._give_up(reason, session, deadline)

    def leave(self) -> None:
        """Have all workers let go of the trainer and of what they map of its memory; they go on serving."""
        with self._call("leave") as deadline:
            self._ask("leave", {}, deadline)

    def close(self) -> None:
        """Stop listening for answers, and close the server's connections. The engine goes on as it is."""
        if self._recovery is not None:
            self._recovery.join(_GIVING_UP)
        self._replies.close()
        self._server.close()

    def __enter__(self) -> VllmChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<VllmChannel {self.address}>"

    @contextmanager
    def _call(self, what: str, timeout: float | None = None) -> Iterator[Deadline]:
        deadline = self._begin(what, timeout)
        try:
            yield deadline
        finally:
            self._end()

    def _begin(self, what: str, timeout: float | None = None) -> Deadline:
        """Wait for the call before this one."""
        deadline = Deadline(timeout or self._timeout)
        if not self._turn.acquire(timeout=deadline.remaining()):
            raise deadline.timeout(f"another call to it was under way; {what} has not begun", peer=self.address)
        return deadline

    def _end(self) -> None:
        self._updating = False
        self._turn.release()

    def _ask(
        self,
        call: Call,
        data: dict[str, Any],
        deadline: Deadline,
        heard: Callable[[Reply], object] | None = None,
    ) -> list[Any]:
        """Make a call on all workers; return their results, in the order of the ranks."""
        with self._replies.ask(heard) as asked:
            info = Envelope(call, data, asked.to).to_wire()
            try:
                (self._server.update if call == "update" else self._server.init)(info, deadline)
            except WeightTransferError as error:
                unheard = call != "update" and isinstance(error, _ECHOES)
                asked.wait(self._count, Deadline(_UNHEARD if unheard else _TRAILING))
                raise _cause(asked.came) or error from error
            replies = asked.gather(self._count, Deadline(max(_TRAILING, min(_ANSWERING, deadline.remaining()))))
        cause = _cause(replies)
        if cause is not None:
            raise cause
        return [reply.result for reply in replies]

    def _states(self, call: Call, data: dict[str, Any], deadline: Deadline) -> list[dict[str, Any]]:
        """Make a call whose results say how the workers are; see the table of `weight_transfer_vllm.envelope`."""
        members = self._ask(call, data, deadline)
        if not all(isinstance(member, dict) and {"open", "served"} <= member.keys() for member in members):
            raise HandshakeError(
                "vLLM's workers do not say how they are; install one version of weight-transfer-vllm on both sides.",
                peer=self.address,
            )
        return members

    def _require_own(self, members: Sequence[dict[str, Any]], method: str) -> None:
        """Refuse a call in the place of vLLM, whose start and finish do not ask who calls."""
        if not all(member.get("yours", True) for member in members):
            raise SessionError(
                f"{method} is refused: another trainer has joined since. A WeightSender joins again at its next send.",
                method=method,
                state=str(members[0].get("state")),
            )

    def _recover(self, running: threading.Thread, reason: str, session: str | None) -> None:
        """After a failed update has ended: have the workers give up, and generate again if they may."""
        try:
            running.join(self._timeout)
            self._give_up(reason, session, Deadline(_GIVING_UP))
        except Exception as error:  # noqa: BLE001  (told; nobody waits for this thread's result)
            logger.warning("%s: after a failed update generation stays paused: %s", self.address, error)
        finally:
            self._end()

    def _give_up(self, reason: str, session: str | None, deadline: Deadline) -> None:
        members = self._states("abort", {"reason": reason, "session": session}, deadline)
        self._close_session(members, deadline)
        if not self._paused:
            return
        if all(member["served"] for member in members):
            self._resume(deadline)
        else:
            logger.warning(
                "%s: an update failed when it had begun to change the weights; generation stays paused until the next "
                "good one",
                self.address,
            )

    def _close_session(self, members: Sequence[dict[str, Any]], deadline: Deadline) -> None:
        """Close what a failed update, or a trainer that died in one, has left open: vLLM would refuse the next start.

        A failed update raises on the last rank only, which ends the session there. The finish that ends it on the
        others then fails on the last one. It may fail on no other: vLLM stops listening at the first that does.
        """
        opened = [bool(member["open"]) for member in members]
        if any(opened):
            try:
                self._server.finish(None, deadline)
            except TransferError as error:
                if all(opened) or type(error) is not TransferError:
                    raise

    def _resume(self, deadline: Deadline) -> None:
        """Generate again, and with nothing that other weights have computed: also after a failure behind the finish."""
        if not self._server.reset_caches(self._recompute, deadline):
            logger.warning(
                "%s keeps its prefix cache: requests use it that were begun with the old weights; recompute=True would "
                "compute them anew",
                self.address,
            )
        self._server.resume(deadline)
        self._paused = False

    def _first(self, outcomes: _Outcomes, deadline: Deadline) -> WeightTransferError | list[Any]:
        """Return what happens first; of an error that may follow from another one, that one, if it comes soon."""
        try:
            first = outcomes.get(timeout=deadline.remaining() + 2 * _ANSWERING)  # each step has a deadline of its own
        except queue.Empty:
            return deadline.timeout("waiting for vLLM to end an update", peer=self.address)
        soon = Deadline(_TRAILING)
        while isinstance(first, _ECHOES):
            try:
                later = outcomes.get(timeout=soon.remaining())
            except queue.Empty:
                break
            first = later if not isinstance(later, _ECHOES) else first
        return first


def _cause(replies: Sequence[Reply]) -> WeightTransferError | None:
    """Return the error from which the others follow: when one rank fails, others lose it, or wait in vain."""
    errors = [reply.error for reply in replies if reply.error is not None]
    return next((error for error in errors if not isinstance(error, _ECHOES)), next(iter(errors), None))
