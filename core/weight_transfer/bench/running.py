"""All that one call of ``weight-transfer bench`` measures, and the results as JSON has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.bench import surroundings
from weight_transfer.bench.configurations import ModelShape, model_shape
from weight_transfer.bench.measuring import Case, Figures, measure
from weight_transfer.bench.placing import budget, devices, require_room
from weight_transfer.bench.sweeping import points_of
from weight_transfer.errors import WeightTransferError
from weight_transfer.plugins.manager import load_backend
from weight_transfer.values.report import counted, sized

if TYPE_CHECKING:
    from weight_transfer.bench.choosing import LeftOut, Options

SCHEMA = 1
"""Of the results."""

Tell = Callable[[str, str], None]
"""Is told what is measured, and which step of that; the first time the step is empty."""

_MEASURED = ("limit", "engine", "update", "send", "phases", "timeline", "bits_equal")


def run(options: Options, left_out: Sequence[LeftOut], tell: Tell) -> Figures:
    """Measure everything; a case that fails is part of the results.

    Args:
        options: what.
        left_out: backends that cannot be.
        tell: is told what is done.

    Returns:
        What ``--json`` writes.

    Raises:
        ConfigError: a shape is not known, or does not fit.
    """
    import torch

    gpus = torch.cuda.device_count()
    cases = list(_cases(options, gpus))
    sweeps = [(over, name) for over in options.sweeps for name in options.backends]
    return {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": attrs.asdict(options),
        "machine": surroundings.machine(),
        "versions": surroundings.versions(options.backends),
        "left_out": list(left_out),
        "cases": [_measured(case, options, tell) for case in cases],
        "sweeps": [_swept(over, name, options, gpus, tell) for over, name in sweeps],
    }


def _cases(options: Options, gpus: int) -> Iterator[Case]:
    places = {name: _places(name, options, gpus) for name in options.backends}
    smallest = min(budget(*each) for each in places.values())  # all backends send the same
    for shape in options.shapes:
        model = model_shape(shape, options.layers, options.width, smallest)
        for name, (trainers, workers) in places.items():
            require_room(model, trainers, workers, options.tensor_parallel)
            yield _case(name, model, options, gpus)


def _places(name: str, options: Options, gpus: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    one_each = load_backend(name).backend.one_device_each
    return devices(options.device, options.trainers, options.workers, one_each, gpus)


def _case(name: str, model: ModelShape, options: Options, gpus: int) -> Case:
    trainers, workers = _places(name, options, gpus)
    return Case(
        model=model,
        config={"backend": name, "verify": options.verify},
        trainers=trainers,
        workers=workers,
        tensor_parallel=options.tensor_parallel,
        rounds=options.rounds,
        timeout=options.timeout,
    )


def _measured(case: Case, options: Options, tell: Tell) -> Figures:
    name, model = case.config["backend"], case.model
    layers = f"{model.layers} of {model.published_layers} layers"
    width = f", widths divided by {model.width}" if model.width > 1 else ""
    size = f"{sized(model.nbytes)} in {len(model.shapes):,} tensors"
    title = f"{name}, {model.name} ({layers}{width}; {size}) to {counted(len(case.workers))} on {options.device}"
    return {
        **_common(name, options),
        "shape": model.name,
        "layers": model.layers,
        "published_layers": model.published_layers,
        "width": model.width,
        "tensors": len(model.shapes),
        "bytes": model.nbytes,
        "trainers": len(case.trainers),
        "workers": len(case.workers),
        "tensor_parallel": case.tensor_parallel,
        "trainer_devices": list(case.trainers),
        "worker_devices": list(case.workers),
        **_outcome(case, title, tell),
    }


def _swept(over: str, name: str, options: Options, gpus: int, tell: Tell) -> Figures:
    options = attrs.evolve(options, trainers=1, workers=1, tensor_parallel=1)
    points = []
    for model in points_of(over, options.device):
        title = f"{name}, sweep over {over}: {sized(model.nbytes)} in {len(model.shapes):,} tensors on {options.device}"
        found = _outcome(_case(name, model, options, gpus), title, tell)
        kept = {key: found[key] for key in ("error", "bits_equal", "limit", "engine", "update", "send")}
        points.append({"tensors": len(model.shapes), "bytes": model.nbytes, **kept})
    return {"over": over, **_common(name, options), "trainers": 1, "workers": 1, "points": points}


def _common(name: str, options: Options) -> Figures:
    provider = load_backend(name).provider
    return {
        "backend": name,
        "provider": f"{provider.distribution} {provider.version}",
        "device": options.device,
        "rounds": options.rounds,
        "verify": options.verify,
    }


def _outcome(case: Case, title: str, tell: Tell) -> Figures:
    tell(title, "")
    try:
        return {"error": None, **measure(case, partial(tell, title))}
    except (WeightTransferError, AssertionError) as error:  # an actor that dies or hangs is an AssertionError
        nothing: dict[str, Any] = dict.fromkeys(_MEASURED)
        empty: dict[str, Any] = {"kept": [], "transport": "", "warnings": [], "extra_memory": 0, "memory": {}}
        return {"error": str(error), **empty, **nothing}
