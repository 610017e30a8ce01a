"""Between our layers and native ones, both ways; parameters are kept by identity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from torchbp.nn import MLP, BPLinear, BPLinearReLU, BPLinearSigmoid, BPLinearTanh

__all__ = ["from_native", "to_native"]

_M = TypeVar("_M", bound=nn.Module)

_NATIVE: dict[type[BPLinear], type[nn.Module] | None] = {
    BPLinear: None,
    BPLinearSigmoid: nn.Sigmoid,
    BPLinearTanh: nn.Tanh,
    BPLinearReLU: nn.ReLU,
}
_OURS = {native: ours for ours, native in _NATIVE.items() if native is not None}

# Hooks that see a module's output, and so notice where it is cut. A pre-hook sees the
# input, which the linear part keeps (pruning computes the weight in one).
_OUTPUT_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_INPUT_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def to_native(model: nn.Module) -> nn.Module:
    """The same network of ``nn.Linear`` and activation modules, sharing its parameters.

    Args:
        model: any module; it is left as it is. An :class:`torchbp.MLP` becomes one flat
            ``nn.Sequential(Linear, Sigmoid, ...)``; inside another ``nn.Sequential``
            each of our layers becomes two entries, elsewhere, or where it has a name or
            hooks on its output, a small ``nn.Sequential``.

    Raises:
        ValueError: a layer from ``define_layer``, or one with parametrizations, which
            has no native counterpart; a compiled module, or one whose instance has a
            ``forward`` of its own.

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
    return _ToNative().convert(model)


def from_native(model: nn.Module) -> nn.Module:
    """The same network of our layers, sharing its parameters.

    Args:
        model: any module; it is left as it is. Every ``nn.Linear`` becomes a
            :class:`torchbp.BPLinear`; with an ``nn.Sigmoid``, ``nn.Tanh`` or
            ``nn.ReLU`` right behind it in the same ``nn.Sequential`` the two become one
            layer, unless hooks look at what lies between them or the activation has
            options other than its defaults.

    Raises:
        ValueError: a compiled module, or one whose instance has a ``forward`` of its
            own.

    Examples:
        >>> import torch, torchbp
        >>> native = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> torchbp.from_native(native)
        Sequential(
          (0): BPLinearTanh(in_features=4, out_features=3, bias=True)
          (1): BPLinear(in_features=3, out_features=2, bias=True)
        )
    """
    return _FromNative().convert(model)


class _Converter:
    """Rebuilds a tree of modules; one that stands in two places stays one."""

    def __init__(self) -> None:
        # Each with its original, which must live as long as its id is a key.
        self.done: dict[tuple[object, ...], tuple[object, list[nn.Module]]] = {}

    def convert(self, module: nn.Module) -> nn.Module:
        (result,) = self.once([module], self.rebuild)
        return result

    def once(
        self, originals: list[nn.Module], make: Callable[..., list[nn.Module]]
    ) -> list[nn.Module]:
        """What `make` makes of the originals, made at the first call only."""
        key = (make.__name__, *map(id, originals))
        if key not in self.done:
            self.done[key] = (originals, make(*originals))
        return self.done[key][1]

    def rebuild(self, module: nn.Module) -> list[nn.Module]:
        """`module` with every layer below it converted, as a list of one."""
        if hasattr(module, "_orig_mod"):
            raise ValueError(
                "convert: expected a module that is not compiled, got one that is; "
                "convert the module that was given to torch.compile"
            )
        _check_instance(module)
        converted = self.layer(module)
        if converted is not None:
            return [converted]
        if type(module) is MLP and isinstance(self, _ToNative):
            children = self.sequence(_numbered(module.layers))
            flat = nn.Sequential(children).train(module.training)
            _copy_hooks(module, flat, (*_OUTPUT_HOOKS, *_INPUT_HOOKS))
            return [flat]
        result = _shallow(module, type(module))
        self.done[("rebuild", id(module))] = (module, [result])  # it may hold itself
        if type(module) is nn.Sequential:
            result._modules = self.sequence(module._modules)  # type: ignore[assignment]
        else:
            for name, child in module._modules.items():
                if child is not None:
                    result._modules[name] = self.convert(child)
        return [result]

    def layer(self, module: nn.Module) -> nn.Module | None:
        """The counterpart of `module` by itself, or None if it is no layer."""
        raise NotImplementedError

    def sequence(self, children: Mapping[str, Any]) -> OrderedDict[str, nn.Module]:
        """The counterparts of the children of an ``nn.Sequential``, by name. Numbers
        stay a count; a name that the user gave stays with its layer."""
        named = OrderedDict[str, nn.Module]()
        for name, module in self.counterparts(children):
            named[str(len(named)) if name.isdigit() else name] = module
        return named

    def counterparts(
        self, children: Mapping[str, Any]
    ) -> Iterator[tuple[str, nn.Module]]:
        """What each child becomes; two may come under one number."""
        raise NotImplementedError


class _ToNative(_Converter):
    def layer(self, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BPLinear):
            return None
        pair = self.once([module], self.pair)
        if len(pair) == 1:
            return pair[0]
        container = nn.Sequential(*pair).train(module.training)
        _copy_hooks(module, container, _OUTPUT_HOOKS)
        return container

    def pair(self, layer: BPLinear) -> list[nn.Module]:
        """nn.Linear, and the activation unless it is the identity."""
        _check_instance(layer)
        if type(layer) not in _NATIVE:
            raise ValueError(
                f"to_native: expected layers with a native counterpart, "
                f"got {type(layer).__name__}"
            )
        activation = _NATIVE[type(layer)]
        linear = _shallow(layer, nn.Linear)
        if activation is None:
            return [linear]
        for name in _OUTPUT_HOOKS:
            getattr(linear, name).clear()  # the container has them: they expect a
        return [linear, activation().train(layer.training)]

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
    def layer(self, module: nn.Module) -> nn.Module | None:
        return _shallow(module, BPLinear) if type(module) is nn.Linear else None

    def fuse(self, linear: nn.Module, activation: nn.Module) -> list[nn.Module]:
        _check_instance(linear)
        return [_shallow(linear, _OURS[type(activation)])]

    def counterparts(
        self, children: Mapping[str, Any]
    ) -> Iterator[tuple[str, nn.Module]]:
        rest = list(children.items())
        while rest:
            name, child = rest.pop(0)
            if rest and type(child) is nn.Linear and _fusible(child, rest[0][1]):
                (layer,) = self.once([child, rest.pop(0)[1]], self.fuse)
                yield name, layer
            else:
                yield name, self.convert(child)


def _numbered(modules: Iterable[nn.Module]) -> dict[str, nn.Module]:
    return {str(i): module for i, module in enumerate(modules)}


def _watched(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _OUTPUT_HOOKS)


def _fusible(linear: nn.Module, activation: nn.Module) -> bool:
    """Whether nobody would notice that z is no longer passed between the two."""
    return (
        type(activation) in _OURS
        and _is_default(activation)
        and not _watched(linear)
        and not _watched(activation)
        and not activation._forward_pre_hooks
    )


def _is_default(activation: nn.Module) -> bool:
    """Whether an activation computes what a default instance of its class does."""

    def options(module: nn.Module) -> dict[str, Any]:
        # inplace changes where the result lies, not its numbers.
        skip = ("training", "inplace")
        own = vars(module).items()
        return {k: v for k, v in own if k[0] != "_" and k not in skip}

    _check_instance(activation)
    return options(activation) == options(type(activation)())


def _check_instance(module: nn.Module) -> None:
    """Raise ValueError if an attribute of the instance shadows one of its class, as a
    replaced ``forward`` does, or what ``module.compile()`` leaves: a copy would go on
    calling the original, and a layer of another class would lose it."""
    cls = type(module)
    for name, value in vars(module).items():
        if hasattr(cls, name) and value is not getattr(cls, name):
            what = f"with a {name} of its own"
            if name == "_compiled_call_impl":
                what = "compiled by module.compile()"
            raise ValueError(
                f"convert: expected modules that compute what their class says, got "
                f"a {cls.__name__} {what}"
            )


def _copy_hooks(source: nn.Module, target: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        setattr(target, name, getattr(source, name).copy())
    target._is_full_backward_hook = source._is_full_backward_hook


def _shallow(module: nn.Module, cls: type[_M]) -> _M:
    """A module of class `cls` with the state of `module`: its parameters, buffers and
    children are the same objects, the dictionaries that hold them are not."""
    result = cls.__new__(cls)  # copy.copy is refused by parametrized modules
    result.__dict__ = {
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in module.__dict__.items()
    }
    return result
