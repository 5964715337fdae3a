"""Derivatives of every order and kind, and that nothing is computed or kept that is not needed."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.utils._python_dispatch import TorchDispatchMode

import acs_triton.functional as ours
import reference
from acs_triton import ops
from acs_triton.arguments import conv_params
from acs_triton.autograd import ACSConvFunction
from acs_triton.operators import ACSConv, SoftACSConv

pytestmark = pytest.mark.usefixtures("no_small_layers")

CASES = [
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2, "aligned": True},
    {"padding": "same", "split": (0, 1, 3)},
    {"stride": (1, 2, 3), "groups": 2},
]


def operands(options):
    shapes = (1, 2, 4, 3, 4), (4, 2 // options.get("groups", 1), 3, 3), (4,)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradcheck(options):
    inputs = operands(options)

    def f(x, w, b):
        return ours.acs_conv3d(x, w, b, **options)

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_gradcheck_soft():
    x, w, b = operands({})
    share = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    for padding in (1, 0):
        assert torch.autograd.gradcheck(
            lambda *all, padding=padding: ours.soft_acs_conv3d(*all[:3], all[3], padding=padding), (x, w, share, b)
        )


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needed", "primitives"),
    [((0,), "input_grad"), ((1,), "weight_grad"), ((2,), None), ((0, 1), "gradients"), ((0, 1, 2), "gradients")],
)
def test_only_the_needed_gradients_are_computed(needed, primitives):
    tensors = [one.detach().requires_grad_(i in needed) for i, one in enumerate(operands({}))]
    y = ours.acs_conv3d(*tensors, padding=1)
    with Calls() as calls:
        y.sum().backward()
    found = [name.removeprefix("acs_triton::") for name in calls.names if name.startswith("acs_triton::")]
    assert found == ([primitives] if primitives else [])
    assert [tensor.grad is not None for tensor in tensors] == [i in needed for i in range(3)]


def test_a_frozen_layer_keeps_no_activation():
    x, w, b = operands({})
    y = ours.acs_conv3d(x, w.detach(), b.detach(), padding=1)
    assert [one.shape if one is not None else None for one in y.grad_fn.saved_tensors] == [None, w.shape]


def test_it_is_an_autograd_function():
    y = ours.acs_conv3d(*operands({}), padding=1)
    assert issubclass(ACSConvFunction, torch.autograd.function._SingleLevelFunction)
    assert "ACSConvFunction" in y.grad_fn.name()


def test_vmap_over_input_and_over_weight():
    x, w, b = operands({})
    xs, ws = torch.randn(3, *x.shape, dtype=x.dtype), torch.randn(3, *w.shape, dtype=x.dtype)

    def f(x, w):
        return ours.acs_conv3d(x, w, b, padding=1, stride=2)

    def g(x, w):
        return reference.acs_conv3d(x, w, b, padding=1, stride=2)

    for dims in ((0, None), (None, 0), (0, 0)):
        args = (xs if dims[0] == 0 else x, ws if dims[1] == 0 else w)
        rows = [g(args[0][i] if dims[0] == 0 else x, args[1][i] if dims[1] == 0 else w) for i in range(3)]
        torch.testing.assert_close(torch.vmap(f, dims)(*args), torch.stack(rows))


def test_functorch_transforms_against_the_reference():
    x, w, _ = (one.detach() for one in operands({}))
    x, w = x[:1, :1, :3, :3, :3], w[:3, :1]

    def loss(library):
        return lambda x, w: library.acs_conv3d(x, w, padding=1).pow(3).sum()

    for transform in (
        torch.func.hessian,
        torch.func.jacfwd,
        torch.func.jacrev,
        lambda f, argnums: torch.func.jacfwd(torch.func.grad(f, argnums), argnums),
    ):
        for argnums in (0, 1):
            found = transform(loss(ours), argnums=argnums)(x, w)
            torch.testing.assert_close(found, transform(loss(reference), argnums=argnums)(x, w))
    found = torch.func.jvp(loss(ours), (x, w), (x + 1, w * 2))
    torch.testing.assert_close(found, torch.func.jvp(loss(reference), (x, w), (x + 1, w * 2)))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_double_backward_against_the_reference(options):
    inputs = operands(options)
    found, expected = [], []
    for library, results in ((ours, found), (reference, expected)):
        y = library.acs_conv3d(*inputs, **options)
        first = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        results.extend(first)
        results.extend(torch.autograd.grad(sum(one.pow(2).sum() for one in first), inputs))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_forward_mode_through_a_plain_backward():
    """Tangents reach the gradients also where no graph of the gradients is asked for."""
    x, w, _ = (one.detach() for one in operands({}))

    def tangents(library):
        with fwAD.dual_level():
            dual_x = fwAD.make_dual(x, x.cos()).requires_grad_()
            dual_w = fwAD.make_dual(w, w.sin()).requires_grad_()
            loss = library.acs_conv3d(dual_x, dual_w, padding=1).pow(3).sum()
            return [fwAD.unpack_dual(one).tangent for one in torch.autograd.grad(loss, (dual_x, dual_w))]

    for one, two in zip(tangents(ours), tangents(reference), strict=True):
        torch.testing.assert_close(one, two)


def test_per_sample_gradients_of_a_network():
    net = torch.nn.Sequential(ACSConv(2, 3, 3, padding=1), torch.nn.Tanh(), SoftACSConv(3, 2, 3, padding=1)).double()
    xs = torch.randn(4, 2, 5, 4, 3, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x[None],)).square().sum()

    def written_out(parameters, x):
        y = reference.acs_conv3d(x[None], parameters["0.weight"], parameters["0.bias"], padding=1).tanh()
        shares = parameters["2.soft_w_core"].softmax(-1)
        y = reference.soft_acs_conv3d(y, parameters["2.weight"], shares, parameters["2.bias"], padding=1)
        return y.square().sum()

    parameters = {name: value.detach() for name, value in net.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    for row, x in enumerate(xs):
        for name, wanted in torch.func.grad(written_out)(parameters, x).items():
            torch.testing.assert_close(found[name][row], wanted)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacfwd", "forward over reverse", "reverse over forward"])
def test_operators_under_transforms(transform, compiled):
    """Called directly, and in compiled graphs, the operators have the derivatives of the functions."""
    x, w, b = (one.detach() for one in operands({}))
    x, w, b = x[:, :1, :3, :3, :3], w[:3, :1], b[:3]
    params = conv_params((3, 3), 3, 1, 1, 1, 1, None)

    def derivative(conv):
        def loss(x):
            return conv(x).pow(3).sum()

        def directional(f, x):
            return torch.func.jvp(f, (x,), (x.cos(),))[1]

        return {
            "grad": torch.func.grad(loss),
            "vjp": lambda x: torch.func.vjp(conv, x)[1](conv(x))[0],
            "jvp": lambda x: directional(conv, x),
            "jacfwd": torch.func.jacfwd(conv),
            "forward over reverse": lambda x: directional(torch.func.grad(loss), x),
            "reverse over forward": torch.func.grad(lambda x: directional(loss, x)),
        }[transform]

    expected = derivative(lambda x: reference.acs_conv3d(x, w, b, padding=1))(x)
    if compiled:
        torch._dynamo.reset()
        function = derivative(lambda x: ours.acs_conv3d(x, w, b, padding=1))
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    else:
        function = derivative(lambda x: ops.conv(x, w, b, *params.args()))
    torch.testing.assert_close(function(x), expected)
