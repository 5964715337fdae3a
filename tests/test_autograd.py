"""Derivatives of every order and kind, and that nothing is computed or kept that is not needed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import acs_triton.functional as ours
import reference
from acs_triton.autograd import ACSConvFunction

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


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_only_the_needed_gradients_are_computed(needed):
    tensors = [one.detach().requires_grad_(i in needed) for i, one in enumerate(operands({}))]
    y = ours.acs_conv3d(*tensors, padding=1)
    with Calls() as calls:
        y.sum().backward()
    assert ("acs_triton::input_grad" in calls.names) == (0 in needed)
    assert ("acs_triton::weight_grad" in calls.names) == (1 in needed)
    assert [tensor.grad is not None for tensor in tensors] == [i in needed for i in range(3)]


def test_a_frozen_layer_keeps_no_activation():
    x, w, b = operands({})
    y = ours.acs_conv3d(x, w.detach(), b.detach(), padding=1)
    assert [one.shape if one is not None else None for one in y.grad_fn.saved_tensors] == [None, w.shape]


def test_it_is_an_autograd_function():
    assert issubclass(ACSConvFunction, torch.autograd.Function)
    assert "ACSConvFunction" in ours.acs_conv3d(*operands({}), padding=1).grad_fn.name()


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
