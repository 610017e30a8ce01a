"""convert: both ways the same network and parameters, and the original untouched."""

import copy
import functools
import random

import pytest
import torch
from cases import Bipolar, assert_raises_one_line, rand
from torch import nn
from torch.testing import assert_close

import torchbp
from torchbp import from_native, to_native

NATIVE = {name: layer.native for name, layer in torchbp.nn.ACTIVATIONS.items()}
OURS = list(torchbp.nn.ACTIVATIONS.values())


def outputs_and_gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.backward(rand(*y.shape, seed=9, dtype=y.dtype))
    return y, [p.grad for p in model.parameters()]


def assert_same_network(ours, other, x):
    """Equal outputs and gradients, and the same parameter objects in the same order."""
    theirs = list(other.parameters())
    assert len(theirs) == len(list(ours.parameters()))
    assert all(p is q for p, q in zip(ours.parameters(), theirs, strict=True))
    assert_close(outputs_and_gradients(other, x), outputs_and_gradients(ours, x))


def kinds(model):
    return [type(module) for module in model.modules() if not list(module.children())]


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("bias", [True, False])
def test_one_layer(name, bias):
    ours = torchbp.nn.ACTIVATIONS[name](4, 3, bias=bias).double()
    native = to_native(ours)
    assert kinds(native) == [nn.Linear, *([NATIVE[name]] if NATIVE[name] else [])]
    assert_same_network(ours, native, rand(5, 4))
    back = from_native(native)
    assert kinds(back) == [type(ours)]
    assert_same_network(ours, back, rand(5, 4))


@pytest.mark.parametrize("activation", NATIVE)
@pytest.mark.parametrize("output", NATIVE)
def test_mlp(activation, output):
    ours = torchbp.MLP([5, 4, 3, 2], activation, output, dtype=torch.float64)
    native = to_native(ours)
    assert type(native) is nn.Sequential
    assert torchbp.BPLinear not in {base for k in kinds(native) for base in k.__mro__}
    assert_same_network(ours, native, rand(6, 5))
    back = from_native(native)
    assert kinds(back) == kinds(ours)
    assert_same_network(ours, back, rand(6, 5))


def test_round_trip_of_a_native_network():
    native = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(),
        nn.LayerNorm(4), nn.Sigmoid(), nn.Linear(4, 2),
    ).double()  # fmt: skip
    ours = from_native(native)
    assert kinds(ours) == [
        torchbp.BPLinearTanh, torchbp.BPLinear, torchbp.BPLinearReLU,
        nn.LayerNorm, nn.Sigmoid, torchbp.BPLinear,
    ]  # fmt: skip
    assert_same_network(native, ours, rand(6, 5))
    back = to_native(ours)
    assert str(back) == str(native)
    assert back.state_dict().keys() == native.state_dict().keys()
    assert_same_network(native, back, rand(6, 5))


class Block(nn.Module):
    """A residual block: layers that are attributes, buffers, and another Sequential."""

    def __init__(self, make):
        super().__init__()
        self.inner = nn.Sequential(*make())
        self.last = make()[0]
        self.absent = None
        self.register_module("none", None)
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x):
        return x + self.scale * self.last(self.inner(x))


def test_nested_modules():
    ours = nn.ModuleDict(
        {"a": Block(lambda: [torchbp.BPLinearTanh(4, 4)]), "b": nn.ModuleList([Block(
            lambda: [torchbp.BPLinearReLU(4, 4), torchbp.BPLinear(4, 4)])])}
    ).double()  # fmt: skip
    native = to_native(ours)
    assert not [k for k in kinds(native) if issubclass(k, torchbp.BPLinear)]
    assert type(native["a"]) is Block and native["a"].scale is ours["a"].scale
    for get in (lambda m: m["a"], lambda m: m["b"][0]):
        assert_same_network(get(ours), get(native), rand(3, 4))
        assert_same_network(get(ours), get(from_native(native)), rand(3, 4))


def random_network(choice, depth):
    if depth == 0 or choice.random() < 0.3:
        return choice.choice(OURS)(3, 3, dtype=torch.float64)
    parts = range(choice.randint(1, 4))
    return nn.Sequential(*(random_network(choice, depth - 1) for _ in parts))


@pytest.mark.parametrize("seed", range(20))
def test_random_nesting(seed):
    """Many short-lived modules: no address may be taken for another module's."""
    ours = random_network(random.Random(seed), 4)
    native = to_native(ours)
    assert_same_network(ours, native, rand(2, 3))
    assert_same_network(ours, from_native(native), rand(2, 3))


def test_shared_modules_stay_shared():
    shared = torchbp.BPLinearTanh(4, 4).double()
    ours = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(shared, shared)})
    native = to_native(ours)
    assert native["a"] is native["b"]
    assert len(list(native.parameters())) == 2
    assert_same_network(ours["c"], native["c"], rand(2, 4))
    back = from_native(native)
    assert back["a"] is back["b"]
    assert len(list(back.parameters())) == 2
    assert_same_network(ours["c"], back["c"], rand(2, 4))


def test_shared_block_stays_shared():
    block = Block(lambda: [torchbp.BPLinearTanh(4, 4)]).double()
    native = to_native(nn.Sequential(block, block))
    assert native[0] is native[1]


@pytest.mark.parametrize("convert", [to_native, from_native])
def test_original_is_untouched(convert):
    model = nn.Sequential(
        torchbp.MLP([4, 4, 4]), nn.Linear(4, 4), nn.Tanh(),
        Block(lambda: [torchbp.BPLinearTanh(4, 4)]),
    ).double()  # fmt: skip
    before, x = copy.deepcopy(model), rand(2, 4)
    converted = convert(model)
    assert str(model) == str(before)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(model(x), before(x))
    converted.eval().requires_grad_(False)
    converted.register_buffer("extra", x)
    converted[0].new_attribute = 1
    converted.append(nn.Identity())
    assert model.training and all(m.training for m in model.modules())
    assert str(model) == str(before) and not hasattr(model[0], "new_attribute")
    assert "extra" not in model.state_dict()


def test_modes_survive():
    ours = torchbp.MLP([4, 3, 2]).eval()
    ours.layers[0].weight.requires_grad_(False)
    native = to_native(ours)
    assert not native[0].training and not native[0].weight.requires_grad
    assert not from_native(native)[0].training


def test_training_one_trains_the_other():
    ours = torchbp.MLP([4, 3, 2])
    native, x = to_native(ours), rand(5, 4, dtype=torch.float32)
    before = ours(x).detach()
    optimiser = torch.optim.SGD(native.parameters(), lr=1.0)
    native(x).square().sum().backward()
    optimiser.step()
    assert not torch.allclose(ours(x), before)
    assert_close(ours(x), native(x))


def test_modules_without_layers_of_ours():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.0))
    assert str(to_native(model)) == str(from_native(model)) == str(model)


class OwnLinear(nn.Linear):
    """A subclass may do anything in its forward, so it is not converted."""


def test_subclasses_of_native_layers_are_left_alone():
    assert kinds(from_native(nn.Sequential(OwnLinear(2, 2), nn.Sigmoid()))) == [
        OwnLinear,
        nn.Sigmoid,
    ]


class OwnLayer(torchbp.BPLinearSigmoid):
    pass


@pytest.mark.parametrize("kind", [Bipolar, OwnLayer])
@pytest.mark.parametrize("wrap", [
    lambda layer: layer,
    lambda layer: nn.Sequential(nn.Flatten(), layer),
    lambda layer: nn.ModuleDict({"a": nn.Sequential(layer)}),
], ids=["alone", "sequential", "nested"])  # fmt: skip
def test_custom_layers_are_refused(kind, wrap):
    parts = ("to_native", "expected", "native counterpart", "got", kind.__name__)
    assert_raises_one_line(ValueError, parts, to_native, wrap(kind(2, 2)))


def test_custom_layers_are_refused_inside_an_mlp():
    parts = ("to_native", "expected", "got", "Bipolar")
    model = torchbp.MLP([2, 2, 2], activation=Bipolar)
    assert_raises_one_line(ValueError, parts, to_native, model)


def test_a_layer_in_two_places_of_a_sequence_is_one():
    layer = torchbp.BPLinearSigmoid(3, 3)
    native = to_native(nn.Sequential(layer, layer))
    assert native[0] is native[2] and native[1] is native[3]
    ours = from_native(native)
    assert ours[0] is ours[1]


def test_hooks_see_what_they_saw():
    seen = []
    x = rand(2, 3)

    def watch(module, args, output):
        seen.append(output.detach().clone())

    ours = nn.Sequential(torchbp.BPLinearSigmoid(3, 3), torchbp.BPLinearTanh(3, 2))
    ours.double()[0].register_forward_hook(watch)
    native = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Tanh())
    native.double()[0].register_forward_hook(watch)
    native[3].register_forward_hook(watch)
    for model, convert in ((ours, to_native), (native, from_native)):
        expected = model(x)
        before, seen[:] = list(seen), []
        assert_close(convert(model)(x), expected)
        assert len(seen) == len(before) > 0
        for a, b in zip(seen, before, strict=True):
            assert_close(a, b)
        seen.clear()


def test_an_mlp_with_a_forward_of_its_own_keeps_it():
    class Doubled(torchbp.MLP):
        def forward(self, input):
            return 2 * super().forward(input)

    model = Doubled([3, 4, 2]).double()
    x = rand(5, 3)
    assert_close(to_native(model)(x), model(x))
    assert not any(isinstance(m, torchbp.BPLinear) for m in to_native(model).modules())


def test_names_in_a_sequence_stay():
    native = nn.Sequential()
    native.fc, native.norm = nn.Linear(3, 4), nn.LayerNorm(4)
    native.out, native.act = nn.Linear(4, 2), nn.Sigmoid()
    ours = from_native(native)
    assert list(ours._modules) == ["fc", "norm", "out"]
    back = to_native(ours)
    assert list(back._modules) == ["fc", "norm", "out"]
    x = torch.rand(5, 3)
    assert_close(ours(x), native(x))
    assert_close(back(x), native(x))
    assert set(ours.state_dict()) == set(native.state_dict())


def test_a_parametrized_neighbour_is_left_alone():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))
    native = nn.Sequential(conv, nn.Flatten(), nn.Linear(6, 2), nn.Tanh())
    x = torch.rand(4, 2, 3)
    ours = from_native(native)
    assert kinds(ours).count(torchbp.BPLinearTanh) == 1
    assert_close(ours(x), native(x))


def test_modes_of_new_modules():
    model = nn.Sequential(torchbp.MLP([3, 4, 2]), nn.Dropout()).eval()
    assert not any(m.training for m in to_native(model).modules())


@pytest.mark.parametrize("convert", [to_native, from_native])
def test_a_compiled_module_is_refused(convert):
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    with pytest.raises(ValueError, match="expected a module that is not compiled"):
        convert(compiled)


def compiled_in_place(module):
    module.compile(backend="eager")


def with_another_forward(module):
    module.forward = lambda x: torch.zeros(5, 3)


ALTERATIONS = [compiled_in_place, with_another_forward]


@pytest.mark.parametrize("alter", ALTERATIONS)
@pytest.mark.parametrize("place", ["0", "1", ""])
def test_an_altered_native_module_is_refused_by_name(alter, place):
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    alter(model.get_submodule(place))
    name = type(model.get_submodule(place)).__name__
    with pytest.raises(ValueError, match=f"got a {name} (compiled|with a forward)"):
        from_native(model)


@pytest.mark.parametrize("alter", ALTERATIONS)
@pytest.mark.parametrize("place", ["0", ""])
def test_an_altered_module_of_ours_is_refused_by_name(alter, place):
    model = nn.Sequential(torchbp.BPLinearSigmoid(4, 3))
    alter(model.get_submodule(place))
    with pytest.raises(ValueError, match=r"got a .* (compiled|with a forward)"):
        to_native(model)


@pytest.mark.parametrize("alter", ALTERATIONS)
def test_an_altered_mlp_and_its_layer_are_refused(alter):
    for place in ("", "layers.0"):
        model = torchbp.MLP([4, 3, 2])
        alter(model.get_submodule(place))
        with pytest.raises(ValueError, match="compute what their class says"):
            to_native(model)


def test_a_layer_with_another_function_is_refused():
    layer = torchbp.BPLinearSigmoid(4, 3)
    layer.function = torchbp.functional.LinearTanhFunction
    with pytest.raises(ValueError, match="a BPLinearSigmoid with a function"):
        to_native(layer)


def test_hooks_of_an_mlp_are_kept():
    model = torchbp.MLP([4, 3, 2])
    model.register_forward_hook(lambda module, args, output: output + 1)
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    x = torch.randn(5, 4)
    assert torch.equal(to_native(model)(x), model(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_inplace_relu_is_fused(inplace):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace))
    converted = from_native(model)
    assert [type(m) for m in converted] == [torchbp.BPLinearReLU]
    x = torch.randn(5, 4)
    torch.testing.assert_close(converted(x), model(x))


def test_an_activation_with_an_option_of_its_own_is_not_fused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model[1].gain = 2.0  # nothing that torch's own Tanh has
    assert [type(m) for m in from_native(model)] == [torchbp.BPLinear, nn.Tanh]


class Listed(nn.Module):
    """A container that holds its layer a second time, where no registry sees it."""

    gain = 1.0

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.gain = 2.0  # overrides the class's default
        self.in_a_list, self.in_a_dict = [layer], {"layer": [layer]}
        self.outside = [nn.Linear(3, 3)]  # registered nowhere
        self.seen = []
        self.layer.register_forward_hook(self.remember)
        self.layer.register_forward_hook(functools.partial(self.named, "twice"))
        self.method = self.layer.forward

    def remember(self, module, args, output):
        self.seen = [*self.seen, "once"]

    def named(self, name, *call):
        self.seen = [*self.seen, name]

    def forward(self, x):
        return self.gain * self.in_a_list[0](x) + self.in_a_dict["layer"][0](x)


@pytest.mark.parametrize(
    ("convert", "layer"), [(to_native, torchbp.BPLinearTanh), (from_native, nn.Linear)]
)
def test_what_a_network_holds_of_itself_is_its_own(convert, layer):
    """Layers in lists and methods as hooks: the copy's, not the original's."""
    model = Listed(layer(3, 3)).double()
    x, lists = rand(2, 3), vars(model)["in_a_list"]
    converted = convert(model)
    assert_close(converted(x), model(x))
    assert converted.in_a_list[0] is converted.in_a_dict["layer"][0] is converted.layer
    assert converted.layer is not model.layer and lists[0] is model.layer
    assert converted.outside is model.outside
    assert converted.method.__self__ is converted.layer
    assert converted.seen == model.seen == ["once", "twice"] * 2


def grown(how):
    model = torchbp.MLP([4, 3, 2]).double()
    if how == "attribute":
        model.note = "mine"
    elif how == "buffer":
        model.register_buffer("mean", rand(4))
    elif how == "module":
        model.add_module("extra", nn.Linear(2, 2))
    elif how == "hook on the state":
        model.register_state_dict_post_hook(lambda module, state, *rest: state.pop(
            "layers.0.bias", None))  # fmt: skip
    elif how == "list of layers":
        model.layers.note = "mine"
    return model


@pytest.mark.parametrize(
    "how", ["attribute", "buffer", "module", "hook on the state", "list of layers"]
)
def test_an_mlp_with_more_than_its_class_gives_it_stays_one(how):
    model, x = grown(how), rand(5, 4)
    native = to_native(model)
    assert not any(isinstance(module, torchbp.BPLinear) for module in native.modules())
    assert_close(native(x), model(x))
    assert vars(native).get("note") == vars(model).get("note")
    assert vars(native.layers).get("note") == vars(model.layers).get("note")
    assert native._buffers == model._buffers
    assert native._modules.keys() == model._modules.keys()
    assert "layers.0.bias" not in native.state_dict()
    assert len([*native.parameters()]) == len([*model.parameters()])


def test_modes_of_single_layers_survive():
    model = torchbp.MLP([4, 3, 2])
    model.layers.append(nn.Dropout(1.0))
    model.layers[2].eval()
    native = to_native(model)
    assert native.training and native[0].training and not native[4].training
    x = torch.rand(5, 4)
    assert_close(native(x), model(x))


def with_a_buffer(activation):
    activation.register_buffer("seen", torch.zeros(1))


def with_a_hook_on_its_state(activation):
    activation.register_state_dict_pre_hook(lambda *call: None)


@pytest.mark.parametrize(
    "alter", [with_a_buffer, with_a_hook_on_its_state, nn.Module.eval]
)
def test_an_activation_with_state_of_its_own_is_kept(alter):
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Tanh())
    alter(model[1])
    converted = from_native(model)
    assert kinds(converted) == [torchbp.BPLinear, nn.Sigmoid, torchbp.BPLinearTanh]
    assert converted.state_dict().keys() >= model[1].state_dict(prefix="1.").keys()
    assert converted[1].training == model[1].training
    x = torch.rand(5, 4)
    assert_close(converted(x), model(x))
    assert_close(to_native(converted)(x), model(x))


def test_an_activation_of_other_options_stays():
    for other in (nn.Softplus(beta=5), nn.Softplus(threshold=0.1), nn.ELU(0.3)):
        model = nn.Sequential(nn.Linear(4, 3), other, nn.Linear(3, 2))
        converted, x = from_native(model), torch.randn(5, 4)
        assert type(converted[1]) is type(other)
        assert_close(converted(x), model(x))
        assert_close(to_native(converted)(x), model(x))


@pytest.mark.parametrize("convert", [to_native, from_native])
def test_a_module_without_parameters_yet_is_refused(convert):
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"LazyLinear that is not initialised.*'1'"):
        convert(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("convert", [to_native, from_native])
def test_a_scripted_module_is_refused(convert):
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="expected a module that is not compiled"):
        convert(model)


def test_converting_draws_no_random_numbers():
    model = torchbp.MLP([4, 3, 2])
    before = torch.get_rng_state()
    from_native(to_native(model))
    assert torch.equal(torch.get_rng_state(), before)
