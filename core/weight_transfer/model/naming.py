"""Names of weights without those of wrappers, and the rename that would make two sides agree.

What wraps a model (compilation, data parallelism, activation checkpointing, adapters) puts a part of its own into the
names of the weights. It says nothing about the model, so it comes off on both sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import nn

_ALWAYS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OF_CLASSES = {
    "module": frozenset({"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"}),
    "base_model": frozenset({"PeftModel"}),
    "model": frozenset({"BaseTuner"}),
    "base_layer": frozenset({"BaseTunerLayer"}),
}
"""Names of children that are a wrapper's, if their parent is of a class of one of these names."""


def walk(module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the module and its descendants, parents first, each under every path that leads to it.

    Yields:
        The path as in ``state_dict()``; the path without the parts of wrappers; the module. What contains itself is
        not entered again.
    """
    yield from _descend(module, "", "", ())


def joined(path: str, name: str) -> str:
    """Return the path of the child or weight called ``name`` of the module at ``path``."""
    return f"{path}.{name}" if path else name


def without_wrappers(name: str) -> str:
    """Return a name without the parts that no model has of itself, such as ``_orig_mod``."""
    return ".".join(part for part in name.split(".") if part not in _ALWAYS)


def suggested_rename(sent: Collection[str], expected: Collection[str]) -> str:
    """Return the rename under which all names that are ``sent`` are ``expected``, as code; empty if none is found.

    Only a prefix that is missing or too many is found.
    """
    ours, theirs = set(sent), set(expected)
    for name in sorted(ours - theirs)[:1]:
        for other in sorted(theirs - ours):
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                if all(f"{prefix}{each}" in theirs for each in ours):
                    return f'rename=lambda name: "{prefix}" + name'
            elif name.endswith(f".{other}"):
                prefix = name.removesuffix(other)
                if all(each.startswith(prefix) and each.removeprefix(prefix) in theirs for each in ours):
                    return f'rename=lambda name: name.removeprefix("{prefix}")'
    return ""


def _descend(
    module: nn.Module, path: str, plain: str, ancestors: tuple[nn.Module, ...]
) -> Iterator[tuple[str, str, nn.Module]]:
    yield path, plain, module
    for name, child in module._modules.items():  # noqa: SLF001  (named_children() leaves out a child that comes twice)
        if child is None or child is module or any(child is ancestor for ancestor in ancestors):
            continue
        below = plain if _is_a_wrappers(module, name, is_root=not ancestors) else joined(plain, name)
        yield from _descend(child, joined(path, name), below, (*ancestors, module))


def _is_a_wrappers(parent: nn.Module, name: str, is_root: bool) -> bool:
    """Whether ``name`` is that of a wrapper for its only child, and not of a part of the model."""
    if name in _ALWAYS:
        return True
    classes = _OF_CLASSES.get(name)
    if classes and any(base.__name__ in classes for base in type(parent).__mro__):
        return True
    alone = len(parent._modules) == 1 and not parent._parameters and not parent._buffers  # noqa: SLF001
    return is_root and name == "module" and alone
