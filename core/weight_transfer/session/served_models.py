"""The models that a worker serves: their loaders, and where they may be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError
from weight_transfer.model.autograd_modes import Writing
from weight_transfer.model.checkpoint_loading import loader_for
from weight_transfer.model.declared import declared_for
from weight_transfer.model.info import MODEL
from weight_transfer.model.staged_loading import StagedLoader
from weight_transfer.session.update import InPlace

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.config.settings import Staging
    from weight_transfer.model.loading import Weights
    from weight_transfer.model.targets import Needs


class ServedModel:
    """A model that weights are for.

    Args:
        model: the module.
        load_weights: see `WeightReceiver`, as for the others.
        process_weights_after_loading: see there.
        ignore: see there.
        needs: see there.
        staging: see `WeightTransferConfig`.

    Attributes:
        loaders: by whether they take checkpoint format.
        writing: the mode in which its weights are written.
        in_place: where they may be written directly.
    """

    def __init__(
        self,
        model: nn.Module,
        load_weights: Callable[[Weights], object] | None,
        process_weights_after_loading: Callable[[nn.Module], object] | None,
        ignore: Sequence[str],
        needs: Needs | None = None,
        staging: Staging = "none",
    ) -> None:
        self.loaders = loader_for(model, load_weights, process_weights_after_loading, ignore)
        if needs is not None:
            self.loaders = declared_for(needs, model, self.loaders, process_weights_after_loading)
        if staging != "none":
            self.loaders = {format_: StagedLoader(loader, staging) for format_, loader in self.loaders.items()}
        self.writing = Writing(model)
        self.in_place = InPlace()


def targets_of(
    model: nn.Module,
    load_weights: Callable[[Weights], object] | None,
    process_weights_after_loading: Callable[[nn.Module], object] | None,
    others: Mapping[str, nn.Module],
    ignore: Sequence[str],
    needs: Needs | None,
    staging: Staging,
) -> dict[str, ServedModel]:
    """Return a receiver's targets by name; the arguments are those of `WeightReceiver`, and of its configuration.

    Raises:
        ConfigError: one is no module, or has no name of its own; or what is needed is declared wrongly.
    """
    if not isinstance(others, Mapping):
        raise ConfigError(f'targets: expected models by name, such as {{"draft": draft_model}}, got {others!r}.')
    first = _module("model", model)
    targets = {MODEL: ServedModel(first, load_weights, process_weights_after_loading, ignore, needs, staging)}
    return targets | {name: further_target(name, other, None, ignore, staging) for name, other in others.items()}


def further_target(
    name: str,
    model: nn.Module,
    load_weights: Callable[[Weights], object] | None,
    ignore: Sequence[str],
    staging: Staging,
) -> ServedModel:
    """Return a target beside the first one.

    Raises:
        ConfigError: it is no module, or has no name of its own.
    """
    if not isinstance(name, str) or not name or name == MODEL:
        raise ConfigError(f"targets: {name!r} is no name for a further model; {MODEL!r} is the first one's.")
    return ServedModel(_module(f"targets: {name}", model), load_weights, None, ignore, staging=staging)


def device_of(model: nn.Module) -> str:
    """Return the device on which a model lies: that of its first weight that has memory.

    Raises:
        ConfigError: all of its weights are on the meta device.
    """
    devices = [weight.device for weight in chain(model.parameters(), model.buffers())]
    found = next((device for device in devices if device.type != "meta"), None)
    if found is None and devices:
        raise ConfigError(
            "The model's weights are all on the meta device, which does not say where they will lie; say it: "
            'WeightReceiver(..., parallel_config=ParallelConfig(device="cuda:0")).'
        )
    return str(found or "cpu")


def _module(what: str, value: object) -> nn.Module:
    from torch import nn

    if not isinstance(value, nn.Module):
        raise ConfigError(f"{what}: expected the nn.Module that serves, got {type(value).__name__}.")
    return value
