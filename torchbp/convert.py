"""Conversion between our layers and native ones, which share their parameters."""

from __future__ import annotations

import functools
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchbp.nn import ACTIVATIONS, MLP, BPLinear

__all__ = ["from_native", "to_native"]

_M = TypeVar("_M", bound=nn.Module)

_NATIVE = {layer: layer.native for layer in ACTIVATIONS.values()}
_OURS = {native: ours for ours, native in _NATIVE.items() if native is not None}
_CONVERTED = {nn.Linear, *_NATIVE, *_OURS}

# Hooks that see a module's output, z or a. Pre-hooks stay at the linear part, which has
# the same input (pruning computes the weight in a pre-hook).
_OUTPUT_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_INPUT_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def to_native(model: nn.Module) -> nn.Module:
    """Return the same network made of ``nn.Linear`` and activation modules, which share
    its parameters.

    Args:
        model: any module; it does not change. An :class:`torchbp.MLP` becomes one flat
            ``nn.Sequential(Linear, Sigmoid, ...)``. In an ``nn.Sequential`` each of our
            layers becomes two entries; elsewhere, or if it has a name or hooks on its
            output, it becomes a small ``nn.Sequential``. An MLP whose instance has
            attributes, buffers or modules of its own stays an MLP.

    Raises:
        ValueError: a layer from ``define_layer``, or one with parametrizations, which
            has no native counterpart; a compiled or scripted module, one whose instance
            has a ``forward`` of its own, or one that is not initialised yet.

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([4, 3, 2], output="identity")
        >>> native = torchbp.to_native(model)
        >>> native
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): Sigmoid()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
        >>> native[0].weight is model.layers[0].weight
        True
    """
    return _ToNative(model).result


def from_native(model: nn.Module) -> nn.Module:
    """Return the same network made of our layers, which share its parameters.

    Args:
        model: any module; it does not change. Every ``nn.Linear`` becomes a
            :class:`torchbp.BPLinear`. If the next module in the same ``nn.Sequential``
            is an activation that one of our layers has (``nn.Sigmoid``, ...), the two
            become that layer, unless hooks see the tensor between them or the
            activation's options are not its defaults.

    Raises:
        ValueError: as :func:`to_native`, but for layers of ours.

    Examples:
        >>> import torch, torchbp
        >>> native = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> torchbp.from_native(native)
        Sequential(
          (0): BPLinearTanh(in_features=4, out_features=3, bias=True)
          (1): BPLinear(in_features=3, out_features=2, bias=True)
        )
    """
    return _FromNative(model).result


class _Converter:
    """Rebuilds a tree of modules; a module that is in two places stays one module."""

    def __init__(self, model: nn.Module) -> None:
        # With the originals, which must stay alive while their ids are keys.
        self.done: dict[tuple[object, ...], tuple[object, list[nn.Module]]] = {}
        self.names = {id(module): name for name, module in model.named_modules()}
        self.copies: list[nn.Module] = []
        self.result = self.convert(model)
        for copy in self.copies:  # the list grows during the loop
            for name, value in vars(copy).items():
                if name not in ("_modules", "_parameters", "_buffers"):
                    vars(copy)[name] = self.redirected(value)

    def convert(self, module: nn.Module) -> nn.Module:
        """Return the converted `module`."""
        (result,) = self.once([module], self.rebuild)
        return result

    def once(
        self, originals: list[nn.Module], make: Callable[..., list[nn.Module]]
    ) -> list[nn.Module]:
        """Return ``make(*originals)``, called once only for the same originals."""
        key = (make.__name__, *map(id, originals))
        if key not in self.done:
            self.done[key] = (originals, make(*originals))
        return self.done[key][1]

    def rebuild(self, module: nn.Module) -> list[nn.Module]:
        """Return a copy of `module`, its layers converted, as a list of one."""
        if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                "convert: expected a module that is not compiled, got one that is; "
                "convert the module that the compiler was called with"
            )
        self.check_instance(module)
        converted = self.layer(module)
        if converted is not None:
            return [converted]
        if type(module) is MLP and isinstance(self, _ToNative) and _is_flat(module):
            return [self.flattened(module)]
        result = self.copied(module, type(module))
        # Before its children are converted: a module may contain itself.
        self.done[("rebuild", id(module))] = (module, [result])
        if type(module) is nn.Sequential:
            result._modules = self.sequence(module._modules)  # type: ignore[assignment]
        else:
            for name, child in module._modules.items():
                if child is not None:
                    result._modules[name] = self.convert(child)
        return [result]

    def check_instance(self, module: nn.Module) -> None:
        """Raise ValueError if a copy of the instance would compute something else."""
        alteration = _alteration(module)
        if alteration is not None:
            name = self.names.get(id(module))
            raise ValueError(
                "convert: expected modules that compute what their class says, got a "
                f"{type(module).__name__} {alteration}"
                + (f" (module {name!r})" if name else "")
            )

    def copied(self, module: nn.Module, cls: type[_M]) -> _M:
        """Return a module of class `cls` with the state of `module`: its parameters,
        buffers and children are the same objects, in new dictionaries."""
        result = cls.__new__(cls)  # copy.copy is refused by parametrized modules
        result.__dict__ = {
            key: value.copy() if isinstance(value, (dict, set)) else value
            for key, value in module.__dict__.items()
        }
        self.copies.append(result)
        return result

    def redirected(self, value: Any) -> Any:
        """Return an attribute's `value`, in which the network's modules, and methods of
        them (as hooks often are), are replaced by their copies."""
        if isinstance(value, nn.Module):
            return self.convert(value) if id(value) in self.names else value
        if inspect.ismethod(value):
            owner = self.redirected(value.__self__)
            same = owner is value.__self__
            return value if same else MethodType(value.__func__, owner)
        if type(value) is functools.partial:
            parts = (value.func, value.args, value.keywords)
            func, args, keywords = map(self.redirected, parts)
            return functools.partial(func, *args, **keywords)
        if type(value) in (list, tuple, set):
            items = [self.redirected(item) for item in value]
            same = all(map(operator.is_, items, value))
            return value if same else type(value)(items)
        if type(value) in (dict, OrderedDict):
            items = [self.redirected(item) for item in value.values()]
            same = all(map(operator.is_, items, value.values()))
            return value if same else type(value)(zip(value, items, strict=True))
        return value

    def layer(self, module: nn.Module) -> nn.Module | None:
        """Return the counterpart of `module`, or None if it is no layer."""
        raise NotImplementedError

    def sequence(self, children: Mapping[str, Any]) -> OrderedDict[str, nn.Module]:
        """Return the counterparts of the children of an ``nn.Sequential``, by name:
        numbers count the new children, and a name that the user gave stays."""
        named = OrderedDict[str, nn.Module]()
        for name, module in self.counterparts(children):
            named[str(len(named)) if name.isdigit() else name] = module
        return named

    def counterparts(
        self, children: Mapping[str, Any]
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that each child becomes, with the child's name."""
        raise NotImplementedError


class _ToNative(_Converter):
    """Replaces our layers by native ones."""

    def layer(self, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BPLinear):
            return None
        pair = self.once([module], self.pair)
        if len(pair) == 1:
            return pair[0]
        container = nn.Sequential(*pair).train(module.training)
        return self.with_hooks(container, module, _OUTPUT_HOOKS)

    def pair(self, layer: BPLinear) -> list[nn.Module]:
        """Return nn.Linear, and the activation unless it is the identity."""
        self.check_instance(layer)
        if type(layer) not in _NATIVE:
            raise ValueError(
                f"to_native: expected layers with a native counterpart, "
                f"got {type(layer).__name__}"
            )
        activation = _NATIVE[type(layer)]
        linear = self.copied(layer, nn.Linear)
        if activation is None:
            return [linear]
        for name in _OUTPUT_HOOKS:
            getattr(linear, name).clear()  # they expect a, so the container has them
        return [linear, activation().train(layer.training)]

    def flattened(self, model: MLP) -> nn.Module:
        """Return an MLP as one nn.Sequential."""
        flat = nn.Sequential(self.sequence(_numbered(model.layers)))
        flat.training = model.training
        return self.with_hooks(flat, model, _OUTPUT_HOOKS + _INPUT_HOOKS)

    def with_hooks(
        self, target: nn.Module, source: nn.Module, names: Iterable[str]
    ) -> nn.Module:
        """Give `target` the hooks of `source` in the attributes `names`; return it."""
        for name in names:
            setattr(target, name, getattr(source, name).copy())
        target._is_full_backward_hook = source._is_full_backward_hook
        self.copies.append(target)
        return target

    def counterparts(
        self, children: Mapping[str, Any]
    ) -> Iterator[tuple[str, nn.Module]]:
        for name, child in children.items():
            layer = isinstance(child, BPLinear) and not _watched(child)
            if layer and name.isdigit():
                yield from ((name, part) for part in self.once([child], self.pair))
            else:
                yield name, self.convert(child)


class _FromNative(_Converter):
    """Replaces native layers by ours."""

    def layer(self, module: nn.Module) -> nn.Module | None:
        return self.copied(module, BPLinear) if type(module) is nn.Linear else None

    def fuse(self, linear: nn.Module, activation: nn.Module) -> list[nn.Module]:
        """Return the layer of ours that computes both, as a list of one."""
        self.check_instance(linear)
        self.check_instance(activation)
        return [self.copied(linear, _OURS[type(activation)])]

    def counterparts(
        self, children: Mapping[str, Any]
    ) -> Iterator[tuple[str, nn.Module]]:
        waiting = list(children.items())
        while waiting:
            name, child = waiting.pop(0)
            is_linear = waiting and type(child) is nn.Linear
            if is_linear and _fusible(child, waiting[0][1]):
                (layer,) = self.once([child, waiting.pop(0)[1]], self.fuse)
                yield name, layer
            else:
                yield name, self.convert(child)


def _fusible(linear: nn.Module, activation: nn.Module) -> bool:
    """Return whether the two may become one layer: no hook sees z between them, and the
    activation has no state or options of its own."""
    return (
        type(activation) in _OURS
        and activation.training == linear.training
        and not _watched(linear)
        # `inplace` changes the memory of the result, not its numbers.
        and _is_new(activation, type(activation)(), ("training", "inplace"))
    )


def _is_flat(model: MLP) -> bool:
    """Return whether an MLP has nothing but its layers and hooks, which an
    nn.Sequential can have, too."""
    hooks = (*_OUTPUT_HOOKS, *_INPUT_HOOKS, "_is_full_backward_hook")
    return (
        model._modules.keys() == {"layers"}
        and _is_new(model, nn.Module(), ("training", "sizes", "_modules", *hooks))
        and _is_new(model.layers, nn.ModuleList(), ("training", "_modules"))
    )


def _is_new(module: nn.Module, new: nn.Module, ignored: Iterable[str]) -> bool:
    """Return whether an instance has the attributes of a `new` one of its class, apart
    from the `ignored` ones and a replaced call, which is another error."""
    own, fresh = (
        {k: v for k, v in vars(m).items() if k not in ignored} for m in (module, new)
    )
    for name in ("forward", "_compiled_call_impl"):
        own.pop(name, None)
    return own.keys() == fresh.keys() and all(
        type(own[k]) is type(fresh[k]) and own[k] == fresh[k] for k in fresh
    )


def _alteration(module: nn.Module) -> str | None:
    """Describe what makes an instance compute something else than its class, or return
    None. A copy would call the original's ``forward``; a converted layer would lose
    it."""
    cls = type(module)
    tensors = [*module._parameters.values(), *module._buffers.values()]
    if any(is_lazy(t) for t in tensors if t is not None):
        return "that is not initialised yet; give it a batch first"
    for name, value in vars(module).items():
        if name == "_compiled_call_impl" and value is not None:
            return "compiled by module.compile()"
        # An attribute that overrides the class's is an option, except in a layer, which
        # becomes one of another class without that option.
        is_call = callable(getattr(nn.Module, name, None))
        is_layer = cls in _CONVERTED and value is not getattr(cls, name, value)
        if is_call or is_layer:
            return f"with a {name} of its own"
    return None


def _numbered(modules: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return modules by name, as an nn.Sequential has them."""
    return {str(i): module for i, module in enumerate(modules)}


def _watched(module: nn.Module) -> bool:
    """Return whether hooks see the module's output."""
    return any(getattr(module, name) for name in _OUTPUT_HOOKS)
