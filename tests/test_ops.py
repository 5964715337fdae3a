"""The registered operators: schemas, fakes, compiled and exported graphs."""

import warnings

import pytest
import torch
from torch import nn
from torch._inductor import cpp_builder
from torch.library import opcheck

from acs_triton import ops
from acs_triton.arguments import conv_params
from acs_triton.operators import ACSConv, Conv2_5d, SoftACSConv


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("groups", "mixed"), [(1, False), (2, False), (1, True)])
def test_opcheck(requires_grad, memory_format, groups, mixed):
    x = torch.randn(2, 4, 5, 4, 6).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(6, 4 // groups, 3, 3), torch.randn(6)
    params = conv_params((3, 3), 6, 2, 1, 1, groups, None)
    if mixed:
        params, weight = params.mixed(), torch.randn(6, 4, 3, 3, 3)
    grad = torch.randn(2, 6, *params.output_size(x.shape[2:])).contiguous(memory_format=memory_format)
    for tensor in (x, weight, bias, grad):
        tensor.requires_grad_(requires_grad)
    opcheck(ops.conv, (x, weight, bias, *params.args()))
    opcheck(ops.conv, (x, weight, None, *params.args()))
    opcheck(ops.input_grad, (grad, weight, x.shape[2:], *params.args()))
    opcheck(ops.weight_grad, (grad, x, *params.args()))
    opcheck(ops.gradients, (grad.detach(), x.detach(), weight.detach(), *params.args()))


def test_opcheck_of_an_activation():
    tensors = torch.randn(2, 4, 5, 4, 6), torch.randn(6, 4, 3, 3), torch.randn(6)
    params = conv_params((3, 3), 6, 2, 1, 1, 1, None).args()
    opcheck(ops.conv_act, (*tensors, "silu", *params))
    opcheck(ops.conv_act, (*(tensor.requires_grad_() for tensor in tensors), "gelu_tanh", *params))


def has_compiler() -> bool:
    try:
        return bool(cpp_builder.get_cpp_compiler())
    except torch._inductor.exc.InvalidCxxCompiler:
        return False


def network():
    layers = [
        ACSConv(3, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        SoftACSConv(6, 4, 3, stride=2, padding=1),
        ACSConv(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
        Conv2_5d(4, 5, 3, padding=1),
        ACSConv(5, 2, 1),
    ]
    return nn.Sequential(*layers).double()


def test_compiled_network_equals_eager_without_breaks_or_recompilation():
    net, compiles = network(), []

    def backend(graph, inputs):
        compiles.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        for batch in (2, 3, 5):
            x = torch.randn(batch, 3, 8, 6, 10, dtype=torch.float64)
            torch._dynamo.mark_dynamic(x, 0)
            expected, found = net(x), compiled(x)
            torch.testing.assert_close(found, expected)
            wanted = torch.autograd.grad(expected.square().sum(), tuple(net.parameters()))
            got = torch.autograd.grad(found.square().sum(), tuple(net.parameters()))
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other)
    assert len(compiles) == 1


@pytest.mark.skipif(not has_compiler(), reason="AOTInductor needs a C++ compiler")
def test_ahead_of_time_compilation(tmp_path):
    net = nn.Sequential(ACSConv(2, 3, 3, padding=1), nn.ReLU(), ACSConv(3, 2, 3, stride=2)).eval()
    x = torch.randn(2, 2, 6, 7, 8)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for batch in (2, 5):
        x = torch.randn(batch, 2, 6, 7, 8)
        torch.testing.assert_close(loaded(x), net(x))


def test_export_with_dynamic_sizes():
    net = network().eval()
    dims = {0: torch.export.Dim("n")} | dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)
    exported = torch.export.export(net, (torch.randn(2, 3, 8, 9, 10, dtype=torch.float64),), dynamic_shapes=(dims,))
    for shape in ((1, 3, 8, 9, 10), (3, 3, 12, 7, 9)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(exported.module()(x), net(x))
