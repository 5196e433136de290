"""From a backend's name to a loaded, validated plugin, and to its classes when they are needed.

What the user chose fails loudly, with its cause and its provenance. What merely listens fails quietly: it is logged
once and skipped, unless ``WEIGHT_TRANSFER_STRICT=1``.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from inspect import isabstract
from typing import TYPE_CHECKING, Any

import attrs
import pluggy

from weight_transfer.config.structuring import nearest, structure
from weight_transfer.config.switches import strict, tracing
from weight_transfer.errors import (
    BackendConflictError,
    BackendContractError,
    BackendLoadError,
    BackendNotFoundError,
    BackendUnavailableError,
    BackendVersionError,
    ConfigError,
    PluginError,
)
from weight_transfer.plugins import hookspecs
from weight_transfer.plugins.backend import API_VERSION, Backend, Check, Probe
from weight_transfer.plugins.discovery import BACKENDS_GROUP, OBSERVERS_GROUP, BackendRef, Provider, entry_points

if TYPE_CHECKING:
    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.engine import TrainerWeightTransferEngine, WeightTransferEngine
    from weight_transfer.limit import Limit, LimitSide

logger = logging.getLogger(__name__)

PUBLISHED = {"nccl": "weight-transfer-nccl", "ipc": "weight-transfer-ipc", "rdma": "weight-transfer-rdma"}
"""Backends that this project publishes: name to distribution, for the ``pip install`` line of an error."""

ENV_OBSERVERS = "WEIGHT_TRANSFER_OBSERVERS"


@attrs.frozen(kw_only=True, eq=False)
class LoadedBackend:
    """One backend, loaded: its descriptor, its provenance and the hooks of its plugin and of the observers.

    Attributes:
        backend: the descriptor that the plugin returned.
        provider: who provides it.
        plugins: a plugin manager that holds this plugin and nothing else; `add_observers` adds listeners.
    """

    backend: Backend
    provider: Provider
    plugins: pluggy.PluginManager

    @property
    def name(self) -> str:
        return self.backend.name

    def __repr__(self) -> str:
        return f"<LoadedBackend {self.name} of {self.provider}>"

    def parse_options(self, options: Any, where: str) -> Any:
        """Return the backend's options, built from a dict by its own class; an instance of it passes through.

        Raises:
            ConfigError: a key, type or value is wrong, or the backend takes no options.
            BackendLoadError: the options class cannot be imported.
        """
        if self.backend.options is None:
            if options:
                raise ConfigError(f"{where}: backend {self.name!r} takes no options, got {options!r}.")
            return None
        cls = self._resolve(self.backend.options)
        return options if isinstance(options, cls) else structure(options, cls, where)

    def probe(self) -> Probe:
        """Ask the backend whether it works on this machine; a backend without a probe works everywhere."""
        if self.backend.probe is None:
            return Probe(available=True, reason="needs nothing beyond the core")
        try:
            answer = self._resolve(self.backend.probe)()
        except PluginError:
            raise
        except Exception as error:
            raise _load_error(self.name, self.provider, "its probe failed", error) from error
        if not isinstance(answer, Probe):
            raise self._contract(f"its probe must return a Probe, got {type(answer).__name__}")
        return answer

    def require_available(self) -> None:
        """Raise `BackendUnavailableError`, with the reason and the fix, if the probe says no."""
        answer = self.probe()
        if not answer.available:
            message = (
                f"Backend {self.name!r} ({self.provider}) cannot work on this machine: {answer.reason}. {answer.fix}"
            )
            raise BackendUnavailableError(
                message.rstrip(),
                name=self.name,
                provider=str(self.provider),
                reason=answer.reason,
                fix=answer.fix,
            )

    def create_worker_engine(
        self, config: WeightTransferConfig, parallel: ParallelConfig
    ) -> WeightTransferEngine[Any, Any]:
        """Create the worker's engine; this is the moment at which the transport's libraries are imported.

        Raises:
            BackendUnavailableError: the probe says no.
            PluginError: the class cannot be imported or is not a ``WeightTransferEngine``.
        """
        from weight_transfer.engine import WeightTransferEngine

        engine: WeightTransferEngine[Any, Any] = self._create(
            self.backend.worker_engine, WeightTransferEngine, config, parallel
        )
        return engine

    def create_trainer_engine(
        self, config: WeightTransferConfig, parallel: ParallelConfig
    ) -> TrainerWeightTransferEngine[Any, Any]:
        """Create the trainer's engine; see `create_worker_engine`."""
        from weight_transfer.engine import TrainerWeightTransferEngine

        engine: TrainerWeightTransferEngine[Any, Any] = self._create(
            self.backend.trainer_engine, TrainerWeightTransferEngine, config, parallel
        )
        return engine

    def create_limit(self, side: LimitSide) -> Limit:
        """Create one side of what bounds this backend's updates; `CopyLimit` if it does not say."""
        from weight_transfer.limit import CopyLimit, Limit

        if self.backend.limit is None:
            return CopyLimit(side)
        limit = self._resolve(self.backend.limit)(side)
        if not isinstance(limit, Limit):
            raise self._contract(f"{self.backend.limit} must return a Limit, got {type(limit).__name__}")
        return limit

    def notify(self, hook: str, event: object) -> None:
        """Call every listener of ``hook``. A listener that fails is logged once and not called again."""
        heard: pluggy.HookCaller = getattr(self.plugins.hook, hook)
        for plugin in dict.fromkeys(heard_by.plugin for heard_by in heard.get_hookimpls()):  # most often nobody
            others = [other for other in self.plugins.get_plugins() if other is not plugin]
            try:
                self.plugins.subset_hook_caller(hook, others)(event=event)
            except Exception:
                if strict():
                    raise
                name = self.plugins.get_name(plugin)
                logger.exception("observer %s failed in %s and is not called again", name, hook)
                self.plugins.unregister(plugin)

    def diagnostics(self) -> dict[str, str]:
        """Collect what the plugin and the observers have to say, for a human who looks for a fault."""
        answers = self.plugins.hook.weight_transfer_diagnostics()
        return {title: text for answer in reversed(answers) if answer for title, text in answer.items()}

    def checks(self) -> list[Check]:
        """Collect what the plugin and the observers have looked at on this machine."""
        answers = self.plugins.hook.weight_transfer_checks()
        return [check for answer in reversed(answers) if answer for check in answer]

    def _create(self, reference: str, base: type[Any], config: WeightTransferConfig, parallel: ParallelConfig) -> Any:
        from weight_transfer.model.info import redefined_fields

        self.require_available()
        cls: Any = self._resolve(reference)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise self._contract(f"{reference} must be a subclass of {base.__name__}")
        if isabstract(cls):
            raise self._contract(
                f"{reference} does not implement {', '.join(sorted(getattr(cls, '__abstractmethods__', ())))}"
            )
        engine: Any = cls
        for info in (engine.init_info_cls, engine.update_info_cls):
            taken = redefined_fields(info)
            if taken:
                names = ", ".join(map(repr, taken))
                raise self._contract(f"{info.__name__} declares {names}, which the core's own infos have; rename it")
        return engine(config, parallel)

    def _resolve(self, reference: str) -> Any:
        module, _, attribute = reference.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (Exception, SystemExit) as error:  # such as OSError, for a shared library that is missing
            raise _load_error(self.name, self.provider, f"cannot import {reference}", error) from error

    def _contract(self, reason: str) -> BackendContractError:
        return _contract_error(self.name, self.provider, reason)


def load_backend(name: str) -> LoadedBackend:
    """Load the one backend called ``name`` and no other plugin.

    Args:
        name: as in ``config.backend``.

    Raises:
        BackendNotFoundError: nobody provides it; the message lists what is installed.
        BackendConflictError: two distributions provide it; both are named.
        BackendLoadError: the plugin fails to import.
        BackendContractError: it returns something else than a `Backend` of that name.
        BackendVersionError: it was written for another API version.
    """
    ref = _select(name)
    plugins = pluggy.PluginManager(hookspecs.PROJECT)
    plugins.add_hookspecs(hookspecs)
    if tracing():
        plugins.trace.root.setwriter(lambda message: logger.info("%s", message.rstrip()))
        plugins.enable_tracing()
    try:
        plugins.register(import_module(ref.value), name=str(ref.provider))
        plugins.check_pending()
    except pluggy.PluginValidationError as error:
        raise _contract_error(name, ref.provider, _one_line(error)) from error
    except (Exception, SystemExit) as error:  # a plugin's module may raise anything at import
        raise _load_error(name, ref.provider, "its module fails to import", error) from error
    try:
        backend = plugins.hook.weight_transfer_backend()
    except Exception as error:
        raise _load_error(name, ref.provider, "its weight_transfer_backend hook failed", error) from error
    _check(backend, name, ref.provider)
    return LoadedBackend(backend=backend, provider=ref.provider, plugins=plugins)


def add_observers(loaded: LoadedBackend, names: tuple[str, ...], objects: tuple[object, ...] = ()) -> None:
    """Register the allowed observers with a loaded backend.

    Args:
        loaded: from `load_backend`.
        names: entry points of the group ``weight_transfer.observers``; the environment variable
            ``WEIGHT_TRANSFER_OBSERVERS``, a comma-separated list, replaces them (empty: none).
        objects: objects or modules with hook implementations of the caller's own.
    """
    allowed = os.environ.get(ENV_OBSERVERS)
    if allowed is not None:
        names = tuple(part.strip() for part in allowed.split(",") if part.strip())
    for name in names:
        try:
            _register_observer(loaded, name)
        except Exception:
            if strict():
                raise
            logger.warning("observer %r is skipped", name, exc_info=True)
    for observer in objects:
        _listen(loaded.plugins, observer, None)


def _listen(plugins: pluggy.PluginManager, observer: object, name: str | None) -> None:
    try:
        plugins.register(observer, name=name)
        plugins.check_pending()
    except pluggy.PluginValidationError as error:
        if plugins.is_registered(observer):  # pluggy 1.6 registers before it validates, 1.7 after
            plugins.unregister(observer)
        raise PluginError(f"Observer {name or repr(observer)} cannot listen: {_one_line(error)}.") from error


def _register_observer(loaded: LoadedBackend, name: str) -> None:
    refs = entry_points(OBSERVERS_GROUP, name)
    if not refs:
        installed = [ref.name for ref in entry_points(OBSERVERS_GROUP)]
        raise PluginError(
            f"No observer is called {name!r}; installed are {', '.join(installed) or 'none'}{nearest(name, installed)}"
        )
    if len(refs) > 1:
        raise PluginError(f"Observer {name!r} is provided twice: {' and '.join(str(ref.provider) for ref in refs)}.")
    _listen(loaded.plugins, import_module(refs[0].value), str(refs[0].provider))


def _select(name: str) -> BackendRef:
    refs = entry_points(BACKENDS_GROUP, name)
    if len(refs) == 1:
        return refs[0]
    if refs:
        providers = tuple(str(ref.provider) for ref in refs)
        raise BackendConflictError(
            f"Backend {name!r} is provided by {' and by '.join(providers)}; uninstall all but one.",
            name=name,
            providers=providers,
        )
    installed = tuple(sorted({ref.name for ref in entry_points(BACKENDS_GROUP)}))
    hint = nearest(name, installed).lstrip("; ")
    if name in PUBLISHED:
        hint = f"Install it with: pip install {PUBLISHED[name]}"
    message = (
        f"No installed distribution provides the backend {name!r}; installed are {', '.join(installed) or 'none'}."
    )
    hint = hint[:1].upper() + hint[1:]
    raise BackendNotFoundError(f"{message} {hint}".rstrip(), name=name, installed=installed, hint=hint)


def _check(backend: object, name: str, provider: Provider) -> None:
    if not isinstance(backend, Backend):
        reason = f"weight_transfer_backend must return a Backend, got {type(backend).__name__}"
        raise _contract_error(name, provider, reason)
    if backend.name != name:
        raise _contract_error(name, provider, f"its descriptor is called {backend.name!r}, its entry point {name!r}")
    major, minor = API_VERSION
    if backend.api_version[0] != major or backend.api_version[1] > minor:
        window = f"{major}.0 to {major}.{minor}"
        wanted = ".".join(map(str, backend.api_version))
        newer = backend.api_version > API_VERSION
        fix = "upgrade weight-transfer" if newer else f"upgrade {provider.distribution}"
        raise BackendVersionError(
            f"Backend {name!r} ({provider}) needs plugin API {wanted}, this core offers {window}: {fix}.",
            name=name,
            provider=str(provider),
            wanted=backend.api_version,
            window=window,
        )


def _contract_error(name: str, provider: Provider, reason: str) -> BackendContractError:
    message = f"Backend {name!r} ({provider}) breaks the plugin contract: {reason}."
    return BackendContractError(message, name=name, provider=str(provider), reason=reason)


def _load_error(name: str, provider: Provider, what: str, error: BaseException) -> BackendLoadError:
    reason = f"{type(error).__name__}: {error}"
    message = f"Backend {name!r} ({provider}) cannot be loaded: {what}."
    return BackendLoadError(message, name=name, provider=str(provider), reason=reason, cause=reason)


def _one_line(error: pluggy.PluginValidationError) -> str:
    """Pluggy's message without its first line, which repeats the plugin's name."""
    return " ".join(str(error).partition("\n")[2].split()) or str(error)
