"""python -m torchbp COMMAND: tour, observe and examine from a terminal.

Each command has two functions: one declares its options, the other runs it and imports
what it needs. Exit status: 0 success, 1 findings, 2 an error, with one line that says
why.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

from torchbp._terminal import Parser, run_program
from torchbp.costs import COSTS, COUNTERPARTS, QuadraticCost
from torchbp.exercises import add_exercises

EXAMINE = """\
Examine the derivatives of an autograd.Function, a function of tensors or a module, and
print a finding for each check.

An --input is
  SHAPE           3,4 or () for none: normally distributed numbers
  SHAPE:KIND      numbers that are normal, uniform (0 to 1), simplex (rows that sum to
                  1), bool, or int<10 (0 to 9, for labels; quote it: "3:int<10")
  =LITERAL        an argument that is not a tensor: =0.5, =None, =True

Exit status: 0 no check failed, 1 a check failed, 2 a usage error.
"""


DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_examine(commands: Any) -> None:
    """Declare the options of `examine`."""
    parser = commands.add_parser(
        "examine",
        help="examine an autograd.Function, a function or a module",
        description=EXAMINE,
        epilog="python -m torchbp examine torchbp:BPLinear(4,5) --input 3,4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        nargs="?",
        help="package.module:Name; with literals, the result of the call: Name(4, 3)",
    )
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="CHECK",
        help="print the purpose of a check, or the list of checks, and exit",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="an argument of the function (repeated for each)",
    )
    parser.add_argument(
        "--reference",
        metavar="TARGET",
        help="a function of the same arguments with the right derivatives",
    )
    parser.add_argument(
        "--surrogate",
        metavar="TARGET",
        help="a function whose derivatives the target should have, if not its own",
    )
    for name, text in (("skip", "omit this check"), ("only", "run this check")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="CHECK",
            help=f"{text} (may be repeated)",
        )
    parser.add_argument(
        "--strict", action="store_true", help="count warnings as failures"
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="examine in a separate process, and report its crash",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of the inputs (%(default)s)",
    )
    parser.add_argument(
        "--cost",
        action=argparse.BooleanOptionalAction,
        help="whether the target is a cost, for which A1 and A2 hold (its result "
        "decides)",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const=True,
        default=False,
        metavar="BACKEND",
        help="also examine it compiled (by aot_eager if none is named)",
    )
    add_seed(parser)
    parser.set_defaults(run=run_examine)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Declare ``--seed``."""
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random numbers (%(default)s)"
    )


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` is in range."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed: expected 0 to 2^32 - 1, got {seed}")


def run_examine(arguments: argparse.Namespace) -> int:
    """Run `examine`: print the report on one function; return 1 if it has failures."""
    import torch

    from torchbp.examination import draw, examine, explain, find

    if arguments.explain is not None:
        print(explain(arguments.explain or None))
        return 0
    if arguments.target is None:
        raise ValueError("the following arguments are required: target")
    check_seed(arguments.seed)
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder's modules
    generator = torch.Generator("cpu").manual_seed(arguments.seed)
    torch.manual_seed(arguments.seed)  # for the initial parameters of a module
    dtype = getattr(torch, arguments.dtype)
    inputs = [draw(text, dtype, generator) for text in arguments.input]
    fn = find(arguments.target)
    reference = find(arguments.reference) if arguments.reference else None
    surrogate = find(arguments.surrogate) if arguments.surrogate else None
    if isinstance(fn, torch.nn.Module):
        fn = fn.to(dtype)
    try:
        report = examine(
            fn,
            *inputs,
            reference=reference,
            surrogate=surrogate,
            cost=arguments.cost,
            compile=arguments.compile,
            skip=arguments.skip,
            only=arguments.only,
            strict=arguments.strict,
            isolate=arguments.isolate,
            seed=arguments.seed,
        )
    except TypeError as error:
        raise ValueError(error) from error
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0 if report.ok else 1


OBSERVE = """\
Show one backward pass of a small network and, if MNIST is on disk, of [784, 30, 10] on
its first batch: what each layer computed, forward and backward, and BP1-BP4 compared
with native autograd and finite differences.

Exit status: 0 all equations agree, 1 an equation disagrees, 2 an error.
"""
LARGEST_NETWORK = 10**7  # weights and biases; each is compared in float64, repeatedly


def add_observe(commands: Any) -> None:
    """Declare the options of `observe`."""
    parser = commands.add_parser(
        "observe",
        help="show a backward pass, layer by layer and equation by equation",
        description=OBSERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[2, 3, 1],
        metavar="N",
        help="neurons per layer of the small network, inputs first (2 3 1)",
    )
    parser.add_argument(
        "--cost",
        choices=COSTS,
        default="quadratic",
        help=COUNTERPARTS,
    )
    parser.add_argument(
        "--lr", type=float, default=3.0, help="learning rate η (%(default)s)"
    )
    add_seed(parser)
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="folder with MNIST's files, directly or in raw or MNIST/raw "
        "(TORCHBP_DATA, else the cache of downloads)",
    )
    add_html(parser, "the first batch of MNIST")
    parser.set_defaults(run=run_observe)


def add_html(parser: argparse.ArgumentParser, subject: str) -> None:
    """Declare ``--html``, which writes the page of `subject`."""
    parser.add_argument(
        "--html", metavar="FILE", help=f"also write {subject} as a page for a browser"
    )


def run_observe(arguments: argparse.Namespace) -> int:
    """Run `observe`: show two backward passes; return 1 if an equation disagrees."""
    import torch

    from torchbp import data

    check_seed(arguments.seed)
    if not 0 < arguments.lr < float("inf"):
        raise ValueError(f"--lr: expected a positive number, got {arguments.lr:g}")
    root = arguments.data or data.default_root()
    has_mnist = data.find("mnist", root)
    if arguments.html is not None and not has_mnist:
        raise ValueError(f"--html: expected MNIST in {root} (--data FOLDER)")
    torch.manual_seed(arguments.seed)
    sizes, examples = arguments.sizes, 5
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"--sizes: expected two or more, all positive, got {sizes}")
    weights = sum(n_out * (n_in + 1) for n_in, n_out in itertools.pairwise(sizes))
    if weights > LARGEST_NETWORK:
        raise ValueError(
            f"--sizes: expected at most {LARGEST_NETWORK:,} weights and biases, got "
            f"{weights:,}"
        )
    target = (
        torch.randint(sizes[-1], (examples,), device="cpu")
        if arguments.cost == "log-likelihood"
        else torch.rand(examples, sizes[-1], dtype=torch.float32, device="cpu")
    )
    input = torch.rand(examples, sizes[0], dtype=torch.float32, device="cpu")
    ok = _show_backward_pass(sizes, arguments, input, target, "random")

    print()
    if has_mnist:
        train = data.load("mnist", root, download=False).train
        images, labels = data.scale(train.images[:10]), train.labels[:10]
        sizes, html = [784, 30, 10], arguments.html
        ok &= _show_backward_pass(sizes, arguments, images, labels, "MNIST", html)
    else:
        print(f"MNIST is not in {root}: its backward pass is omitted (--data FOLDER)")
    return 0 if ok else 1


TOUR = """\
A guided tour of backpropagation: one example through a network of 2, 3 and 1 neurons,
forward, back by BP1-BP4, and one step of gradient descent, each equation with its
numbers; at the end the gradients beside native autograd's.

With --step it waits before each part for a key, or for a line if standard input is not
a terminal; q quits.

Exit status: 0 all gradients agree, or q was pressed; 1 a gradient disagrees; 2 an
error; 130 interrupted.
"""


def add_tour(commands: Any) -> None:
    """Declare the options of `tour`."""
    parser = commands.add_parser(
        "tour",
        help="every equation with its numbers, on one small example",
        description=TOUR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--step", action="store_true", help="wait for a key before each part"
    )
    add_seed(parser)
    add_html(parser, "network and example")
    parser.set_defaults(run=run_tour)


def run_tour(arguments: argparse.Namespace) -> int:
    """Run `tour`; return 1 if a gradient disagrees with native autograd's."""
    from torchbp._terminal import in_colour
    from torchbp.inspection import Tour, save_page, show

    check_seed(arguments.seed)
    tour = Tour(arguments.seed)
    if arguments.html is not None:  # before the tour, which may be quit
        cost = QuadraticCost()
        save_page(arguments.html, tour.model, cost, tour.x, tour.y, tour.lr)
    is_complete = show(tour.sections, in_colour(sys.stdout), arguments.step)
    if arguments.html is not None:
        print(f"page {arguments.html}")
    return 0 if tour.ok or not is_complete else 1


def _show_backward_pass(
    sizes: Sequence[int],
    arguments: Any,
    input: Any,
    target: Any,
    kind: str,
    html: str | None = None,
) -> bool:
    """Print the trace and the comparison of one batch and write its page to `html`;
    return whether all equations agree."""
    import torchbp
    from torchbp.inspection import save_page

    cost = COSTS[arguments.cost]()
    output = "identity" if cost.takes == "z" else "sigmoid"
    model = torchbp.MLP(sizes, output=output, device=input.device, dtype=input.dtype)
    with torchbp.observe(model) as trace:
        C = cost(model(input), target)
        C.backward()
    report = torchbp.compare(model, cost, input, target)
    print(
        f"{list(sizes)}, {arguments.cost} cost, {len(input)} {kind} examples: "
        f"C = {C.item():.4g}\n\n{trace.table(arguments.lr)}\n\n{report}"
    )
    if html is not None:
        save_page(html, model, cost, input, target, arguments.lr)
        print(f"\npage {html}")
    return report.ok


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = Parser(
        prog="python -m torchbp",
        description="Show and check backpropagation from a terminal.",
        epilog="Exit status: 0 success, 1 findings, 2 an error, with one line that "
        "says why.",
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    add_tour(commands)
    add_observe(commands)
    add_examine(commands)
    add_exercises(commands)

    def program() -> int:
        """Parse the command line and run its command."""
        arguments = parser.parse_args(argv)
        return int(arguments.run(arguments))

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
