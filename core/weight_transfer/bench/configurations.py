"""Configurations of published models, and what is left of one that is made smaller."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.bench.architectures import ITEMSIZE, Shapes, shapes_of
from weight_transfer.config.structuring import nearest
from weight_transfer.errors import ConfigError

if TYPE_CHECKING:
    from weight_transfer.bench.architectures import Config

_FOLDER = files("weight_transfer.bench") / "shapes"
_DIVIDED = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
)
_WIDEST = 64  # divisor of a model that is to fit


@attrs.frozen(kw_only=True)
class ModelShape:
    """A published model, or a part of one.

    Attributes:
        name: of the published configuration, or of the folder that it lies in.
        shapes: of its weights, by name, in order.
        layers: how many it has.
        published_layers: how many the published one has.
        width: what hidden sizes, the vocabulary and numbers of heads were divided by.
    """

    name: str
    shapes: Shapes = attrs.field(repr=False)
    layers: int
    published_layers: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return ITEMSIZE * sum(map(math.prod, self.shapes.values()))


def names() -> list[str]:
    """Return the names of the configurations that come along."""
    return sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))


def configuration(name: str) -> dict[str, Any]:
    """Return the fields of a configuration.

    Args:
        name: of one that comes along, or a path of a ``config.json``, or of the folder that it lies in.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if name in names():
        config: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        return config
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"There is no shape {name!r}, and no such file; there are {', '.join(names())}, or give the path of a "
            f"config.json{nearest(name, names()) or '.'}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}, and a configuration is an object.")
    return config


def model_shape(
    name: str, layers: int | None = None, width: int | None = None, budget: int | None = None
) -> ModelShape:
    """Return a model, as published or made smaller.

    Args:
        name: see `configuration`.
        layers: of which it keeps the first ones; None for as many as ``budget`` allows.
        width: what its widths are divided by; None for the smallest power of two with which it fits.
        budget: bytes that it may have, as far as it is not said otherwise; None for as published.

    Raises:
        ConfigError: see `configuration` and `shapes_of`; or it has no such number of layers.
    """
    config = configuration(name)
    published = _layers(config, name)
    if layers is not None and layers > published:
        raise ConfigError(f"{name} has {published} layers, fewer than {layers}.")
    shapes_of({**config, "num_hidden_layers": 1})  # that it can be made is said before it is made smaller
    least = layers or min(published, 1 + max(1, config.get("first_k_dense_replace") or 1))
    widths = [width] if width is not None else [2**power for power in range(int(math.log2(_WIDEST)) + 1)]
    for divisor in widths:
        model = _smaller(name, config, least, divisor)
        if budget is None or model.nbytes <= budget:
            break
    if layers is None:
        further = _smaller(name, config, min(published, least + 1), model.width).nbytes - model.nbytes
        spare = (published if budget is None or not further else max(0, budget - model.nbytes) // further) + least
        model = _smaller(name, config, min(published, spare), model.width)
    return model


def _title(name: str) -> str:
    """Return what to call a model whose configuration has this name or path."""
    if name in names():
        return name
    path = Path(name).resolve()
    if path.is_dir():
        return path.name
    return path.parent.name if path.name == "config.json" else path.stem


def _layers(config: Config, name: str) -> int:
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ConfigError(f"num_hidden_layers of {name} must be a whole number from 1 on, got {layers!r}.")
    return layers


def _smaller(name: str, config: Config, layers: int, width: int) -> ModelShape:
    """Return a model with fewer layers, and with narrower ones; heads stay as large as they are."""
    fields = dict(config)
    if width > 1:
        head = max(1, config["hidden_size"] // config["num_attention_heads"])
        fields["head_dim"] = config.get("head_dim") or head
        fields |= {key: max(1, config[key] // width) for key in _DIVIDED if config.get(key)}
    return ModelShape(
        name=_title(name),
        shapes=shapes_of(fields | {"num_hidden_layers": layers}),
        layers=layers,
        published_layers=config["num_hidden_layers"],
        width=width,
    )
