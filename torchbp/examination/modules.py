"""A module as a function of its inputs and its parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class ModuleFunction:
    """A module as a function of its inputs and then of its parameters.

    Each call sets the tensors on a new copy of the module, which lives as long as the
    graph does: a module that computes again in its backward finds them set.

    Args:
        module: the module; it is not changed.
        inputs: how many of the arguments are inputs.
        takes_parameters: whether the rest replaces its parameters.
    """

    def __init__(
        self, module: nn.Module, inputs: int, takes_parameters: bool = True
    ) -> None:
        self.module, self.inputs = module, inputs
        self.parameters = list(module.parameters()) if takes_parameters else []
        known = {id(p) for p in self.parameters}
        state = [*module.parameters(), *module.buffers()]
        self.fixed = [t for t in state if id(t) not in known]

    def __call__(self, *arguments: Any) -> Any:
        """Call a copy of the module, its parameters being the last arguments."""
        values = self._values(arguments)
        try:
            # Wherever the copy refers to a parameter it finds the one of the memo.
            copied = copy.deepcopy(self.module, {id(old): new for old, new in values})
        except Exception:  # what a module refers to may be impossible to copy
            return self.functional(*arguments)
        return copied(*arguments[: self.inputs])

    def functional(self, *arguments: Any) -> Any:
        """The same by functional_call, which torch.compile can trace."""
        new = {id(old): t for old, t in self._values(arguments)}
        state = [*self.module.named_parameters(), *self.module.named_buffers()]
        values = {name: new[id(t)] for name, t in state}
        return functional_call(self.module, values, arguments[: self.inputs])

    def _values(self, arguments: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of the module with its replacement: buffers follow the arguments
        in dtype and device."""
        parameters = arguments[self.inputs :]
        tensors = [t for t in (*parameters, *arguments) if isinstance(t, Tensor)]
        like = next((t for t in tensors if t.is_floating_point()), None)

        def following(t: Tensor) -> Tensor:
            if like is None:
                return t.detach().clone()
            dtype = like.dtype if t.is_floating_point() else t.dtype
            return t.detach().to(like.device, dtype, copy=True)

        pairs = list(zip(self.parameters, parameters, strict=False))
        return [*pairs, *((t, following(t)) for t in self.fixed)]
