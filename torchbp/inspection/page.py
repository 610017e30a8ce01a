"""A recorded backward pass as one HTML file, for a lesson.

The file holds everything: numbers, script and style. Its Content-Security-Policy
forbids every request. `page.html` is the template, `page.js` computes and draws,
`page.css` is the style; this module records the pass and writes the three into one.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchbp import costs, functional
from torchbp._files import write_atomically
from torchbp._version import __version__
from torchbp.explicit import Rates
from torchbp.inspection.comparison import is_chain
from torchbp.inspection.lessons import LESSONS, steps
from torchbp.inspection.observation import backward_pass
from torchbp.inspection.records import Record
from torchbp.nn import ACTIVATIONS, BPLinear, check_takes

__all__ = ["save_page"]

# Up to so many weights, the page has the recorded gradients themselves and lets the
# reader change the network; above, it has their norms and forms them from δ and a.
FEW_WEIGHTS = 500
MOST_NUMBERS = 5_000_000  # up to 27 MB as float32
SIGMAS = {layer.function: name for name, layer in ACTIVATIONS.items()}
COSTS = {cost.function: name for name, cost in costs.COSTS.items()}


def save_page(
    path: str | os.PathLike[str],
    model: nn.Module,
    cost: Any,
    input: Tensor,
    target: Tensor,
    lr: float,
) -> None:
    """Record one forward and backward pass of `model`, and write the page about it.

    The page explains the pass equation by equation, BP1-BP4 and the update, with the
    numbers of any neuron, weight and example. On the page, a chain of built-in layers
    with up to 500 weights and a built-in cost can be changed and trained. First of all
    the page computes the recorded quantities again, in float64, and shows a warning
    where the two differ.

    The pass runs in evaluation mode; the model, its ``.grad`` and its mode do not
    change. Of other modules between our layers the page has only the names.

    Args:
        path: the file's path; it is written whole or not at all.
        model: any module with hand-written layers.
        cost: a cost of this package, or any callable with `takes`.
        input, target: what the model and the cost take: a mini-batch, since all of it
            is in the file.
        lr: η, for the update.

    Raises:
        TypeError: an argument is of another type, or the cost does not say what it
            takes.
        ValueError: `model` has no hand-written layer, is compiled, or C depends on none
            of its layers; the cost does not fit the last layer; the batch has no
            example, or its pass has more than 5 million numbers; `lr` is negative or
            not finite.
        RuntimeError: under torch.compile or a torch.func transform.
        OSError: the file cannot be written.

    Examples:
        >>> import tempfile, torch, torchbp
        >>> model = torchbp.MLP([2, 3, 1])
        >>> x, y = torch.rand(5, 2), torch.rand(5, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "step.html")
        ...     save_page(path, model, torchbp.QuadraticCost(), x, y, lr=3.0)
        ...     path.read_text(encoding="utf-8")[:15]
        '<!doctype html>'
    """
    if not isinstance(path, (str, os.PathLike)):  # an integer would be a descriptor
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    check_takes(model, cost)
    costs.check_tensors(input, target)
    Rates(lr).check_dtype(model)
    networks = [_network(model, cost, input, target, float(lr))]
    for lesson in LESSONS:
        example = lesson.network()
        recorded = _network(example[0], costs.QuadraticCost(), *example[1:], lesson.lr)
        words = {"title": lesson.title, "text": lesson.text, "acts": lesson.acts}
        networks.append({**recorded, **words})
    page = _page({"networks": networks})
    write_atomically(path, page.encode(errors="xmlcharrefreplace"))


def _network(
    model: nn.Module, cost: Any, input: Tensor, target: Tensor, lr: float
) -> dict[str, Any]:
    """One recorded pass, ready for JSON."""
    for name, t in (("input", input), ("target", target)):
        if t.numel() == 0:
            raise ValueError(
                f"{name}: expected at least one example, got shape {tuple(t.shape)}"
            )
    with torch.inference_mode(False):
        trace, output, C = backward_pass(model, cost, input.clone(), target.clone())
    records = list(trace)
    if all(record.delta is None for record in records):
        raise ValueError("model: expected layers of ours that C depends on, got 0")
    numbers = sum(map(_size, records))
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"input: expected a pass of at most {MOST_NUMBERS:,} recorded numbers, got "
            f"{numbers:,}"
        )
    chain = is_chain(model)
    few = sum(record.weight.numel() for record in records) <= FEW_WEIGHTS
    function = getattr(cost, "function", None)
    kind = COSTS.get(function, "other")  # type: ignore[arg-type]
    limits = [torch.finfo(record.a.dtype) for record in records]
    y = costs.target_rows(output, target) if function is not None else None
    network = {
        "title": f"{type(model).__name__} {_sizes(records)}",
        "dtype": str(records[-1].a.dtype).removeprefix("torch."),
        "eps": max(limit.eps for limit in limits),
        "tiny": max(limit.tiny for limit in limits),
        "max": min(limit.max for limit in limits),
        "n": output.shape[:-1].numel(),
        "lr": lr,
        "chain": chain,
        "cost": kind,
        "cost_name": getattr(cost, "__name__", type(cost).__name__),
        "C": _packed(C),
        "Y": _packed(_rows(y)),
        "labels": None if target.is_floating_point() else target.flatten().tolist(),
        "layers": [
            _layer(model, record, above, chain, few)
            for record, above in zip(records, [None, *records], strict=False)
        ],
        "fixed": _why_fixed(model, records, kind, chain, few),
        "notes": _notes(model, records, chain),
    }
    network["steps"] = {name: _steps(network, name) for name in _switchable(network)}
    return network


def _switchable(network: dict[str, Any]) -> list[str]:
    """The costs between which the page can switch: those that fit the output."""
    both, last = ["quadratic", "cross-entropy"], network["layers"][-1]
    fits = network["cost"] == "cross-entropy" or last["sigma"] == "sigmoid"
    return both if network["cost"] in both and fits else [network["cost"]]


def _steps(network: dict[str, Any], cost: str) -> list[dict[str, Any]]:
    """The steps of a recorded pass, if its cost is `cost`."""
    layers = network["layers"]
    linked, has_delta, has_bias = (
        [bool(layer[key]) for layer in layers] for key in ("linked", "delta", "b")
    )
    name = network["cost_name"]
    return [
        asdict(step)
        for step in steps(linked, has_delta, has_bias, network["chain"], cost, name)
    ]


def _why_fixed(
    model: nn.Module, records: list[Record], cost: str, chain: bool, few: bool
) -> str:
    """The reason why the page cannot change the network, or ""."""
    reasons = {
        "its layers are not one chain": not chain,
        f"it has more than {FEW_WEIGHTS} weights": not few,
        "its cost is not built in": cost == "other",
        "one of its layers is not built in": any(
            record.function not in SIGMAS for record in records
        ),
        "its layers share parameters": _share_parameters(model, records),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    end = "The networks of the lessons can."
    return f"This network cannot be changed here: {reason}. {end}" if reason else ""


def _notes(model: nn.Module, records: list[Record], chain: bool) -> list[str]:
    """Notes about what the page does not show."""
    notes = []
    others = _others(model, records)
    if not chain:
        notes.append("the layers are not one chain: what is between is not drawn")
    if others:
        notes.append(f"not drawn: {', '.join(others)}")
    unreached = [record.name for record in records if record.delta is None]
    if unreached:
        notes.append(f"no backward pass reached {', '.join(unreached)}")
    return notes


def _sizes(records: list[Record]) -> str:
    """The widths of all layers, from the input on."""
    sizes = [records[0].x.shape[-1], *(record.a.shape[-1] for record in records)]
    return str(sizes)


def _layer(
    model: nn.Module, record: Record, above: Record | None, chain: bool, is_small: bool
) -> dict[str, Any]:
    """One call of one layer, ready for JSON; `above` is the call before it, if any."""
    linked = above is not None and (
        chain or (above.a.shape == record.x.shape and torch.equal(above.a, record.x))
    )
    layer = model.get_submodule(record.name)
    name = SIGMAS.get(record.function)
    content: dict[str, Any] = {
        "name": record.name or "(model)",
        "label": name or type(layer).__name__,
        "sigma": name,
        "max_slope": record.function.max_slope,
        "linked": linked,
        "trains": [
            p is not None and p.requires_grad for p in (layer.weight, layer.bias)
        ],
        "W": _packed(record.weight),
        "b": _packed(record.bias),
    }
    for quantity in ("z", "a", "delta", "grad_a"):
        content[quantity] = _packed(_rows(getattr(record, quantity)))
    content["s"] = _packed(_rows(record.sigma_prime))
    content["x"] = None if linked else _packed(_rows(record.x))
    for key, quantity in (("grad_W", "grad_weight"), ("grad_b", "grad_bias")):
        content[key] = _packed(getattr(record, quantity)) if is_small else None
        content[f"{key}_norm"] = _norm(getattr(record, quantity))
    return content


def _norm(t: Tensor | None) -> dict[str, Any] | None:
    """‖t‖, packed. In float64: float32 has too few digits for the sum of a million
    squares. Not by `vector_norm`, which adds one by one where `sum` adds by halves."""
    return None if t is None else _packed(t.cpu().double().square().sum().sqrt())


def _rows(t: Tensor | None) -> Tensor | None:
    """The rows of a tensor that may be missing."""
    return None if t is None else functional.as_rows(t)


def _packed(t: Tensor | None) -> dict[str, Any] | None:
    """A tensor's shape and its numbers, little-endian, in base64: exact and short, and
    with NaN and infinities, which JSON lacks."""
    if t is None:
        return None
    code, name = ("d", "f8") if t.dtype == torch.float64 else ("f", "f4")
    numbers = t.detach().to(device="cpu", dtype=torch.float64).flatten().tolist()
    data = struct.pack(f"<{len(numbers)}{code}", *numbers)
    return {"shape": list(t.shape), name: base64.b64encode(data).decode()}


def _size(record: Record) -> int:
    """The number of numbers in a record."""
    return sum(t.numel() for t in vars(record).values() if isinstance(t, Tensor))


def _share_parameters(model: nn.Module, records: list[Record]) -> bool:
    """Whether two of the calls have a parameter in common."""
    layers = [model.get_submodule(record.name) for record in records]
    used = [id(p) for layer in layers for p in layer.parameters()]
    return len(set(used)) < len(used)


def _others(model: nn.Module, records: list[Record]) -> list[str]:
    """The modules that the page does not draw, with their types."""
    recorded = {record.name for record in records}
    result = []
    for name, module in model.named_modules():
        is_ours = isinstance(module, BPLinear)
        if (
            not name
            or (is_ours and name in recorded)
            or isinstance(module, nn.Identity)
        ):
            continue
        inside = any(name.startswith(f"{n}.") for n in recorded)  # a parametrization
        if not inside and (is_ours or not list(module.children())):
            note = " (not called)" if is_ours else ""
            result.append(f"{name}: {type(module).__name__}{note}")
    return result


def _page(content: dict[str, Any]) -> str:
    """The page: the template filled with the numbers, the script and the style."""
    module = Path(__file__)
    template, script, style = (
        module.with_suffix(suffix).read_text(encoding="utf-8")
        for suffix in (".html", ".js", ".css")
    )
    data = json.dumps(content, allow_nan=False)
    # Within <script>, "</script>" and "<!--" mean something to HTML whatever the type.
    data = data.replace("<", "\\u003c")
    parts = {
        "title": html.escape(content["networks"][0]["title"]),
        "version": __version__,
        "policy": _policy(script, style),
        "style": style,
        "script": script,
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _policy(script: str, style: str) -> str:
    """The Content-Security-Policy: it allows this script and this style, and no request
    to any address."""
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, style)
    ]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; "
        f"style-src 'sha256-{hashes[1]}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'"
    )
