"""Ways out of Python: torch.export, ONNX, traces, the graph that TensorBoard draws.

An exported program holds the forward pass in torch's own operations, and no Function of
ours: it is for inference, and its gradients would be native autograd's. So the programs
are made under no_grad. What needs source code or plain modules (torch.fx, jit.script,
jit.save) gets ``torchbp.to_native(model)``, the same network of native layers.
"""

import io

import bounds
import pytest
import torch
from cases import BUILT_IN, LAYERS, all_layers, rand
from torch import nn
from torch.testing import assert_close

import torchbp
from torchbp._autograd import HAS_BOXED_GRADS

# Newer versions of torch.jit say that torch.export replaces it.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`torch.jit.{name}` is deprecated:FutureWarning")
    for name in ("trace", "trace_method", "script", "save", "load")
]
# The tracer warns of each comparison of sizes: of parameters, the same for every input.
traces_sizes = pytest.mark.filterwarnings(
    "ignore:Converting a tensor to a Python boolean might cause the trace to be "
    "incorrect. We can't record the data flow of Python values:"
    "torch.jit.TracerWarning"
)

F32 = torch.float32
BATCHES = [1, 2, 7, 64]


def every_layer():
    """A network with one of each layer, those from define_layer included."""
    return nn.Sequential(*(layer.module(5, 5) for layer in LAYERS.values()))


def every_native_layer():
    """One of each layer that has a native counterpart."""
    return nn.Sequential(*(LAYERS[name].module(5, 5) for name in BUILT_IN))


def batch(rows):
    return rand(rows, 5, seed=rows, dtype=F32)


def any_batch_size():
    return ({0: torch.export.Dim("rows")},)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- torch.export


def exported(model):
    return torch.export.export(model, (batch(3),), dynamic_shapes=any_batch_size())


def operations(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def assert_of_aten(program):
    """torch's own operations, in one graph: nothing to call back into Python for."""
    for operation in operations(program):
        assert isinstance(operation, torch._ops.OpOverload)
        assert operation.namespace == "aten"
    assert len(list(program.graph_module.modules())) == 1


def test_export():
    model = every_layer()
    with torch.no_grad():
        program = exported(model)
    assert_of_aten(program)
    assert program.state_dict.keys() == model.state_dict().keys()
    for rows in [0, *BATCHES]:
        assert_close(program.module()(batch(rows)), model(batch(rows)))


def test_export_survives_a_file():
    model, file = every_layer(), io.BytesIO()
    with torch.no_grad():
        torch.export.save(exported(model), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(batch(7)), model(batch(7)))


@all_layers
def test_export_holds_linear_and_sigma_once(layer):
    """No z is computed twice, nothing is copied: the operations are native ones."""

    class Native(nn.Linear):
        def forward(self, input):
            return layer.native(input, self.weight, self.bias)

    with torch.no_grad():
        ours, native = (
            [op.name() for op in operations(exported(kind(5, 4)))]
            for kind in (layer.module, Native)
        )
    assert ours == native


@pytest.mark.skipif(
    not HAS_BOXED_GRADS,
    reason="torch 2.8 loses the size of an output that a Function saves, in grad mode",
)
def test_export_in_grad_mode_is_the_forward_pass():
    """The same program; a gradient through it is native autograd's, and right."""
    model, x = every_layer(), batch(7)
    program = exported(model)
    assert_of_aten(program)
    program.module()(x).square().sum().backward()
    expected = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    # The module shares the program's parameters, and the program shares the model's.
    assert_close([p.grad for p in model.parameters()], list(expected))


def test_export_of_the_mlp_with_its_cost():
    class Costed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torchbp.MLP([5, 4, 3], output="identity")
            self.cost = torchbp.LogLikelihoodCost()

        def forward(self, x, y):
            return self.cost(self.model(x), y)

    costed, y = Costed(), torch.tensor([0, 2, 1])
    with torch.no_grad():
        program = torch.export.export(costed, (batch(3), y))
        assert_of_aten(program)
        assert_close(program.module()(batch(3), y), costed(batch(3), y))


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize("network", [every_layer, every_native_layer])
def test_onnx(network, tmp_path):
    """A file that onnxruntime runs without torch, for any number of rows."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"needs {name}: pip install torchbp[clients]")
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="needs onnxruntime: pip install torchbp[clients]"
    )
    model, path = network().eval(), tmp_path / "model.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            model, (batch(3),), dynamo=True, dynamic_shapes=any_batch_size(),
            verbose=False,
        )  # fmt: skip
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    for rows in BATCHES:
        (output,) = session.run(None, {argument.name: batch(rows).numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(output), model(batch(rows)))


# ---------------------------------------------------------------- traces


@traces_sizes
def test_jit_trace():
    """Any batch size again; and the backward pass of a trace is still ours."""
    model = every_layer()
    traced = torch.jit.trace(model, batch(3))
    for rows in [0, *BATCHES]:
        assert_close(traced(batch(rows)), model(batch(rows)), **bounds.EXACT)
    expected = torch.autograd.grad(model(batch(7)).sum(), [*model.parameters()])
    y = traced(batch(7))
    assert_close(torch.autograd.grad(y.sum(), [*model.parameters()]), expected)


@traces_sizes
def test_tensorboard_graph(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    model = every_native_layer()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(model, batch(3))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    names = " ".join(node.name for node in events.Graph().node)
    for i, layer in enumerate(model):
        assert f"{type(layer).__name__}[{i}]" in names


# ---------------------------------------------------------------- the way out


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


WAYS_OUT = {
    "fx": torch.fx.symbolic_trace,
    "script": lambda model: saved_and_loaded(torch.jit.script(model)),
    "trace": lambda model: saved_and_loaded(torch.jit.trace(model, batch(3))),
}
WHY = {
    "fx": (torch.fx.proxy.TraceError, "control flow"),
    "script": (torch.jit.frontend.NotSupportedError, "try blocks"),
    "trace": (RuntimeError, "Could not export Python function call"),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_to_native_is_the_way_out(way):
    model = every_native_layer()
    program = WAYS_OUT[way](torchbp.to_native(model))
    for rows in BATCHES:
        assert_close(program(batch(rows)), model(batch(rows)))


@pytest.mark.parametrize("way", WAYS_OUT)
@traces_sizes
def test_our_layers_say_that_they_cannot(way):
    """A clear refusal, and never a program with another forward pass."""
    kind, message = WHY[way]
    with pytest.raises(kind, match=message):
        WAYS_OUT[way](every_native_layer())


def test_fx_takes_our_layers_as_leaves():
    """Whoever traces with our layers as leaves keeps them, and their backward."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, torchbp.BPLinear) or super().is_leaf_module(
                module, name
            )

    model = every_native_layer()
    module = torch.fx.GraphModule(model, Tracer().trace(model))
    assert [type(layer) for layer in module.children()] == [*map(type, model)]
    assert_close(module(batch(7)), model(batch(7)), **bounds.EXACT)
    assert model[-1].function.__name__ in module(batch(7)).grad_fn.name()
