"""The worker's session: takes updates, and never lets a torn one be served.

Its states are drawn in `weight_transfer.session.lifecycle`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.settings import ParallelConfig
from weight_transfer.memory.chunks import SCHEME
from weight_transfer.model.dtypes import dtypes_answer
from weight_transfer.model.info import MODEL
from weight_transfer.plugins.manager import add_observers, load_backend
from weight_transfer.plugins.read_config import load_config
from weight_transfer.session.awaited import AwaitedCalls
from weight_transfer.session.lifecycle import ANYONE, ReceiverState
from weight_transfer.session.occupied import lease_in
from weight_transfer.session.served_models import device_of, further_target, targets_of
from weight_transfer.session.told import Told
from weight_transfer.session.update import Update
from weight_transfer.session.updating import Joined
from weight_transfer.values.versions import as_version, is_same

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.model.loading import Weights
    from weight_transfer.model.targets import Needs
    from weight_transfer.values.events import Version

__all__ = ["ReceiverState", "WeightReceiver"]

_IDLE = (ReceiverState.CREATED, ReceiverState.READY, ReceiverState.FAILED)


class WeightReceiver(AwaitedCalls, Told):
    """Receives weight versions into a model of this process. Its methods may be called from any thread.

    Give it to `serve`, to a `WeightSender` of the same process, or call the methods that carry vLLM's names from your
    own RPC. Those that may take a while have a variant for asyncio: ``await receiver.aupdate_weights(...)``.

    Args:
        config: anything that `load_config` takes.
        model: the model that serves.
        parallel_config: this worker's place among the workers behind one control channel.
        load_weights: loads weights in checkpoint format; default is the model's own ``load_weights`` method, else a
            copy by name.
        process_weights_after_loading: called with each layer's module once its last parameter has arrived.
        observers: objects with hook implementations, beside the ones that the config names.
        targets: further models of this worker, such as ``{"draft": draft_model}``: ``send(..., target="draft")`` brings
            weights to one, which has a version of its own. They load by their own ``load_weights``, or by name.
        ignore: glob patterns of names that the models have and the trainer does not send, such as ``"*_extra_state"``.
        needs: of some weights of ``model``, the regions that this worker keeps and the tensors where they belong: a
            `Target`, or a list of them, by the name under which the trainer sends the weight, in whichever format. An
            empty list keeps nothing. Or a function that takes the `Manifest` and returns such a mapping; it is called
            once for each new manifest, and again when the model's tensors have moved. These weights never go to
            ``load_weights`` nor are copied by name; all others do, or are.
        version: of the weights that ``model`` has already, which is served at once; by default nothing is served before
            the first update.

    Raises:
        ConfigError: a config key is wrong, or ``model`` is no module; or what is needed is declared wrongly: two
            targets share memory, say.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        *,
        parallel_config: ParallelConfig | None = None,
        load_weights: Callable[[Weights], object] | None = None,
        process_weights_after_loading: Callable[[nn.Module], object] | None = None,
        observers: tuple[object, ...] = (),
        targets: Mapping[str, nn.Module] | None = None,
        ignore: Sequence[str] = (),
        needs: Needs | None = None,
        version: Version | None = None,
    ) -> None:
        super().__init__(load_config(config))
        self._targets = targets_of(
            model, load_weights, process_weights_after_loading, targets or {}, ignore, needs, self.config.staging
        )
        self._ignore = ignore
        parallel = parallel_config or ParallelConfig()
        self.parallel_config = attrs.evolve(parallel, device=parallel.device or device_of(model))
        self._backend = load_backend(self.config.backend)
        add_observers(self._backend, self.config.observers, observers)
        if version is not None:
            self._served.publish(MODEL, as_version(version), None)

    def add_target(self, name: str, model: nn.Module, load_weights: Callable[[Weights], object] | None = None) -> None:
        """Take in one more model, or another one in the place of one that was taken in before.

        Args:
            name: by which ``send(..., target=name)`` means it; not the first model's.
            model: the module.
            load_weights: see the class.

        Raises:
            ConfigError: it is no module, or the name is the first model's.
            LifecycleError: an update is under way, or the receiver is closed.
        """
        added = further_target(name, model, load_weights, self._ignore, self.config.staging)
        with self._operation("add_target", ANYONE, *_IDLE):
            with self._changed:
                self._targets = {**self._targets, name: added}
                self._served.forget(name)
            if self._joined is not None:
                self._joined.forget(name)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        """Join a trainer. In a later call the previous engine is shut down first; a served version stays served.

        What another session has under way is given up first, be it an update or a join: its trainer may stand still.

        Returns:
            How this worker digests what arrives, as ``{"digests": ...}``; and the names of the model's weights by
            dtype, as ``"dtypes"``, if the trainer asks and the loader copies by name.

        Raises:
            ConfigError: ``init_info`` is wrong; the sentence names the key.
            BackendUnavailableError: this machine lacks what the backend needs.
            ReplacedError: the trainer's lease is older than another's that was here.
            HandshakeError, PeerLostError, TransferTimeoutError: joining failed.
        """
        lease = lease_in(init_info)
        self._make_way(init_info, lease)
        with self._operation("init_weight_transfer_engine", ANYONE):
            self._lifecycle.hand_to(init_info.get("session"), lease)
            self._leave("a trainer initialised this worker anew")
            self._lifecycle.set(ReceiverState.CREATED)
            self._joined = Joined(self._backend.create_worker_engine(self.config, self.parallel_config), self._backend)
            try:
                info = self._joined.join(init_info)
            except BaseException as error:
                self._last_error = str(error)
                self._drop_engine()
                self._lifecycle.set(ReceiverState.CREATED)
                raise
            self._lifecycle.set(ReceiverState.READY)
            return {"digests": SCHEME, **dtypes_answer(info, self._targets[MODEL].loaders)}

    def expect_weight_update(self, session: str | None = None) -> None:
        """Do what can be done before an update that is about to start; it changes nothing that anybody sees.

        Args:
            session: see `start_weight_update`. What another trainer expects does not matter.
        """
        with self._changed:
            joined = self._joined if session in (None, self._lifecycle.session) else None
        if joined is not None:
            joined.expect()

    def start_weight_update(self, session: str | None = None) -> None:
        """Begin an update: wait until nobody samples any more, and serve no version until it is over.

        With ``staging`` the old version is served until `finish_weight_update`, which waits in its turn.

        Args:
            session: that of the init info, if it had one; also in the calls below.

        Raises:
            LifecycleError: there is no engine, or an update is under way.
            SessionError: another trainer has joined since.
            TransferTimeoutError: somebody went on sampling for 0.9 of ``config.timeout``; the version stays served.
        """
        with self._operation("start_weight_update", session, ReceiverState.READY), self._changed:
            self._update = update = Update(self.config.timeout)
            self._lifecycle.set(ReceiverState.UPDATING)
            if self.config.staging == "none":
                with update.phases.within("start"):
                    self._hold_samplers(update, "start")

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """Receive and load every weight; returns when all of them are in place and verified.

        Returns:
            A `WorkerReport` as a dict: how the bytes travelled, and warnings.

        Raises:
            LifecycleError: no update was started, or this one has its weights already.
            SessionError: another trainer has joined since.
            ConfigError: ``update_info`` is wrong; the sentence names the key.
            ManifestMismatchError: the weights do not fit the model; nothing was changed.
            TransferError: anything else; unless the model is untouched, no version is served.
        """
        with self._operation("update_weights", update_info.get("session"), ReceiverState.UPDATING):
            assert self._joined is not None and self._update is not None
            if self._update.complete:
                raise self._lifecycle.refusal("update_weights", "this update has its weights already; finish it")
            arrived = self._update
            try:
                report = self._joined.receive(arrived, update_info, self._targets, self._served)
                return report | ({"published": True} if self._publish_decided(arrived) else {})
            except BaseException as error:
                self._end_update(str(error))
                raise

    def decide_weight_update(self, update: str, digest: str = "", session: str | None = None) -> None:
        """Have the update that is under way published once it has arrived; nothing happens if it has arrived already.

        A trainer of a single worker has nobody else to wait for. `update_weights` says in its report whether it has
        published; if not, `finish_weight_update` does it, as ever.

        Args:
            update: its id: ``update`` of the update info.
            digest: of the receipt that it has to bring: `Receipt.digest`; empty if nothing is compared.
            session: see `start_weight_update`. What another trainer decides does not matter.
        """
        if type(self).finish_weight_update is not WeightReceiver.finish_weight_update:
            return  # what a subclass does at the end is to be done
        with self._changed:
            if session == self._lifecycle.session:
                self._decided = update, digest

    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any]:
        """Say which regions of some weights this worker keeps, before an update.

        Args:
            request: a `WeightNeeds` as a dict. Its manifest is sent once, as that of ``update_weights``: the updates
                that follow may name it by its digest.

        Returns:
            ``{"needs": [...]}`` with one entry: a `Regions` as `Regions.to_wire` gives it, or None if the loader cannot
            tell, so that the weights have to come whole.

        Raises:
            LifecycleError: there is no engine, or an update is under way.
            SessionError: another trainer has joined since.
            ConfigError: ``request`` is wrong; the sentence names the key.
            ManifestMismatchError: the weights do not fit the model.
            TransferTimeoutError: the loader needs the model for itself, and somebody went on sampling.
        """
        with self._operation("weight_needs", request.get("session"), ReceiverState.READY):
            assert self._joined is not None
            disturbs = any(loader.disturbs for target in self._targets.values() for loader in target.loaders.values())
            with self._without_samplers() if disturbs else nullcontext():
                return self._joined.needs(request, self._targets)

    def finish_weight_update(
        self, weight_version: Version | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        """Publish the version.

        Args:
            weight_version: its name, if none came with the update; else the same one (as text, if the trainer's channel
                turns versions into text), or None.
            session: see `start_weight_update`.
            update: id of the update that is to be published, if the trainer names it: ``update`` of the update info.

        Raises:
            StaleCommitError: it is not the one that has arrived here.
            LifecycleError: the update has not received its weights, or was announced as another version.
            SessionError: another trainer has joined since.
        """
        method = "finish_weight_update"
        with self._operation(method, session, *(() if update is not None else (ReceiverState.UPDATING,))):
            arrived = self._update
            if update is not None and (arrived is None or arrived.id != update):
                raise self._lifecycle.stale_commit(update, None if arrived is None else arrived.id)
            if self._joined is None or arrived is None or not arrived.complete:
                raise self._lifecycle.refusal(method, "its weights have not arrived; call update_weights first")
            version = arrived.version if weight_version is None else as_version(weight_version)
            if version is None:
                raise self._lifecycle.refusal(method, "the update has no version; name one")
            if arrived.version is not None:
                if not is_same(version, arrived.version, as_text=self._joined.text_versions):
                    why = f"these weights were announced as version {arrived.version!r}, not {version!r}"
                    raise self._lifecycle.refusal(method, why)
                version = arrived.version
            arrived.phases.enter("commit")
            if arrived.staged is not None:
                self._swap_in(arrived)
            self._joined.tell_end(arrived, version, None)
            self._publish(arrived, version)

    def _publish_decided(self, arrived: Update) -> bool:
        """Publish what has arrived if the trainer has decided that; return whether."""
        version = arrived.version
        with self._changed:
            if arrived.aborted:
                raise arrived.abort_error(phase="update", version=version)
            is_decided = self._decided == (arrived.id, arrived.digest)
            if version is None or arrived.staged is not None or not is_decided:
                return False
            self._publish(arrived, version)
        arrived.phases.enter("commit")
        if self._joined is not None:
            self._joined.tell_end(arrived, version, None)
        return True

    def _publish(self, arrived: Update, version: Version) -> None:
        with self._changed:
            self._update, self._last_error = None, None
            self._served.publish(arrived.target, version, arrived.id, arrived.digest)
            self._lifecycle.set(ReceiverState.READY)

    def _swap_in(self, update: Update) -> None:
        """Load what was kept apart, while nobody samples."""
        assert self._joined is not None
        self._hold_samplers(update, "finish")
        try:
            self._joined.commit(update, self._targets)
        except BaseException as error:
            self._end_update(str(error))
            raise

    def abort_weight_update(self, reason: str = "the trainer aborted the update", session: str | None = None) -> None:
        """Give up the running update or join, also from another thread, and leave the trainer: it has to join anew.

        Returns once nothing writes into the model any more.

        Args:
            reason: for errors.
            session: see `start_weight_update`.

        Raises:
            SessionError: another trainer has joined since; its update goes on.
            TransferTimeoutError: the engine went on for ``config.timeout`` seconds.
        """
        if self._lifecycle.state is not ReceiverState.CLOSED:
            self._abort("abort_weight_update", reason, session)

    def leave(self, reason: str = "the worker left its trainer") -> None:
        """End what is open with the present trainer, and let go of the engine; a served version stays served.

        That is what ``shutdown_weight_transfer_engine`` means to vLLM. A trainer may initialise the receiver again. May
        be called from any thread, in any state but ``closed``, and returns once nothing writes into the model any more.

        Args:
            reason: for errors of an update, or a join, that it ends.

        Raises:
            LifecycleError: the receiver is closed.
            TransferTimeoutError: the engine went on for ``config.timeout`` seconds.
        """
        self._abort("leave", reason, ANYONE)

    def close(self) -> None:
        """Abort a running update and shut the engine down. The model keeps its weights, and nothing here keeps it."""
        self._abort("close", "the worker is closing", ANYONE)
        with self._operation("close", ANYONE):
            self._targets = {}
            self._lifecycle.set(ReceiverState.CLOSED)

    def __enter__(self) -> WeightReceiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<WeightReceiver {self.config.backend}: {self._lifecycle.state}, version {self._served.current!r}>"
