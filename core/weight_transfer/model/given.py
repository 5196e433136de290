"""The callable that a user has given to load weights, and what else it may offer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.lending import lend, private_copies, require_done, require_eager
from weight_transfer.model.naming import without_wrappers
from weight_transfer.model.targets import NO_TARGETS, tensors_of
from weight_transfer.model.whereabouts import Whereabouts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weight_transfer.model.lending import Weights
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.targets import Targets


class GivenLoader:
    """Calls a user's ``load_weights``, and whatever of the following it has, too.

    * ``begin(manifest)``: an update begins. It changes nothing, and may refuse.
    * ``finish()``: all weights have come.
    * ``abort(reason, touched)``: the update that began has failed, and nothing of it will come any more; ``touched``
      says whether some of it had come. It puts back what is half done.
    * ``retains = True``: it keeps tensors beyond its call; then it is given copies of its own.
    * ``disturbs = True``: nobody may use the model while it says its targets.
    * ``warnings``: what is amiss with the last update though it is good, for reports: sentences.
    * ``targets(manifest)`` and ``destinations()``: see `RegionLoader` and `InPlaceLoader`.

    A call may return the names of the model's parameters that it has loaded, as those of vLLM's models do. One that
    offers targets or destinations has to see by itself that nothing is missing.

    Args:
        load_weights: the callable.

    Raises:
        ConfigError: it would only make something that does the work later.
    """

    def __init__(self, load_weights: Callable[[Weights], object]) -> None:
        require_eager(load_weights, "load_weights")
        self._call = load_weights
        self._loaded: set[str] | None = None
        self._all_named = True
        self._targets = _Offered(tensors_of)
        self._destinations = _Offered(lambda offered: offered.values())

    @property
    def disturbs(self) -> bool:
        return bool(getattr(self._call, "disturbs", False))

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(getattr(self._call, "warnings", ()))

    def begin(self, manifest: Manifest) -> None:
        self._loaded, self._all_named = None, True
        self._offer("begin", manifest)

    def __call__(self, weights: Weights) -> None:
        if getattr(self._call, "retains", False):
            result = self._call(private_copies(weights))
            require_done(result, self._call, "load_weights")
        else:
            result = lend(weights, self._call)
        names = _names_in(result)
        self._all_named = self._all_named and names is not None
        self._loaded = (self._loaded or set()) | (names or set())

    def require_all(self, model: nn.Module, ignore: Sequence[str], left: Collection[str]) -> None:
        """Raise if the calls have returned names, and one of the model's parameters is not among them.

        Args:
            model: whose parameters.
            ignore: glob patterns of those that nobody has to load.
            left: names of those that somebody else has loaded.

        Raises:
            ManifestMismatchError: it names the first one.
        """
        offers = hasattr(self._call, "targets") or hasattr(self._call, "destinations")
        if self._loaded is None or not self._all_named or offers:  # it was not called at all, for one
            return
        loaded = self._loaded.union(left)
        known: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            known.setdefault(id(parameter), []).append(name)
        lacking = [
            names[0]
            for names in known.values()
            if loaded.isdisjoint({*names, *map(without_wrappers, names)})
            and not any(fnmatchcase(names[0], pattern) for pattern in ignore)
        ]
        if lacking:
            raise ManifestMismatchError(
                f"Nothing was loaded into {lacking[0]!r} of the worker's model ({len(lacking)} parameters in all), by "
                "what load_weights has returned. Send what it is made of, or name it in ignore. A loader that does not "
                "know the names of the model's parameters returns None.",
                phase="update",
            )

    def finish(self) -> None:
        self._offer("finish")

    def abort(self, reason: str, touched: bool) -> None:
        self._offer("abort", reason, touched)

    def targets(self, manifest: Manifest) -> Targets:
        known: Targets = self._targets.known(self._offer("targets", manifest) or NO_TARGETS)
        return known

    def destinations(self) -> Mapping[str, Tensor] | None:
        found: Mapping[str, Tensor] | None = self._offer("destinations")
        return found if found is None else self._destinations.known(found)

    def _offer(self, method: str, *arguments: object) -> Any:
        call = getattr(self._call, method, None)
        return call(*arguments) if callable(call) else None


class _Offered:
    """A mapping that a loader offers, as another object when one of its tensors has moved.

    Args:
        tensors_of: returns the tensors of a mapping.
    """

    def __init__(self, tensors_of: Callable[[Any], Iterable[Tensor]]) -> None:
        self._tensors_of = tensors_of
        self._offered: Any = None
        self._known: Any = None
        self._whereabouts = Whereabouts(())

    def known(self, offered: Any) -> Any:
        if offered is not self._offered:
            self._known = self._offered = offered
        elif self._whereabouts.unchanged:
            return self._known
        else:
            self._known = dict(offered)
        self._whereabouts = Whereabouts(self._tensors_of(offered))
        return self._known


def _names_in(result: object) -> set[str] | None:
    """Return the names that a loader has returned; None if it has returned something else."""
    if not isinstance(result, (Set, list, tuple)) or not all(isinstance(name, str) for name in result):
        return None
    return set(result)
