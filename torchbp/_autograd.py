"""Two autograd.Functions from one definition of the mathematics.

No single form of a hand-written Function can do everything:

- ``forward(ctx, ...)`` is the lean form. torch.compile traces it and a call costs a few
  microseconds, but torch.func transforms and forward-mode AD refuse it.
- ``forward(...)`` with ``setup_context``, ``generate_vmap_rule`` and ``jvp`` works
  under every transform, but `apply` then costs 16 µs more (it inspects the signature at
  each call), and torch.compile refuses a Function that has a ``jvp``.

So a Function of this package is written once, in the lean form, from classmethods that
both forms use; :class:`TwoFormFunction` derives the transformable form, and
:func:`call` picks the form that suits the call.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

# Backward receives a list that it may empty, so a gradient can be freed before the
# backward ends; torch has this from 2.13 on.
HAS_BOXED_GRADS = hasattr(Function, "boxed_grads_call")
# Whether torch.compile runs a Function's backward inside torch.func. Before 2.15 it
# silently drops the backward of the first Function; a second Function is refused (2.8),
# or the gradients of its parameters are zero (2.14).
COMPILES_IN_TRANSFORMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


# One look-up instead of three: these run at every call.
is_autocast_enabled = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active


class TwoFormFunction(Function):
    """A Function in the lean form, whose subclasses get their form for torch.func as
    ``cls.transformable``.

    A subclass provides `evaluate`, `tensors_to_save` and `push_forward`, and its own
    static ``forward`` and ``backward``, which receive their class as the keyword `cls`.
    """

    transformable: ClassVar[Any]

    @classmethod
    def evaluate(cls, *inputs: Any) -> Any:
        """Return the output: the mathematics of the forward pass."""
        raise NotImplementedError

    @classmethod
    def tensors_to_save(cls, inputs: Any, output: Any) -> tuple[Tensor | None, ...]:
        """Return every tensor that backward or `push_forward` may read."""
        raise NotImplementedError

    @classmethod
    def push_forward(cls, ctx: Any, *tangents: Any) -> Any:
        """Return the tangent of the output (the jvp)."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _bind(cls, "forward")
        _bind(cls, "backward")
        if not issubclass(cls, _Transformable):
            members = {
                "__module__": cls.__module__,
                "__doc__": f"{cls.__name__} in the form that torch.func can transform.",
            }
            name = f"{cls.__name__}Transformable"
            cls.transformable = types.new_class(
                name, (_Transformable, cls), {}, lambda body: body.update(members)
            )


def _bind(cls: type, name: str) -> None:
    """Give `cls` a copy of its function `name` whose keyword `cls` is the class.

    A classmethod would not do: torch.compile passes the class to a bound ``forward``
    twice (torch 2.15). A wrapper would run at every call.
    """
    function = getattr(cls, name)
    code = function.__code__
    if "cls" not in code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]:
        return  # torch's own, or one that does not need its class
    copy = types.FunctionType(
        code, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = {"cls": cls}
    copy.__qualname__, copy.__doc__ = f"{cls.__qualname__}.{name}", function.__doc__
    setattr(cls, name, staticmethod(copy))


class _Transformable:
    """What a Function needs for torch.func, from the classmethods of its lean form."""

    generate_vmap_rule = True
    boxed_grads_call = False

    @classmethod
    def forward(cls, *inputs: Any) -> Any:
        return cls.evaluate(*inputs)  # type: ignore[attr-defined]

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # a missing tangent is None
        saved = cls.tensors_to_save(inputs, output)  # type: ignore[attr-defined]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        return cls.push_forward(ctx, *tangents)  # type: ignore[attr-defined]


def call(cls: Any, *inputs: Any) -> Any:
    """Apply `cls`, in its transformable form where :func:`transforming` is true outside
    torch.compile."""
    if not transforming():
        return cls.apply(*inputs)
    if torch.compiler.is_compiling():
        if not COMPILES_IN_TRANSFORMS:  # torch differentiates the forward operations
            return cls.evaluate(*inputs)
        return cls.apply(*inputs)
    # Within a second forward-mode transform torch silently drops the derivatives of a
    # jvp (zeros from jacfwd(jacfwd(f)), 2.8 to 2.15). Only then does torch
    # differentiate the forward operations itself.
    if _forward_levels() > 1:
        return cls.evaluate(*inputs)
    return cls.transformable.apply(*inputs)


def _forward_levels() -> int:
    """Return the number of nested torch.func forward-mode transforms."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(i.key() == torch._C._functorch.TransformType.Jvp for i in stack)


def transforming() -> bool:
    """Return whether a torch.func transform or a forward-mode level is active.

    Examples:
        >>> import torch
        >>> transforming()
        False
        >>> torch.func.vmap(lambda x: x * transforming())(torch.ones(2))
        tensor([1., 1.])
    """
    return _are_transforms_active() or forward_ad._current_level >= 0


def may_overwrite(other: Tensor) -> bool:
    """Return whether a backward may combine `other` in place with tensors of its own.

    It may if nothing records the operations (autograd, a ``TorchDispatchMode``), and if
    no transform hides in `other` a dimension that those tensors lack: torch.func does,
    and so does the vmap of ``autograd.grad(..., is_grads_batched=True)``.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()  # a mode may keep what it sees
        or _are_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(other)
    )


def varying(t: Tensor, s: Tensor) -> Tensor:
    """Return `t`, whose derivative by `s` is 0 everywhere, with that 0 in the graph.

    Otherwise a differentiated backward pass would not use `s`: autograd.grad would
    raise an error, and DistributedDataParallel would wait for the gradients of the
    layers below. Native layers give zeros.
    """
    if not (torch.is_grad_enabled() and s.requires_grad):
        return t
    # 0 with the sign of s: 0 · s would be NaN where s is infinite.
    return t + torch.zeros_like(s).copysign(s)


def times(own: Tensor, other: Tensor) -> Tensor:
    """Return own * other for an `own` that the caller made; in place where that is safe
    and saves much memory: a buffer of its size at the peak of a backward pass."""
    if own.numel() > _LARGE and may_overwrite(other):
        return own.mul_(other)
    return own * other


_LARGE = 4096  # entries; below, a buffer costs less than asking may_overwrite
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def where_positive(grad: Tensor, a: Tensor) -> Tensor:
    """Return `grad` where a > 0, else 0, for an `a` without negative numbers. A product
    would not do: 0 · inf is NaN. A NaN counts as positive, as in native ReLU."""
    if torch.compiler.is_compiling():  # this form fuses best
        return torch.where(a <= 0, torch.zeros_like(grad), grad)
    is_large = a.is_cpu and type(a) is Tensor and a.numel() > _LARGE
    if is_large and may_overwrite(grad):
        return _masked(grad, a)
    return varying(grad.masked_fill(a.logical_not(), 0), a)


def _masked(grad: Tensor, a: Tensor) -> Tensor:
    """Return the same as `where_positive` without a branch for each number: processors
    mispredict half of them, so masked_fill and where take ten times as long."""
    bits = _BITS[a.itemsize]
    # As an integer a positive float is positive; 1 and 0 become all bits and none. abs
    # removes the sign of -0.0, which is not positive, and of NaN, which counts as such.
    mask = a.abs().view(bits).clamp_(max=1).neg_()
    return mask.bitwise_and_(grad.view(bits)).view(a.dtype)


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Return autocast's dtype for the device of `input`, None if it is off."""
    # The first test is cheap; torch.is_autocast_enabled raises for the device "meta".
    if not is_autocast_enabled():
        return None
    device_type = input.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@contextmanager
def casting(input: Tensor, *others: Any) -> Iterator[list[Any]]:
    """Switch autocast off, and yield `input` and `others` in its dtype for the device
    of `input`; float64, integers and None stay as they are, as in native layers. Cast
    before the Function, so that autograd casts the gradients back."""
    dtype = autocast_dtype(input)

    def is_cast(t: Any) -> bool:
        is_float = isinstance(t, Tensor) and t.is_floating_point()
        return is_float and t.dtype != torch.float64

    with torch.autocast(input.device.type, enabled=False):
        yield [t.to(dtype) if is_cast(t) else t for t in (input, *others)]


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of `like`."""
    if autocast_dtype(like) is None:  # nullcontext is cheaper
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
