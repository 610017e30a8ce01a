"""Classes made at run time, and the checks of a user's own σ, σ', C_x and ∇C_x."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T", bound=type)


def make_class(name: str, base: _T, members: dict[str, Any]) -> _T:
    """Return a subclass of `base` with its metaclass, as a class statement makes it."""
    return types.new_class(name, (base,), {}, lambda body: body.update(members))  # type: ignore[return-value]


def check_name(name: Any) -> None:
    """Raise ValueError unless `name` can name a class."""
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name: expected a Python identifier, got {name!r}")


def place(cls: _T, depth: int = 2) -> _T:
    """Set the module of `cls` to that of the caller's caller, as namedtuple does, so
    that ``SiLU = define_layer("SiLU", ...)`` at module level can be pickled."""
    cls.__module__ = sys._getframe(depth).f_globals.get("__name__", "__main__")
    cls.__qualname__ = cls.__name__
    return cls


# ---------------------------------------------------------------- σ and σ'


def check_sigma(
    sigma: Any, sigma_prime: Any, saves: str
) -> tuple[Callable[[Tensor], Tensor], float]:
    """Check a user's σ and σ'; return a σ whose result shares no memory with z, and the
    largest slope |σ'(z)| for |z| <= 10."""
    shares_memory = _check_entrywise("sigma", sigma)
    _check_entrywise("sigma_prime", sigma_prime)
    z = torch.linspace(-10, 10, 2001, dtype=torch.float64, device="cpu")
    with torch.enable_grad():  # z on both sides of 0: a σ may have two formulas
        a = sigma(z)
        check_reads_no_parameter("sigma", sigma, a)
        slopes = sigma_prime(a if saves == "a" else z).abs()
        check_reads_no_parameter("sigma_prime", sigma_prime, slopes)
    slopes = slopes[slopes.isfinite()]

    def own_sigma(z: Tensor) -> Tensor:
        """Return σ(z) in new memory."""
        return sigma(z).clone() if shares_memory else sigma(z)

    return own_sigma, slopes.max().item() if len(slopes) else 1.0


def _check_entrywise(role: str, f: Any) -> bool:
    """Try σ or σ' on five numbers that lie in the range of every usual σ; return
    whether the result shares memory with the argument."""
    check_callable(role, f)
    probe = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, device="cpu")
    argument = probe.clone()
    with torch.enable_grad():
        result = f(argument)
    _check_is_tensor(role, result)
    check_reads_no_parameter(role, f, result)
    if result.shape != probe.shape or result.dtype != probe.dtype:
        raise ValueError(
            f"{role}: expected an entrywise function, (5,) float64 -> (5,) float64, "
            f"got {tuple(result.shape)} {result.dtype}"
        )
    with torch.no_grad():
        singly = torch.cat([f(probe[i : i + 1].clone()) for i in range(5)])
    if not torch.allclose(singly, result, equal_nan=True):
        raise ValueError(
            f"{role}: expected an entrywise function, got one whose entries depend on "
            "each other"
        )
    if not torch.equal(argument, probe):
        raise ValueError(f"{role}: expected its argument unchanged, got it overwritten")
    return bool(result.data_ptr() == argument.data_ptr())


# ---------------------------------------------------------------- C_x and ∇C_x


def check_cost(cost: Any, grad: Any) -> dict[str, Any]:
    """Check a user's C_x and ∇C_x on three outputs. If they take another number only,
    return the members of their Function that check them at the first call."""
    if all([_takes_three("cost", cost), _takes_three("grad", grad)]):
        return {}
    return {"is_checked": False, "check_parts": classmethod(_check_parts)}


def _takes_three(role: str, f: Any) -> bool:
    """Check a user's C_x or ∇C_x on three outputs; return False if it takes another
    number only, for example because it has a weight for each class."""
    check_callable(role, f)
    probe = torch.linspace(0.1, 0.9, 6, dtype=torch.float64, device="cpu").reshape(2, 3)
    try:
        with torch.no_grad():
            f(probe.clone(), probe.flip(0))
    except (RuntimeError, IndexError, ValueError, AssertionError):
        # Errors of torch about shapes, dtypes and devices, or of the user's own check.
        check_reads_no_parameter(role, f)
        return False
    _check_part(role, f, probe)
    return True


def _check_parts(cls: Any, v: Tensor) -> None:
    """Check C_x and ∇C_x of the Function `cls` on as many outputs as `v` has, once."""
    if not _has_numbers(v) or cls.is_checked:  # in this order for torch.compile
        return
    numbers = torch.linspace(0.1, 0.9, 2 * v.shape[-1], dtype=v.dtype, device=v.device)
    with torch.inference_mode(False):  # inference mode hides requires_grad
        probe = numbers.clone().reshape(2, -1)
        _check_part("cost", cls.per_example, probe)
        _check_part("grad", cls.nabla, probe)
    cls.is_checked = True


def _has_numbers(v: Tensor) -> bool:
    """Return whether numbers can be read: not on meta, nor while a compiler or a mode
    traces."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or v.is_meta
    )


def _check_part(role: str, f: Any, probe: Tensor) -> None:
    """Try a user's C_x or ∇C_x on the two rows of `probe`."""
    K = probe.shape[1]
    shape = (2,) if role == "cost" else (2, K)
    with torch.enable_grad():
        arguments = probe.clone(), probe.flip(0)
        result = f(*arguments)
    _check_is_tensor(role, result)
    check_reads_no_parameter(role, f, result)
    if tuple(result.shape) != shape:
        raise ValueError(
            f"{role}: expected shape {shape} from outputs and targets (2, {K}), "
            f"got {tuple(result.shape)}"
        )
    if not (
        torch.equal(arguments[0], probe) and torch.equal(arguments[1], probe.flip(0))
    ):
        raise ValueError(
            f"{role}: expected its arguments unchanged, got one overwritten"
        )


# ---------------------------------------------------------------- any of the four


def check_callable(role: str, f: Any) -> None:
    """Raise TypeError unless `f` is callable."""
    if not callable(f):
        raise TypeError(f"{role}: expected a callable, got {type(f).__name__}")


def _check_is_tensor(role: str, result: Any) -> None:
    """Raise TypeError unless the `result` of a user's function is a tensor."""
    if not isinstance(result, Tensor):
        raise TypeError(f"{role}: expected it to return a Tensor, got {result!r}")


def check_reads_no_parameter(role: str, f: Any, result: Tensor | None = None) -> None:
    """Raise ValueError if `result`, which `f` returned for arguments that do not
    require grad, requires grad: `f` reads a tensor that would never get its gradient.
    Without a result, raise it if any tensor that `f` can name requires grad."""
    if result is None:
        names = [name for name, t in _tensors_read(f) if t.requires_grad]
    elif result.requires_grad:
        leaves = _leaves(result)
        names = [n for n, t in _tensors_read(f) if any(t is leaf for leaf in leaves)]
        names = names or [f"a tensor of shape {tuple(t.shape)}" for t in leaves]
    else:
        return
    if names:
        raise ValueError(
            f"{role}: expected a function of its arguments alone, got one that reads "
            f"{', '.join(names)}, which requires grad and would never get its "
            "gradient; give its values by .detach()"
        )


def _leaves(result: Tensor) -> list[Tensor]:
    """Return the leaf tensors to which autograd would send gradients of `result`."""
    if result.grad_fn is None:
        return [result]
    leaves: list[Tensor] = []
    waiting: list[Any] = [result.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [below for below, _ in node.next_functions]
    return leaves


def _tensors_read(f: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a callable can name, with their names: in its closure, its
    globals, its defaults, the attributes of its object, the arguments bound to it, and
    in the functions among these."""
    waiting = [("", f)]
    # With the values: the id of an object that is gone may be used again.
    seen: dict[int, Any] = {}
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, nn.Module):
            yield from ((_member(name, n), p) for n, p in value.named_parameters())
        else:
            waiting += _parts(name, value)


def _parts(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return the values that `value` holds directly, each with its name."""
    if isinstance(value, functools.partial):
        bound = [(f"{name}({i})", a) for i, a in enumerate(value.args)]
        return [*bound, *value.keywords.items(), (name, value.func)]
    if inspect.ismethod(value):
        return [("self", value.__self__), (name, value.__func__)]
    if inspect.isfunction(value):
        return [] if value.__module__.partition(".")[0] == "torch" else _names(value)
    if isinstance(value, (list, tuple)):
        return [(f"{name}[{i}]", v) for i, v in enumerate(value)]
    if isinstance(value, dict):
        return [(f"{name}[{k!r}]", v) for k, v in value.items()]
    if inspect.ismodule(value):
        of_module = vars(value).items()
        return [(_member(name, k), v) for k, v in of_module if isinstance(v, Tensor)]
    if inspect.isclass(value) or not hasattr(value, "__dict__"):
        return []
    return [(_member(name, k), v) for k, v in vars(value).items()]


def _names(f: Any) -> list[tuple[str, Any]]:
    """Return the globals and the closure's variables that a function reads, and its
    defaults."""
    try:
        variables = inspect.getclosurevars(f)
    except ValueError:  # a variable that has no value yet
        return []
    defaults = {k: p.default for k, p in inspect.signature(f).parameters.items()}
    outer = [*variables.globals.items(), *variables.nonlocals.items()]
    return [*outer, *defaults.items()]


def _member(name: str, attribute: str) -> str:
    """Return the name of an attribute, qualified by that of its object if it has
    one."""
    return f"{name}.{attribute}" if name else attribute
